"""Read raw files of every layout into texts and label matrices of one shape, for `prepare`."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scipy.sparse import csr_matrix

from xmlkernels.data import corpus
from xmlkernels.data.formats import (
    Divider,
    Duplicates,
    LabelFormat,
    check_same_length,
    encode_label_strings,
    label_divider,
    open_token_maps,
    read_bow,
    read_filter_pairs,
    read_label_strings,
    read_lf_json,
    read_lines,
    read_raw_texts,
    read_sparse,
)
from xmlkernels.data.formats.labels import (
    cut_blank_end,
    filled_lines,
    read_label_files,
    same_width,
)
from xmlkernels.data.formats.matrices import check_shape
from xmlkernels.data.label_ids import check_width, remap_labels
from xmlkernels.data.raw import Files, Raw, RawSplit
from xmlkernels.errors import InputError
from xmlkernels.files import DataWarning

Source = Literal["text", "lf", "attentionxml", "bow", "docstrings"]
Fields = Literal["all", "title", "body"]
FLAGS = {"train": "train", "val": "validation", "test": "test"}
MAP_NAMES = {"train": "trn_doc", "val": "val_doc", "test": "tst_doc", "labels": "lbl"}


@dataclass(frozen=True)
class Reading:
    """How to read raw files.

    `num_labels` None: taken from the label texts, a header, or the largest label number.

    `separator` joins title and body; `remap_labels` gives the labels that documents have
    new numbers.
    """

    source: Source = "text"
    label_text: Path | None = None
    label_names: Path | None = None
    label_format: LabelFormat | None = None
    fields: Fields = "all"
    merge_duplicates: bool = False
    num_labels: int | None = None
    token_maps: Path | None = None
    max_length: int = 128
    label_divider: Divider | None = None
    remap_labels: bool = False
    separator: str = " "


def read_files(reading: Reading, files: Mapping[str, Files]) -> Raw:
    """Read the splits of `files` ("train", and "val" and "test" where they have files).

    Raises:
        InputError: names the file and line that cannot be read, or the two files that do not belong
            together.
    """
    kinds = {
        "text": _text_source,
        "lf": _lf_source,
        "attentionxml": _attentionxml_source,
        "bow": _bow_source,
    }
    raw = kinds[reading.source](reading, files)
    if reading.label_names is not None:
        raw.label_names = read_lines(reading.label_names)
        cut_blank_end(reading.label_names, raw.label_names, raw.num_labels)
        _one_per_label(reading.label_names, raw.label_names, raw.num_labels)
    for name, split in raw.splits.items():
        path = files[name].filter
        if path is not None:
            split.filter_pairs = read_filter_pairs(
                path, rows=split.labels.shape[0], labels=raw.num_labels
            )
    _tell_nameless(reading.label_names or reading.label_text, raw.label_names)
    path = files["train"].labels or files["train"].text
    if reading.remap_labels:
        remap_labels(raw)
    check_width(raw, os.fspath(path or "labels"))
    return raw


def read_docstrings(documents: int | None) -> Raw:
    """Read the built-in corpus; its label names are its label texts."""
    built = corpus.build_corpus(documents)
    splits = {
        name: RawSplit(list(texts), built.labels[name]) for name, texts in built.texts.items()
    }
    names = list(built.label_names)
    return Raw(
        splits,
        names,
        names,
        facts={
            "corpus_hash": built.hash,
            "corpus_versions": built.versions,
            "corpus_report": built.report,
        },
    )


def docstrings_digest() -> str:
    """sha256 over every file that the built-in corpus reads and over the rules that read them.

    About a second for some 200 MB, where building takes a minute: that is how a finished corpus is
    known again.
    """
    digest = hashlib.sha256(Path(corpus.__file__).read_bytes())
    for name, path in sorted(
        file for package in corpus.installed_packages() for file in corpus.files_of(package)
    ):
        digest.update(name.encode() + b"\0" + hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()


def _text_source(reading: Reading, files: Mapping[str, Files]) -> Raw:
    """Read one text per line and any label format.

    As the Extreme Classification Repository, Renee, DEXML and PECOS have it.
    """
    texts = {
        name: None if split.text is None else read_lines(split.text, documents=True)
        for name, split in files.items()
    }
    label_texts = (
        None if reading.label_text is None else read_lines(reading.label_text, documents=True)
    )
    if reading.label_text is not None and label_texts is not None and not label_texts[-1].strip():
        # A blank line at the end is a label only where something else says so.
        widths, _ = _label_files(reading, files, texts, reading.num_labels)
        cut_blank_end(reading.label_text, label_texts, next(iter(widths.values())).shape[1])
    count = _label_count(reading, None if label_texts is None else len(label_texts))
    labels, declared = _label_files(reading, files, texts, count)
    splits = {name: RawSplit(texts[name], labels[name]) for name in files}
    raw = Raw(splits, label_texts, label_texts, declared=declared)
    if reading.token_maps is not None:
        _add_maps(reading.token_maps, reading.max_length, raw)
    return raw


def _lf_source(reading: Reading, files: Mapping[str, Files]) -> Raw:
    """LF-* sets: JSON lines that hold texts and targets, labels in a file of the same kind."""
    label_texts = label_names = None
    if reading.label_text is not None:
        records = read_lf_json(reading.label_text)
        label_names, label_texts = records.title, _lf_texts(records, reading)
    count = _label_count(reading, None if label_texts is None else len(label_texts))
    splits = {}
    for name, split in files.items():
        records = read_lf_json(
            _needed(split.text, name, "text"),
            num_labels=count,
            merge_duplicates=reading.merge_duplicates,
        )
        splits[name] = RawSplit(_lf_texts(records, reading), records.labels)
    same_width({name: split.labels for name, split in splits.items()})
    return Raw(splits, label_names, label_texts, declared=count is not None, **_parts(reading))


def _lf_texts(records: Any, reading: Reading) -> list[str]:
    if reading.fields == "body":
        return list(records.content)
    return list(records.texts(content=reading.fields == "all", joiner=reading.separator))


def _parts(reading: Reading) -> dict[str, Any]:
    """Return how the parts of a text were joined, for the manifest.

    Texts to predict must be joined alike.
    """
    return {
        "separator": reading.separator,
        "facts": {"fields": reading.fields, "separator": reading.separator},
    }


def _attentionxml_source(reading: Reading, files: Mapping[str, Files]) -> Raw:
    """Read AttentionXML's and LightXML's sets: raw texts with /SEP/, labels as strings."""
    texts = {
        name: read_raw_texts(
            _needed(split.text, name, "text"), part=reading.fields, joiner=reading.separator
        )
        for name, split in files.items()
    }
    paths = {name: _needed(split.labels, name, "labels") for name, split in files.items()}
    divider = reading.label_divider or label_divider(list(paths.values()))
    merge: Literal["merge", "error"] = "merge" if reading.merge_duplicates else "error"
    rows = {
        name: read_label_strings(path, duplicates=merge, divider=divider)
        for name, path in paths.items()
    }
    for name, split in files.items():
        cut_blank_end(paths[name], rows[name], len(texts[name]))
        check_same_length(
            _needed(split.text, name, "text"), len(texts[name]), paths[name], len(rows[name])
        )
    others = [name for name in files if name != "train"]
    encoded = encode_label_strings(rows["train"], *(rows[name] for name in others))
    matrices = dict(zip(["train", *others], encoded.splits, strict=True))
    splits = {name: RawSplit(texts[name], matrices[name]) for name in files}
    raw = Raw(splits, encoded.names, encoded.names, declared=True, **_parts(reading))
    raw.facts["label_divider"] = divider
    return raw


def _bow_source(reading: Reading, files: Mapping[str, Files]) -> Raw:
    """Read bags of words: `train.txt` with its labels, or features and any label file."""
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
    declared = len(apart) < len(files)  # by a file that holds both
    if apart:
        rows = {name: range(features[name].shape[0]) for name in apart}
        found, by_labels = _label_files(reading, apart, rows, _label_count(reading, None))
        labels |= found
        declared = declared or by_labels
    same_width(labels)
    words = features["train"].shape[1]
    for name, matrix in features.items():
        check_shape(matrix.shape, None, words, os.fspath(_needed(files[name].text, name, "text")))
    splits = {name: RawSplit(None, labels[name], features=features[name]) for name in files}
    raw = Raw(splits, declared=declared)
    if reading.label_text is not None:
        raw.label_features = read_sparse(
            reading.label_text, rows=raw.num_labels, cols=words, duplicates=duplicates
        )
    return raw


def _label_files(
    reading: Reading,
    files: Mapping[str, Files],
    documents: Mapping[str, Sequence[str] | range | None],
    count: int | None,
) -> tuple[dict[str, csr_matrix], bool]:
    paths = {name: _needed(split.labels, name, "labels") for name, split in files.items()}
    texts = {name: split.text for name, split in files.items()}
    duplicates: Duplicates = "max" if reading.merge_duplicates else "error"
    return read_label_files(
        paths, documents, texts, count, format=reading.label_format, duplicates=duplicates
    )


def _label_count(reading: Reading, label_texts: int | None) -> int | None:
    """Return the declared number of labels, None where nothing declares it."""
    count = reading.num_labels
    if label_texts is not None:
        if count is not None and count != label_texts:
            raise InputError(
                str(reading.label_text),
                f"{count} label texts, as --num-labels says",
                str(label_texts),
                "mend one",
            )
        return label_texts
    if count is None and reading.label_names is not None:
        return filled_lines(read_lines(reading.label_names))
    return count


def _add_maps(folder: Path, max_length: int, raw: Raw) -> None:
    """Take token maps in place of texts; their row counts must be those of the labels."""
    for name, split in raw.splits.items():
        split.maps = open_token_maps(
            folder / MAP_NAMES[name], rows=split.labels.shape[0], max_length=max_length
        )
    if (folder / f"{MAP_NAMES['labels']}_input_ids.dat").exists():
        raw.label_maps = open_token_maps(
            folder / MAP_NAMES["labels"], rows=raw.num_labels, max_length=max_length
        )


def map_files(folder: Path, splits: Sequence[str]) -> list[Path]:
    """List the map files that `read_files` would open."""
    names = [MAP_NAMES[name] for name in splits]
    if (folder / f"{MAP_NAMES['labels']}_input_ids.dat").exists():
        names.append(MAP_NAMES["labels"])
    return [
        folder / f"{name}_{part}.dat" for name in names for part in ("input_ids", "attention_mask")
    ]


def _one_per_label(path: Path, names: Sequence[str], labels: int) -> None:
    if len(names) != labels:
        raise InputError(
            os.fspath(path), f"{labels} lines, one for each label", str(len(names)), "mend the file"
        )


def _tell_nameless(path: Path | None, names: Sequence[str] | None) -> None:
    blank = [number for number, name in enumerate(names or (), 1) if not name.strip()]
    if blank and path is not None:
        what = "1 label has" if len(blank) == 1 else f"{len(blank)} labels have"
        warnings.warn(
            f"{path}:{blank[0]}: {what} no name (the first: label {blank[0] - 1})",
            DataWarning,
            stacklevel=3,
        )


def _needed(path: Path | None, split: str, kind: str) -> Path:
    if path is None:
        raise InputError(
            f"{split} split", f"a file with {kind}", "none", f"name it with --{FLAGS[split]}-{kind}"
        )
    return path
