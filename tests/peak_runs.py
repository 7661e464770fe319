"""Runs of the real loop, and the memory that they peak at beside what was planned for them.

    python tests/peak_runs.py FOLDER data         makes the datasets
    python tests/peak_runs.py FOLDER plan         prints the planned peak of every case
    python tests/peak_runs.py FOLDER run NUMBER   trains one, and prints what it peaked at

Lines are JSON; bytes are in MB. Each run is a process of its own, and not a fork of one that has
imported: pages of files that it shares would not count as its own.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "data"))

import numpy as np

from tiny_tokenizer import make_tokenizer
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.memory import resident_memory
from xmlkernels.training.checks import check
from xmlkernels.training.config import Config
from xmlkernels.training.loop import train
from xmlkernels.training.planned_sizes import PlanConfig
from xmlkernels.training.planning import forecast_of
from xmlkernels.training.recipes import RECIPES
from xmlkernels.tree.label_tree import LabelTree

MB = 1e6
DOCUMENTS = {"train": 32, "validation": 8, "test": 8}
WIDTH = 512
LABELS, MANY = 60_000, 500_000
_BOW: dict[str, Any] = {
    "bow_width": WIDTH,
    "label_text": False,
    "bias": False,
    "frequency_bias": False,
    "centroid_norm": 0.0,
    "table_optimizer": "sgd",
    "table_lr": 0.01,
}
# Recipe, labels, settings.
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "fp32, momentum": ("bow", LABELS, _BOW | {"table": "fp32", "background_save": "on"}),
    "bf16, Adam, from centroids": (
        "bow",
        LABELS,
        _BOW
        | {
            "table": "bf16",
            "table_optimizer": "adam",
            "state": "bf16",
            "bias": True,
            "frequency_bias": True,
            "centroid_norm": 0.5,
            "epochs": 1,
        },
    ),
    "fp8, momentum in fp32": ("bow", LABELS, _BOW | {"table": "fp8"}),
    "cascade, Adam, bf16": (
        "cascade",
        2 * LABELS,
        {
            "encoder": "bow",
            "bow_width": WIDTH,
            "label_text": False,
            "min_df": 1,
            "table": "bf16",
            "state": "bf16",
            "topk": (16, 64),
            "rw_loss": (),
            "embed_drops": (),
        },
    ),
    "transformer, gradient caching": (
        "tiny",
        MANY,
        {"micro_batch": 4, "dropout": 0.1, "table": "fp32", "label_text": False, "warmup": 2},
    ),
}


def make_data(folder: Path, labels: int, *, tokens: bool) -> None:
    """A few documents with labels drawn from many."""
    folder.mkdir()
    random, files = np.random.default_rng(0), dict[str, Path]()
    for part, count in DOCUMENTS.items():
        own = np.sort(random.integers(0, labels, (count, 3)), 1)
        words = np.sort(random.integers(0, 500, (count, 8)), 1)
        rows = [",".join(map(str, sorted(set(row)))) for row in own.tolist()]
        if tokens:
            texts = [" ".join(f"w{word % 90}" for word in row) for row in words.tolist()]
            files[f"{part}_text"], files[f"{part}_labels"] = (
                folder / f"{part}.txt",
                folder / f"{part}_labels.txt",
            )
            files[f"{part}_text"].write_text("\n".join(texts) + "\n")
            head = f"{count} {labels}\n"
            lines = (" ".join(f"{label}:1" for label in row.split(",")) for row in rows)
            files[f"{part}_labels"].write_text(head + "\n".join(lines) + "\n")
            continue
        lines = (
            f"{row} " + " ".join(f"{word}:1.0" for word in sorted(set(bag)))
            for row, bag in zip(rows, words.tolist(), strict=True)
        )
        files[f"{part}_text"] = folder / f"{part}.txt"
        files[f"{part}_text"].write_text(f"{count} 500 {labels}\n" + "\n".join(lines) + "\n")
    more: dict[str, Any] = {"source": "bow"}
    if tokens:
        more = {"tokenizer": str(make_tokenizer(folder / "tokenizer")), "max_length": 16}
    prepare(PrepareConfig(output=folder / "dataset", **files, **more))  # type: ignore[arg-type]


def make_tree(dataset: Path, file: Path) -> None:
    opened = Dataset.open(dataset)
    label, count = np.arange(opened.num_labels), opened.num_labels
    parts = [label * 64 // count, label * 2048 // count]
    LabelTree.from_partitions(parts, {"dataset": opened.content_hash}).save(file)


def config_of(case: str, folder: Path) -> Config:
    recipe, labels, changes = CASES[case]
    place = folder / f"data-{recipe}-{labels}"
    if recipe == "cascade":
        changes = changes | {"tree": str(place / "tree.safetensors")}
    settings = {
        "dataset": str(place / "dataset"),
        "output": str(folder / "runs" / str(list(CASES).index(case))),
        "batch": 8,
        "epochs": 2,
        "evaluate_batch": 8,
        "save_every": 0,
        "background_save": "off",  # auto copies a checkpoint only where there is room for it
        "threads": 1,
        "device": "cpu",
    }
    return replace(RECIPES[recipe].config, **(settings | changes))


def peak() -> int:
    """Bytes that this process has held at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("this system does not say")


def trained(config: Config) -> dict[str, int]:
    imported = resident_memory() or 0
    check(config)
    train(config)
    return {"measured": peak(), "imported": imported}


def planned(case: str, config: Config, *, sizes: bool) -> int:
    recipe, labels, _ = CASES[case]
    given: Mapping[str, Any] = {}
    if sizes:
        # As somebody would who has no data yet.
        given = {"labels": labels, "validation": 8, "test": 8, "positives": 3.0, "words": 8.0}
        given = {**given, "vocabulary": 500, "longest": 0 if config.encoder == "bow" else 16}
        config = replace(config, documents=32, dataset=str(Path("nowhere")))
    options = PlanConfig(run=config, **given)
    found = forecast_of(options, replace(RECIPES[recipe], config=options))
    return found.memory.budgets()["cpu"].peak


def make(folder: Path) -> None:
    for recipe, labels, _ in CASES.values():
        place = folder / f"data-{recipe}-{labels}"
        if not place.exists():
            make_data(place, labels, tokens=recipe == "tiny")
            if recipe == "cascade":
                make_tree(place / "dataset", place / "tree.safetensors")


def tell(case: str, found: Mapping[str, int]) -> None:
    print(json.dumps({"case": case} | {name: count / MB for name, count in found.items()}))


def main(folder: Path, what: str, number: int = 0) -> None:
    configs = {case: config_of(case, folder) for case in CASES}
    if what == "data":
        make(folder)
    elif what == "plan":
        for case, config in configs.items():
            by_sizes = planned(case, config, sizes=True)  # first: no data are open yet
            tell(case, {"by sizes": by_sizes, "by data": planned(case, config, sizes=False)})
    else:
        case = list(CASES)[number]
        tell(case, trained(configs[case]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
