"""Raw files of every layout → texts and label matrices in one shape, as `prepare` wants them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.data import docstrings
from xmlkernels.data.formats import (
    Duplicates,
    LabelFormat,
    check_same_length,
    encode_label_strings,
    label_format,
    open_token_maps,
    read_bow,
    read_filter_pairs,
    read_label_strings,
    read_labels,
    read_lf_json,
    read_lines,
    read_raw_texts,
    read_sparse,
    select_pairs,
)
from xmlkernels.data.matrices import check_shape
from xmlkernels.errors import InputError

Source = Literal["text", "lf", "attentionxml", "bow", "docstrings"]
Fields = Literal["all", "title", "body"]
# Formats that say how many labels there are; the others only show the largest number used.
SELF_DESCRIBING = ("sparse", "bow", "npz")
FLAGS = {"train": "train", "val": "validation", "test": "test"}
MAP_NAMES = {"train": "trn_doc", "val": "val_doc", "test": "tst_doc", "labels": "lbl"}


@dataclass(frozen=True)
class Files:
    """The raw files of one split."""

    text: Path | None = None
    labels: Path | None = None
    filter: Path | None = None


@dataclass
class RawSplit:
    """N documents: texts, labels [N, L], filter pairs [n, 2].

    `features` [N, V] are the bags of words of a set without texts. `maps` are upstream's padded ids and masks [M, T] to
    take instead of texts: their rows `map_rows` [N], or all.
    """

    texts: list[str] | None
    labels: csr_matrix
    filter_pairs: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    maps: tuple[np.ndarray, np.ndarray] | None = None
    map_rows: np.ndarray | None = None
    features: csr_matrix | None = None

    def take(self, rows: np.ndarray) -> RawSplit:
        """The split of the given rows (ascending), its filter pairs renumbered."""
        texts = None if self.texts is None else [self.texts[row] for row in rows]
        map_rows = rows if self.map_rows is None else self.map_rows[rows]
        features = None if self.features is None else self.features[rows]
        return RawSplit(texts, self.labels[rows], select_pairs(self.filter_pairs, rows), self.maps, map_rows, features)


@dataclass
class Raw:
    """Everything read: the splits, and of the L labels their names and texts where there are any."""

    splits: dict[str, RawSplit]
    label_names: list[str] | None = None
    label_texts: list[str] | None = None
    label_maps: tuple[np.ndarray, np.ndarray] | None = None
    label_features: csr_matrix | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def num_labels(self) -> int:
        return int(self.splits["train"].labels.shape[1])

    @property
    def vocabulary(self) -> int | None:
        """V of bags of words; None for texts."""
        features = self.splits["train"].features
        return None if features is None else int(features.shape[1])


@dataclass(frozen=True)
class Reading:
    """How to read. `num_labels` None: taken from the label texts, a header, or the largest label number."""

    source: Source = "text"
    label_text: Path | None = None
    label_names: Path | None = None
    label_format: LabelFormat | None = None
    fields: Fields = "all"
    merge_duplicates: bool = False
    num_labels: int | None = None
    token_maps: Path | None = None
    max_length: int = 128


def read_files(reading: Reading, files: Mapping[str, Files]) -> Raw:
    """Read the splits of `files` ("train", and "val" and "test" where they have files).

    Raises:
        InputError: names the file and line that cannot be read, or the two files that do not belong together.
    """
    kinds = {"text": _text_source, "lf": _lf_source, "attentionxml": _attentionxml_source, "bow": _bow_source}
    raw = kinds[reading.source](reading, files)
    if reading.label_names is not None:
        raw.label_names = read_lines(reading.label_names)
        _one_per_label(reading.label_names, raw.label_names, raw.num_labels)
    for name, split in raw.splits.items():
        path = files[name].filter
        if path is not None:
            split.filter_pairs = read_filter_pairs(path, rows=split.labels.shape[0], labels=raw.num_labels)
    return raw


def read_docstrings(documents: int | None) -> Raw:
    """The built-in corpus; its label names are its label texts."""
    corpus = docstrings.build_corpus(documents)
    splits = {name: RawSplit(list(texts), corpus.labels[name]) for name, texts in corpus.texts.items()}
    names = list(corpus.label_names)
    return Raw(
        splits,
        names,
        names,
        facts={"corpus_hash": corpus.hash, "corpus_versions": corpus.versions, "corpus_report": corpus.report},
    )


def docstrings_digest() -> str:
    """sha256 over every file that the built-in corpus reads and over the rules that read them.

    About a second for some 200 MB, where building takes a minute: that is how a finished corpus is known again.
    """
    digest = hashlib.sha256(Path(docstrings.__file__).read_bytes())
    for name, path in sorted(file for package in docstrings.PACKAGES for file in docstrings._files(package)):
        digest.update(name.encode() + b"\0" + hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()


def _text_source(reading: Reading, files: Mapping[str, Files]) -> Raw:
    """A text a line beside any label format: the Extreme Classification Repository, Renee, DEXML, PECOS."""
    texts = {name: None if split.text is None else read_lines(split.text, documents=True) for name, split in files.items()}
    label_texts = None if reading.label_text is None else read_lines(reading.label_text, documents=True)
    count = _label_count(reading, None if label_texts is None else len(label_texts))
    labels = _label_files(reading, files, {name: None if t is None else len(t) for name, t in texts.items()}, count)
    raw = Raw({name: RawSplit(texts[name], labels[name]) for name in files}, label_texts, label_texts)
    if reading.token_maps is not None:
        _add_maps(reading.token_maps, reading.max_length, raw)
    return raw


def _lf_source(reading: Reading, files: Mapping[str, Files]) -> Raw:
    """LF-* sets: JSON lines that hold texts and targets, labels in a file of the same kind."""
    label_texts = label_names = None
    if reading.label_text is not None:
        records = read_lf_json(reading.label_text)
        label_names, label_texts = records.title, _lf_texts(records, reading.fields)
    count = _label_count(reading, None if label_texts is None else len(label_texts))
    splits = {}
    for name, split in files.items():
        records = read_lf_json(_needed(split.text, name, "text"), num_labels=count, merge_duplicates=reading.merge_duplicates)
        splits[name] = RawSplit(_lf_texts(records, reading.fields), records.labels)
    _same_width({name: split.labels for name, split in splits.items()})
    return Raw(splits, label_names, label_texts)


def _lf_texts(records: Any, fields: Fields) -> list[str]:
    return list(records.content) if fields == "body" else records.texts(content=fields == "all")


def _attentionxml_source(reading: Reading, files: Mapping[str, Files]) -> Raw:
    """AttentionXML's and LightXML's sets: raw texts with /SEP/, labels as strings that are numbered here."""
    texts = {name: read_raw_texts(_needed(split.text, name, "text"), part=reading.fields) for name, split in files.items()}
    rows = {
        name: read_label_strings(
            _needed(split.labels, name, "labels"), duplicates="merge" if reading.merge_duplicates else "error"
        )
        for name, split in files.items()
    }
    for name, split in files.items():
        check_same_length(
            _needed(split.text, name, "text"), len(texts[name]), _needed(split.labels, name, "labels"), len(rows[name])
        )
    others = [name for name in files if name != "train"]
    encoded = encode_label_strings(rows["train"], *(rows[name] for name in others))
    matrices = dict(zip(["train", *others], encoded.splits, strict=True))
    return Raw({name: RawSplit(texts[name], matrices[name]) for name in files}, encoded.names, encoded.names)


def _bow_source(reading: Reading, files: Mapping[str, Files]) -> Raw:
    """Bags of words: `train.txt`, which holds its labels, or features (`trn_X_Xf.txt`) beside any label file."""
    duplicates: Duplicates = "max" if reading.merge_duplicates else "error"
    features, labels = {}, {}
    for name, split in files.items():
        path = _needed(split.text, name, "text")
        if split.labels is None:
            features[name], labels[name] = read_bow(path, duplicates=duplicates)
            check_shape(labels[name].shape, None, reading.num_labels, os.fspath(path))
        else:
            features[name] = read_sparse(path, duplicates=duplicates)
    apart = {name: split for name, split in files.items() if split.labels is not None}
    if apart:
        rows: dict[str, int | None] = {name: features[name].shape[0] for name in apart}
        labels |= _label_files(reading, apart, rows, _label_count(reading, None))
    _same_width(labels)
    words = features["train"].shape[1]
    for name, matrix in features.items():
        check_shape(matrix.shape, None, words, os.fspath(_needed(files[name].text, name, "text")))
    raw = Raw({name: RawSplit(None, labels[name], features=features[name]) for name in files})
    if reading.label_text is not None:
        raw.label_features = read_sparse(reading.label_text, rows=raw.num_labels, cols=words, duplicates=duplicates)
    return raw


def _label_count(reading: Reading, label_texts: int | None) -> int | None:
    """The declared number of labels, None where nothing declares it."""
    count = reading.num_labels
    if label_texts is not None:
        if count is not None and count != label_texts:
            raise InputError(str(reading.label_text), f"{count} label texts (num_labels)", str(label_texts), "mend one")
        return label_texts
    if count is None and reading.label_names is not None:
        return len(read_lines(reading.label_names))
    return count


def _label_files(
    reading: Reading, files: Mapping[str, Files], rows: Mapping[str, int | None], count: int | None
) -> dict[str, csr_matrix]:
    """Label matrices of one width. A self-describing file is read first: it tells the others how many labels exist."""
    paths = {name: _needed(split.labels, name, "labels") for name, split in files.items()}
    kinds = {name: reading.label_format or label_format(path, rows[name]) for name, path in paths.items()}
    found = {}
    for name in sorted(paths, key=lambda name: kinds[name] not in SELF_DESCRIBING):
        matrix = read_labels(
            paths[name], None, count, format=kinds[name], duplicates="max" if reading.merge_duplicates else "error"
        )
        known, text = rows[name], files[name].text
        if known is not None and text is not None:
            check_same_length(text, known, paths[name], matrix.shape[0])
        if count is None and kinds[name] in SELF_DESCRIBING:
            count = matrix.shape[1]
        found[name] = matrix
    if count is None:
        _same_width(found)
    return {name: found[name] for name in files}


def _same_width(matrices: Mapping[str, csr_matrix]) -> None:
    width = max(matrix.shape[1] for matrix in matrices.values())
    for matrix in matrices.values():
        matrix.resize((matrix.shape[0], width))


def _add_maps(folder: Path, max_length: int, raw: Raw) -> None:
    """Upstream's tokenised caches in place of texts. Their row counts must be those of the labels."""
    for name, split in raw.splits.items():
        split.maps = open_token_maps(folder / MAP_NAMES[name], rows=split.labels.shape[0], max_length=max_length)
    if (folder / f"{MAP_NAMES['labels']}_input_ids.dat").exists():
        raw.label_maps = open_token_maps(folder / MAP_NAMES["labels"], rows=raw.num_labels, max_length=max_length)


def map_files(folder: Path, splits: Sequence[str]) -> list[Path]:
    """The map files that `read_files` would open."""
    names = [MAP_NAMES[name] for name in splits]
    if (folder / f"{MAP_NAMES['labels']}_input_ids.dat").exists():
        names.append(MAP_NAMES["labels"])
    return [folder / f"{name}_{part}.dat" for name in names for part in ("input_ids", "attention_mask")]


def _one_per_label(path: Path, names: Sequence[str], labels: int) -> None:
    if len(names) != labels:
        raise InputError(os.fspath(path), f"{labels} lines, one for each label", str(len(names)), "mend the file")


def _needed(path: Path | None, split: str, kind: str) -> Path:
    if path is None:
        raise InputError(f"{split} split", f"a file with {kind}", "none", f"name it with --{FLAGS[split]}-{kind}")
    return path
