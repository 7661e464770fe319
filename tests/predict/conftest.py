"""What predictions are asked of: a run, rankers and a forest that training has calibrated."""

from pathlib import Path

import pytest
from ranker_runs import options
from train_runs import finished_run, make_dataset, make_tree

from xmlkernels.training.linear import LinearConfig, train_linear
from xmlkernels.training.ranker import train_ranker


@pytest.fixture(scope="session")
def calibrated_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"), keep_texts=True)


@pytest.fixture(scope="session")
def made(calibrated_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run `whole`, rankers `beside` it and `ranker` on a tree, and a forest `forest`."""
    folder = calibrated_set
    at = tmp_path_factory.mktemp("made")
    run = finished_run(folder, at)
    tree = make_tree(folder, at / "tree.safetensors")
    train_ranker(options(folder, at / "beside", checkpoint=str(run), top_k=20))
    train_ranker(options(folder, at / "ranker", tree=str(tree), top_k=20))
    train_linear(
        LinearConfig(
            str(folder), output=str(at / "forest"), cache=str(at / "cache"), depths=(2,), min_df=1,
            trees=2, threads=1, beam=4,
        )
    )  # fmt: skip
    return at
