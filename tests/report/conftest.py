"""A run of each kind, with its report; the names of its labels are attacks."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from report_runs import EVIL
from train_runs import RECIPES, ROOT, cascade, make_dataset, make_tree, run, tiny

from xmlkernels.training.linear import LinearConfig, train_linear

sys.path.insert(0, str(ROOT / "tests" / "serve"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts are kept, and the names of labels are attacks."""
    folder = tmp_path_factory.mktemp("raw")
    plain = Path.write_text

    def evil(self: Path, text: str) -> int:
        return plain(self, text.replace("w", f"{EVIL}w") if self.name == "Y.txt" else text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", evil)
        return make_dataset(folder, keep_texts=True)


@pytest.fixture(scope="session")
def folders(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind."""
    base = tmp_path_factory.mktemp("runs")
    run(tiny(dataset, base / "tiny", report=True))
    tree = make_tree(dataset, base / "tree.safetensors")
    run(cascade(dataset, base / "cascade", tree, report=True, epochs=1))
    config = RECIPES["linear"].replace(
        dataset=str(dataset), output=str(base / "linear"), cache=str(base / "cache"), depths=(2,),
        min_df=1, threads=1,
    )  # fmt: skip
    assert isinstance(config, LinearConfig)
    train_linear(config)
    train_linear(replace(config, output=str(base / "forest"), trees=2))
    return {name: base / name for name in ("tiny", "cascade", "linear", "forest")}
