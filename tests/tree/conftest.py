"""Fixtures of the tree tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from tree_runs import LABELS, SUBJECTS, as_bag

from tiny_tokenizer import make_tokenizer
from xmlkernels import parallel
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.training.tree import TreeConfig


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; also to more than the machine has."""

    def choose(count: int) -> None:
        parallel.use_threads(count)
        assert parallel.threads() == count

    yield choose
    parallel.use_threads(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Documents of four subjects, six labels each, the last of which no document has; its name is
    of its subject.
    """
    base = tmp_path_factory.mktemp("tree")
    make_tokenizer(base / "tokenizer")
    random = np.random.default_rng(0)
    for split, count in (("train", 200), ("val", 40)):
        texts, rows = [], []
        for _ in range(count):
            subject = int(random.integers(SUBJECTS))
            labels = sorted(random.choice(5, 2, replace=False) * SUBJECTS + subject)
            words = [f"w{subject * 20 + word}" for word in random.integers(0, 20, 8)] + [
                f"w{100 + label}" for label in labels
            ]
            texts.append(" ".join(words))
            rows.append(" ".join(f"{label}:1" for label in labels))
        (base / f"{split}.txt").write_text("\n".join(texts) + "\n")
        (base / f"{split}_labels.txt").write_text(f"{count} {LABELS}\n" + "\n".join(rows) + "\n")
    (base / "names.txt").write_text(
        "".join(
            f"w{label % SUBJECTS * 20} w{label % SUBJECTS * 20 + 1}\n" for label in range(LABELS)
        )
    )
    for name, keep in (("texts", True), ("tokens", False)):
        config = PrepareConfig(
            base / name,
            str(base / "tokenizer"),
            16,
            keep_texts=keep,
            train_text=base / "train.txt",
            train_labels=base / "train_labels.txt",
            validation_text=base / "val.txt",
            validation_labels=base / "val_labels.txt",
            label_text=base / "names.txt",
        )
        prepare(config)
    for split, count in (("train", 200), ("val", 40)):  # word w{i} is column i
        rows = (base / f"{split}_labels.txt").read_text().splitlines()[1:]
        texts = (base / f"{split}.txt").read_text().splitlines()
        lines = [
            f"{row.replace(':1', '').replace(' ', ',')} {as_bag(text)}"
            for row, text in zip(rows, texts, strict=True)
        ]
        (base / f"{split}_bags.txt").write_text(f"{count} 200 {LABELS}\n" + "\n".join(lines) + "\n")
    names = (base / "names.txt").read_text().splitlines()
    (base / "name_bags.txt").write_text(f"{LABELS} 200\n" + "\n".join(map(as_bag, names)) + "\n")
    config = PrepareConfig(
        base / "bags",
        source="bow",
        train_text=base / "train_bags.txt",
        validation_text=base / "val_bags.txt",
        label_text=base / "name_bags.txt",
    )
    prepare(config)
    np.save(base / "vectors.npy", np.eye(SUBJECTS, dtype=np.float32)[np.arange(LABELS) % SUBJECTS])
    yield base


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> TreeConfig:
    return TreeConfig(
        str(folder / "texts"), output=str(tmp_path / "tree"), depths=(2, 3), plot=False, visits=50
    )
