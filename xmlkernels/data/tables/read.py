"""Read own tables into texts and label matrices, for `prepare`."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.data.layouts import read_files
from xmlkernels.data.raw import Raw, RawSplit
from xmlkernels.data.tables.cells import find_divider, labels_of, text_of
from xmlkernels.data.tables.columns import Chosen, choose
from xmlkernels.data.tables.corpora import annif_documents, is_annif_folder
from xmlkernels.data.tables.label_files import read_label_file
from xmlkernels.data.tables.options import Tables
from xmlkernels.data.tables.readers import BY_SUFFIX, Table, open_one
from xmlkernels.data.tables.repository import repository_files
from xmlkernels.data.tables.streams import NAMES, located, parts_of, split_of
from xmlkernels.errors import InputError
from xmlkernels.files import share_read
from xmlkernels.terms import PART
from xmlkernels.ticks import Ticks

log = logging.getLogger(__name__)

_LOOKED_AT = 1000  # rows in which a divider of labels is looked for


@dataclass
class _Rows:
    """Documents of one split: texts, and numbers of labels one behind the other."""

    texts: list[str] = field(default_factory=list)
    labels: array[int] = field(default_factory=lambda: array("q"))
    ends: array[int] = field(default_factory=lambda: array("q", [0]))

    def add(self, text: str, labels: Sequence[int]) -> None:
        self.texts.append(text)
        self.labels.extend(labels)
        self.ends.append(len(self.labels))


@dataclass
class _Reading:
    """What was read so far.

    Attributes:
        numbers: label → number in the order in which they came.
        splits: documents by split.
        told: sentences for the owner of the data.
        facts: for the manifest.
    """

    numbers: dict[str, int] = field(default_factory=dict)
    splits: dict[str, _Rows] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, split: str, text: str, labels: Sequence[str]) -> None:
        numbers = self.numbers
        own = {numbers.setdefault(label, len(numbers)) for label in labels}
        self.splits.setdefault(split, _Rows()).add(text, sorted(own))

    def say(self, line: str) -> None:
        if line not in self.told:
            self.told.append(line)


def files_of(tables: Tables) -> dict[str, list[Path]]:
    """List the files of each split; those of a folder by the beginnings of their names.

    Raises:
        InputError: a file that is not there, or a folder without tables.
    """
    given = {"train": tables.data, "val": tables.validation, "test": tables.test}
    found: dict[str, list[Path]] = {}
    places = {split: located(path) for split, path in given.items() if path is not None}
    for split, path in places.items():
        if not path.is_dir() or is_annif_folder(path):
            found[split] = [path]
            continue
        parts = parts_of(path, tuple(BY_SUFFIX))
        named = {part: split_of(part) for part in parts}
        if split == "train" and "train" in named.values():
            for part in parts:
                found.setdefault(named[part] or "train", []).append(part)
        else:
            found[split] = parts
    return found


def inputs_of(tables: Tables) -> list[Path]:
    """List every file that the tables are made of, the label file included; see `files_of`."""
    assert tables.data is not None
    known = repository_files(tables.data) if tables.data.is_dir() else None
    if known is not None:
        reading, files = known
        named = [path for part in files.values() for path in (part.text, part.labels, part.filter)]
        found = [path for path in (*named, reading.label_text) if path is not None]
    else:
        groups = files_of(tables).values()
        found = [inner for paths in groups for path in paths for inner in _inside(path)]
    return found if tables.label_file is None else [*found, located(tables.label_file)]


def _inside(path: Path) -> list[Path]:
    return sorted(inner for inner in path.iterdir() if inner.is_file()) if path.is_dir() else [path]


def read_tables(tables: Tables) -> tuple[Raw, list[str]]:
    """Read the tables, or a folder of the field's usual files.

    Returns:
        What was read, and sentences that say how.

    Raises:
        InputError: names the file and the line or row that cannot be read.
    """
    assert tables.data is not None
    if tables.data.is_dir() and (known := repository_files(tables.data)) is not None:
        names = [path.name for path in inputs_of(tables)]
        return read_files(*known), [f"{tables.data}: {', '.join(names)}"]
    reading = _Reading()
    chosen: Chosen | None = None
    for split, paths in files_of(tables).items():
        for path in paths:
            if path.is_dir():
                _read_folder(reading, split, path, tables)
            else:
                chosen = _read_file(reading, split, path, tables, chosen)
    _check(reading, tables)
    if chosen is not None:
        reading.facts |= {"columns": list(chosen.text), "label_columns": list(chosen.labels)}
        if len(chosen.text) > 1:
            # Texts to predict are joined alike.
            reading.facts |= {"fields": "all", "separator": tables.text_separator}
            reading.facts |= {"parts": list(chosen.text)} if tables.text_parts else {}
    return _raw(reading, tables), reading.told


def _read_folder(reading: _Reading, split: str, folder: Path, tables: Tables) -> None:
    documents = annif_documents(folder, tables.encoding, repair=tables.repair_encoding)
    count = sum(1 for _ in folder.glob("*.txt"))
    for _, text, subjects in Ticks(log, folder.name, count, "documents").over(documents):
        reading.add(split, text, subjects)
    reading.say(f"{folder}: a corpus of Annif, a text file for each document")


def _read_file(
    reading: _Reading, split: str, path: Path, tables: Tables, before: Chosen | None
) -> Chosen:
    table = open_one(path, tables)
    if not table.columns:
        raise InputError(str(path), "rows of texts and labels", "none", "name another file")
    chosen = before
    if chosen is None or not set(chosen.all) <= set(table.columns):
        chosen = choose(table.columns, tables, str(path))
        if before is not None:
            expected = f"the columns {', '.join(before.all)}, as the first file has"
            got = ", ".join(table.columns)
            mend = "give files of one kind, or name --text and --labels"
            raise InputError(str(path), expected, got, mend)
        if tables.text_parts and len(chosen.text) == 1:
            got, mend = f"the column {chosen.text[0]}", "name several with --text, or leave it out"
            raise InputError("--text-parts", "several columns of the text", got, mend)
        _tell_columns(reading, table, chosen)
    divider = tables.label_separator
    if divider is None:
        divider = reading.facts.get("label_separator")
    if divider is None and "label_separator" not in reading.facts:
        divider = _divider(reading, table, chosen)
    unlabelled: list[str] = []
    for split_name, text, labels in _documents(table, chosen, tables, divider, unlabelled):
        reading.add(split_name or split, text, labels)
    if unlabelled:
        reading.say(f"the first document without a label: {unlabelled[0]}")
    return chosen


def _divider(reading: _Reading, table: Table, chosen: Chosen) -> str | None:
    rows = islice(table.rows(chosen.labels), _LOOKED_AT)
    found = find_divider(value for _, values in rows for value in values)
    reading.facts["label_separator"] = found
    if found is not None:
        shown = "spaces" if found == " " else repr(found)
        reading.say(f"labels of a cell: divided by {shown} (--label-separator says another)")
    return found


def _documents(
    table: Table, chosen: Chosen, tables: Tables, divider: str | None, unlabelled: list[str]
) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the split that a row names ("" for none), its text and its labels.

    `unlabelled` receives the place of the first row without a label.
    """
    texts, apart, joiner = len(chosen.text), tables.text_parts, tables.text_separator
    end = texts + len(chosen.labels)
    path = table.path
    ticks = Ticks(log, path.name, table.total, "rows", share=lambda: share_read(path))
    for row, values in ticks.over(table.rows(chosen.all)):
        where = table.place(row)
        parts = [text_of(v, where, c) for v, c in zip(values, chosen.text, strict=False)]
        labels: list[str] = []
        for value, column in zip(values[texts:end], chosen.labels, strict=True):
            labels += labels_of(value, divider, where, column)
        if not labels and not unlabelled:
            unlabelled.append(where)
        split = _named_split(values[-1], where, chosen.split) if chosen.split else ""
        if apart and any(parts):  # an empty one keeps its place
            text = PART.join(part.replace(PART, " ") for part in parts)
        else:
            text = parts[0] if texts == 1 else joiner.join(filter(None, parts))
        yield split, text, labels


