"""Fixtures of the commands: a dataset that keeps its texts, and a run on it."""

from pathlib import Path

import pytest
from train_runs import finished_run, make_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset that keeps its texts; labels 0 and 1 of the first documents are filtered out."""
    raw = tmp_path_factory.mktemp("raw")
    for name in ("trn", "tst"):
        (raw / f"{name}.txt").write_text(
            "".join(f"{row} {label}\n" for row in range(3) for label in (0, 1))
        )
    return make_dataset(
        raw, keep_texts=True, train_filter=raw / "trn.txt", test_filter=raw / "tst.txt"
    )


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(folder, tmp_path_factory.mktemp("runs"))
