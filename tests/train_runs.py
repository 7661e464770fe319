"""What the tests of the commands share: a small dataset whose words give its labels away, and runs
in this process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT / "tests" / "data") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests" / "data"))

from tiny_tokenizer import make_tokenizer
from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.training import evaluator, run_state, session
from xmlkernels.training.checks import check
from xmlkernels.training.config import Config
from xmlkernels.training.loop import train
from xmlkernels.training.recipes import RECIPES
from xmlkernels.tree.label_tree import LabelTree

__all__ = [
    "LABELS",
    "RECIPES",
    "ROOT",
    "TRAIN_DOCUMENTS",
    "Config",
    "cascade",
    "check",
    "evaluator",
    "finished_run",
    "make_dataset",
    "make_tokenizer",
    "make_tree",
    "opened",
    "run",
    "run_state",
    "session",
    "threads_kept",
    "tiny",
    "weights",
    "write_part",
]
TRAIN_DOCUMENTS, LABELS = 160, 30
PARTS = {"train": ("trn", TRAIN_DOCUMENTS), "validation": ("val", 40), "test": ("tst", 50)}


def write_part(folder: Path, part: str, documents: int, seed: int, unlabelled: int = 0) -> None:
    """Label l goes with the words w3l, w3l+1, w3l+2; the first `unlabelled` documents have none."""
    random = np.random.default_rng(seed)
    texts, lines = [], [f"{documents} {LABELS}"]
    for number in range(documents):
        own = sorted(random.choice(LABELS, 2, replace=False).tolist())
        words = [f"w{3 * label + int(random.integers(3))}" for label in own for _ in range(3)]
        texts.append(" ".join(words[: int(random.integers(4, 7))]))
        lines.append(" ".join(f"{label}:1" for label in own) if number >= unlabelled else "")
    (folder / f"{part}_X.txt").write_text("".join(f"{text}\n" for text in texts))
    (folder / f"{part}_X_Y.txt").write_text("".join(f"{line}\n" for line in lines))


def make_dataset(
    folder: Path, *, splits: tuple[str, ...] = tuple(PARTS), unlabelled: int = 0, **more: Any
) -> Path:
    """A dataset folder of the given splits."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {}
    for number, name in enumerate(splits):
        part, documents = PARTS[name]
        write_part(folder, part, documents, number, unlabelled)
        files |= {
            f"{name}_text": folder / f"{part}_X.txt",
            f"{name}_labels": folder / f"{part}_X_Y.txt",
        }
    (folder / "Y.txt").write_text("".join(f"w{3 * label}\n" for label in range(LABELS)))
    tokenizer = make_tokenizer(folder / "tokenizer")
    settings = {"max_length": 16, "label_text": folder / "Y.txt", **files, **more}
    prepare(PrepareConfig(output=folder / "dataset", tokenizer=str(tokenizer), **settings))
    return folder / "dataset"


def tiny(dataset: Path, output: Path, **changes: Any) -> Config:
    """A run of 3 epochs and 30 steps on one thread."""
    settings = {
        "batch": 16,
        "epochs": 3,
        "log_every": 2,
        "threads": 1,
        "dropout": 0.1,
        "save_every": 4,
        "report": False,  # tests/report makes some
    } | changes
    return replace(RECIPES["tiny"].config, dataset=str(dataset), output=str(output), **settings)


def make_tree(dataset: Path, file: Path, seed: int = 0) -> Path:
    """4 clusters of 2 or 3 clusters of 3 labels each, none of which are neighbours by number."""
    made = Dataset.open(dataset)
    mixed = np.random.default_rng(seed).permutation(LABELS)
    fine = mixed // 3
    LabelTree.from_partitions([fine * 4 // 10, fine], {"dataset": made.content_hash}).save(file)
    return file


def cascade(dataset: Path, output: Path, tree: Path, **changes: Any) -> Config:
    """A cascade of three levels in 3 epochs and 30 steps."""
    settings = {
        "model": "cascade",
        "tree": str(tree),
        "layers": ("1", "2", "2"),
        "topk": (2, 4),
        "embed_drops": (0.1, 0.1, 0.1),
        "encoder_lr": 2e-3,
        "dropout": Config.dropout,
        "warmup": 5,
        "cooldown_epochs": 1.0,
        "top_k": 20,
        "encoder_decay": 0.05,
    } | changes
    return tiny(dataset, output, **settings)


@contextmanager
def threads_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(config: Config) -> dict[str, Any]:
    """`train` in this process, which keeps its thread count."""
    with threads_kept():
        return train(config)


def opened(config: Config) -> tuple[session.Session, run_state.RunState]:
    """A run before its first step, or where it goes on."""
    with threads_kept():
        found = session.Session(config)
        return found, run_state.RunState(found)


def finished_run(dataset: Path, base: Path) -> Path:
    """The output folder of a whole tiny run."""
    run(tiny(dataset, base / "whole"))
    return base / "whole"


def weights(folder: Path, which: str) -> dict[str, bytes]:
    """Every tensor of a run's checkpoint, as bytes."""
    tensors, _ = CheckpointFolder(folder / "checkpoint").load(which)
    return {
        name: value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, value in tensors.items()
    }
