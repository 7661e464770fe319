"""What long work tells before and around the steps of training, on a terminal and in a log."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from train_runs import RECIPES, ROOT, make_dataset, threads_kept

sys.path.insert(0, str(ROOT / "tests" / "data"))
from own_tables import write
from xmlkernels import Dataset, ticks
from xmlkernels.cli import console
from xmlkernels.data import dataset_writer
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.tables.options import Tables
from xmlkernels.data.tokens import tokenize_to_file
from xmlkernels.ranker import grouped, knn, matcher
from xmlkernels.training.linear import train_linear
from xmlkernels.training.tree import TreeConfig, build_tree
from xmlkernels.tree import graph, products

# What is done, and of what: each as a pattern of the whole line.
OF = r"[\d,]+ of [\d,]+ {} \(\d+%\)  [\d.,e+-]+ {}/s  [\d,]+ MB  about \d.* left"
PARTS = {
    "a.jsonl": r"\d+ rows \(\d+%\)  [\d.,e+-]+ rows/s  [\d,]+ MB  about \d.* left",
    "a.csv.gz": r"\d+ rows \(\d+%\)  [\d.,e+-]+ rows/s  [\d,]+ MB  about \d.* left",
    "a.parquet": OF.format("rows", "rows"),
    "trn_X.txt": r"\d+ lines \(\d+%\)  [\d.,e+-]+ lines/s  [\d,]+ MB  about \d.* left",
    "train: tokens": OF.format("documents", "documents"),
    "train: texts written": OF.format("documents", "documents"),
    "profile of the training texts": OF.format("documents", "documents"),
    "TF-IDF for the tree": OF.format("texts", "texts"),
    "label features": OF.format("labels", "labels"),
    "walks of the label graph": OF.format("labels", "labels"),
    "smoothing": OF.format("labels", "labels"),
    "level 0, 4 clusters": OF.format("labels placed", "labels placed"),
    "level 1, 16 clusters": OF.format("labels placed", "labels placed"),
    "TF-IDF, the vocabulary": OF.format("texts", "texts"),
    "TF-IDF": OF.format("texts", "texts"),
    "classifiers of level 0": OF.format("clusters", "clusters"),
    "classifiers of level 1": OF.format("clusters", "clusters"),
    "clusters of level 0 for each document": OF.format("documents", "documents"),
    "classifiers": OF.format("labels", "labels"),
    "choosing share and kind of blend": OF.format("blends", "blends"),
    "neighbours, words of the training texts": OF.format("texts", "texts"),
    "neighbours": OF.format("texts", "texts"),
}


def work(folder: Path) -> None:
    """Prepare tables and files, and train two levels of clusters with their rankers."""
    for name in ("a.jsonl", "a.csv.gz", "a.parquet"):
        tables = Tables(data=write(folder, name))
        prepare(PrepareConfig(output=folder / f"of {name}", tables=tables))
    data = make_dataset(folder / "raw", keep_texts=True)
    build_tree(TreeConfig(str(data), str(folder / "tree"), depths=(2, 4), threads=1))
    config = RECIPES["linear"].replace(
        dataset=str(data), output=str(folder / "linear"), cache=str(folder / "cache"),
        depths=(2, 4), min_df=1, threads=1, report=False,
    )  # fmt: skip
    with threads_kept():
        train_linear(config)
    train = Dataset.open(data).splits["train"]
    knn.KNNBaseline(train.texts, train.labels).predict(train.texts, 3)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let work on few rows have several pieces."""
    for place, name in ((products, "_ROWS"), (matcher, "_ROWS"), (knn, "_BLOCK")):
        monkeypatch.setattr(place, name, 8)
    monkeypatch.setattr(graph, "_LABELS", 8)
    monkeypatch.setattr(grouped, "_MOST", 2)
    monkeypatch.setattr(ticks, "_AT_ONCE", 8)
    chunks = partial(tokenize_to_file, chunk=16)
    monkeypatch.setattr(dataset_writer, "tokenize_to_file", chunks)


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect what is shown on a terminal, where one line replaces another.

    No fixture: rich gives back the standard output that it found, and pytest has another one in
    each phase of a test.
    """
    shown: list[str] = []
    screen = console._Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr(console, "_console", screen)
    update = console.Status.update

    def seen(self, text, **more):  # type: ignore[no-untyped-def]
        shown.append(str(text))
        update(self, text, **more)

    monkeypatch.setattr(console.Status, "update", seen)
    logger = logging.getLogger("xmlkernels")
    before = logger.level
    console.print_logs()
    logger.setLevel(ticks.LIVE)
    try:
        yield shown
    finally:
        console._still()
        logger.setLevel(before)


def missing(lines: list[str]) -> list[str]:
    return [
        what
        for what, pattern in PARTS.items()
        if not any(re.fullmatch(rf"{re.escape(what)}: {pattern}", line) for line in lines)
    ]


def test_each_part_tells_lines_of_a_log(
    small_pieces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(ticks, "_INTERVAL", 0.0)
    with caplog.at_level(logging.INFO, "xmlkernels"):
        work(tmp_path)
    assert {record.levelno for record in caplog.records} == {logging.INFO}
    lines = [record.getMessage() for record in caplog.records]
    assert missing(lines) == [], lines


def test_each_part_is_shown_on_a_terminal(
    small_pieces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticks, "_LIVELY", 0.0)
    with terminal(monkeypatch) as shown:
        work(tmp_path)
    assert missing(shown) == [], shown


def test_what_is_short_tells_nothing(
    small_pieces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(ticks, "_INTERVAL", 600.0)
    with caplog.at_level(logging.INFO, "xmlkernels"):
        prepare(PrepareConfig(output=tmp_path / "d", tables=Tables(data=write(tmp_path, "a.csv"))))
        train = Dataset.open(tmp_path / "d").splits["train"]
        knn.KNNBaseline(train.texts, train.labels).predict(train.texts, 3)
    assert not [record for record in caplog.records if "/s  " in record.getMessage()]