def _named_split(value: Any, where: str, column: str) -> str:
    found = NAMES.get(str(value).strip().lower())
    if found is None:
        expected = f"train, validation or test in column {column!r}"
        raise InputError(where, expected, repr(value), "correct it, or name another column")
    return found


def _tell_columns(reading: _Reading, table: Table, chosen: Chosen) -> None:
    others = [name for name in table.columns if name not in chosen.all]
    line = f"text: {' + '.join(chosen.text)}; labels: {' + '.join(chosen.labels)}"
    if chosen.found and table.kind not in ("fasttext", "annif"):
        line += " (by their names; --text and --labels name others)"
    reading.say(line + (f"; not read: {', '.join(others[:8])}" if others else ""))
    near = [name for name in others if name.strip().lower() in ("split", "fold", "subset")]
    if near and not chosen.split:
        reading.say(
            f"note: the column {near[0]} is not used; --split-column {near[0]} splits by it"
        )


def _check(reading: _Reading, tables: Tables) -> None:
    rows = {split: len(part.texts) for split, part in reading.splits.items()}
    where = str(tables.data)
    if not rows.get("train"):
        got = "none" if not rows else f"none, but {', '.join(f'{n} {s}' for s, n in rows.items())}"
        raise InputError(where, "training documents", got, "give a table that holds some")
    if not reading.splits["train"].labels:
        mend = "name the columns of the labels with --labels"
        got = f"no label in {rows['train']:,} documents"
        raise InputError(where, "documents with labels", got, mend)
    for split in reading.splits:
        if split != "train" and not reading.splits[split].labels:
            mend = "name a table that has some"
            raise InputError(f"the {split} split", "documents with labels", "no label", mend)


