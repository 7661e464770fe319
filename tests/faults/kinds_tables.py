"""Tables of one's own, in every kind of text file, and the profile of a dataset."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import Kind

from xmlkernels.data.profile import load_profile, write_profile
from xmlkernels.data.profiling import Measured, lines_of, measure
from xmlkernels.data.tables.options import Tables
from xmlkernels.data.tables.read import read_tables

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from own_tables import write

# Not Parquet, whose reader starts threads that no fork may wait for: tests/data has damaged ones.
FILES = ("a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt", "a.csv.gz", "a.jsonl.zst")


def maker(name: str) -> Callable[[Path], None]:
    """Make the function that writes one of the files into a folder."""
    return lambda folder: write(folder, name) and None


def consume(path: Path) -> None:
    """Read a table and measure it."""
    raw, told = read_tables(Tables(path))
    labels = raw.num_labels
    assert raw.label_names is not None and len(raw.label_names) == len(set(raw.label_names))
    for split in raw.splits.values():
        assert split.texts is not None and len(split.texts) == split.labels.shape[0] > 0
        assert split.labels.shape[1] == labels == len(raw.label_names)
        assert (np.diff(split.labels.indptr) >= 0).all() and split.labels.indices.max() < labels
    for text in (*told, *raw.label_names, *raw.splits["train"].texts):
        text.encode()
    splits = {name: Measured(split.texts, split.labels) for name, split in raw.splits.items()}
    lines_of(measure("t", splits, raw.label_names))


def make_profile(folder: Path) -> None:
    """Write a profile."""
    table = folder / "t.jsonl"
    table.write_text('{"text": "a", "labels": ["x", "y"]}\n')
    raw, _ = read_tables(Tables(table))
    table.unlink()
    splits = {name: Measured(split.texts, split.labels) for name, split in raw.splits.items()}
    write_profile(folder, measure("t", splits, raw.label_names))


KINDS = [
    *(
        Kind(f"table {name}", maker(name), lambda folder, name=name: consume(folder / name))
        for name in FILES
    ),
    Kind("profile", make_profile, lambda folder: lines_of(load_profile(folder))),
]