def _raw(reading: _Reading, tables: Tables) -> Raw:
    """Give the labels numbers in the order of their keys; ids are ordered by their size."""
    keys = list(reading.numbers)
    names: Mapping[str, str] = {}
    texts: Mapping[str, str] = {}
    if tables.label_file is not None:
        known = read_label_file(tables)
        names, texts = known.names, known.texts
        _tell_named(reading, tables, keys, names)
        if tables.all_labels:
            keys += [key for key in names if key not in reading.numbers]
    ids = all(key.isdecimal() and key.isascii() for key in keys)
    keys.sort(key=lambda key: (int(key), key) if ids else (0, key))
    position = {key: place for place, key in enumerate(keys)}
    new = np.array([position[key] for key in reading.numbers], np.int64)
    splits = {
        name: RawSplit(part.texts, _matrix(part, new, len(keys)))
        for name in ("train", "val", "test")
        if (part := reading.splits.get(name)) is not None
    }
    shown = _distinct(keys, names)
    described = [texts.get(key, name) for key, name in zip(keys, shown, strict=True)]
    given = keys if tables.label_file is not None else None
    return Raw(splits, shown, described, given, declared=True, facts=reading.facts)


def _matrix(part: _Rows, new: np.ndarray, labels: int) -> csr_matrix:
    """Return CSR fp32 [documents, labels] with the labels' new numbers, ascending in each row."""
    columns = new[np.frombuffer(part.labels, np.int64)] if part.labels else np.zeros(0, np.int64)
    ends = np.frombuffer(part.ends, np.int64)
    values = np.ones(len(columns), np.float32)
    matrix = csr_matrix((values, columns, ends.copy()), shape=(len(part.texts), labels))
    matrix.sort_indices()
    return matrix


def _distinct(keys: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Return a name for each label; where two share one, their keys tell them apart."""
    shown = [names.get(key) or key for key in keys]
    seen: dict[str, int] = {}
    for name in shown:
        seen[name] = seen.get(name, 0) + 1
    return [
        f"{name} ({key})" if seen[name] > 1 and name != key else name
        for key, name in zip(keys, shown, strict=True)
    ]


def _tell_named(
    reading: _Reading, tables: Tables, keys: Sequence[str], names: Mapping[str, str]
) -> None:
    found = sum(key in names for key in keys)
    if not found:
        expected = "names of the labels that documents have"
        got = f"{min(names)!r} and others, where documents have {keys[0]!r} and others"
        mend = "check that both belong together"
        raise InputError(str(tables.label_file), expected, got, mend)
    reading.say(f"labels: {found:,} of {len(keys):,} have a name in {tables.label_file}")
