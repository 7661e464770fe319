"""Make a dataset folder of texts or bags of words, and labels, that are in memory.

The files are those that `prepare` writes; what says where a label comes from differs alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy.sparse import csr_matrix, issparse

from xmlkernels.data import manifest, token_store
from xmlkernels.data.dataset_writer import make_once, write_folder
from xmlkernels.data.formats.matrices import canonical_csr
from xmlkernels.data.formats.text_lines import encode_label_strings
from xmlkernels.data.label_ids import check_width
from xmlkernels.data.raw import Raw, RawSplit, choose_rows
from xmlkernels.data.tokens import Tokenizer, load_tokenizer
from xmlkernels.errors import InputError
from xmlkernels.locks import check_place

Names = Sequence[Sequence[str]]
Ids = Sequence[Sequence[int]]
Documents = tuple[Sequence[str] | csr_matrix, Names | Ids | csr_matrix]
T = TypeVar("T")


@dataclass(frozen=True)
class Memory:
    """Texts and labels of the splits, and how they become a dataset.

    Attributes:
        splits: "train", and "val" and "test" where there are any: texts, or bags of words as a
            sparse matrix [N, V], and labels: a list for each, or a sparse matrix [N, L].
        tokenizer: a name, a folder or a loaded tokenizer; None keeps the texts alone.
        label_names: names of the labels in the order of their ids; None takes those of the rows.
        num_labels: of ids without names; None is one more than the largest.
    """

    splits: Mapping[str, Documents]
    tokenizer: str | Path | Tokenizer | None
    label_names: Sequence[str] | None
    num_labels: int | None
    max_length: int
    validation_share: float
    seed: int
    propensity: tuple[float, float]
    keep_texts: bool


def write(folder: Path, memory: Memory, *, opened: Callable[[], T], overwrite: bool) -> T:
    """Write the folder, unless it holds just this; return what `opened` makes of it.

    Raises:
        InputError: texts or labels that cannot be used, or `folder` holds something else.
    """
    _check(memory)
    check_place(folder, "folder")
    raw = read(memory)
    name, tokenizer = memory.tokenizer, None
    if name is not None:
        tokenizer = name if isinstance(name, Tokenizer) else load_tokenizer(name)
    key = _key(folder, memory, raw, tokenizer)

    def make(output: Path) -> None:
        choose_rows(raw, drop=(), validation_share=memory.validation_share, seed=memory.seed)
        write_folder(
            output,
            raw,
            tokenizer,
            name=folder.resolve().name,
            key=key,
            max_length=memory.max_length,
            keep_texts=memory.keep_texts,
            propensity=memory.propensity,
            tokenizer_name="memory" if isinstance(name, Tokenizer) else str(name),
            source={"kind": "memory", "seed": memory.seed},
            overwrite=overwrite,
        )

    return make_once(folder, key, opened, make, overwrite=overwrite, flag="folder")[0]


def read(memory: Memory) -> Raw:
    """Check texts and labels, and number the labels."""
    given = None if memory.label_names is None else list(memory.label_names)
    if given is not None:
        _check_names(given)
    bags = {name for name, split in memory.splits.items() if issparse(split[0])}
    if bags and (len(bags) < len(memory.splits) or memory.tokenizer is not None):
        got = "both kinds" if len(bags) < len(memory.splits) else "bags of words and a tokenizer"
        raise InputError("documents", "texts alone, or bags of words alone", got, "give one kind")
    texts: dict[str, Any] = {
        name: _bags(name, split[0]) if bags else _texts(name, split[0])
        for name, split in memory.splits.items()
    }
    sizes = {name: found.shape[0] if bags else len(found) for name, found in texts.items()}
    names, labels = _labels(memory, sizes, given)
    splits = {
        name: RawSplit(None if bags else found, labels[name], features=found if bags else None)
        for name, found in texts.items()
    }
    raw = Raw(
        splits,
        names,
        None if bags else names,
        declared=bool(names)
        or memory.num_labels is not None
        or issparse(memory.splits["train"][1]),
    )
    check_width(raw, "labels")
    return raw


def _labels(
    memory: Memory, sizes: Mapping[str, int], given: list[str] | None
) -> tuple[list[str] | None, dict[str, csr_matrix]]:
    """Return the names of the labels, where there are any, and the label matrix of each split."""
    if any(issparse(split[1]) for split in memory.splits.values()):
        return given, {
            name: _label_matrix(name, split[1], sizes[name], memory, given)
            for name, split in memory.splits.items()
        }
    rows: dict[str, Any] = {
        name: _rows(name, split[1], sizes[name]) for name, split in memory.splits.items()
    }
    kinds = {type(label) for split in rows.values() for row in split for label in row}
    if len(kinds) > 1:
        got = "both in the lists"
        raise InputError("labels", "names alone, or ids alone", got, "write one kind")
    if str in kinds:
        return _by_name(rows, given)
    return given, _by_id(rows, given, memory.num_labels)


def _bags(split: str, matrix: Any) -> csr_matrix:
    found = canonical_csr(matrix, f"{split} documents")
    if not found.shape[0]:
        raise InputError(f"{split} documents", "one row or more", "none", "leave the split out")
    return found


def _label_matrix(
    split: str, matrix: Any, documents: int, memory: Memory, names: list[str] | None
) -> csr_matrix:
    """Return a sparse matrix of labels as CSR float32 [documents, L] of ones."""
    where, columns = f"{split} labels", memory.num_labels if names is None else len(names)
    found = canonical_csr(matrix, where)
    first: Any = memory.splits["train"][1]
    wanted = (documents, columns or first.shape[1])
    if found.shape != wanted:
        expected = f"{wanted[0]} documents and {wanted[1]} labels"
        got = f"{found.shape[0]} and {found.shape[1]}"
        raise InputError(where, expected, got, "give one row per document, one column per label")
    found.data[:] = 1
    return found


def _check(memory: Memory) -> None:
    a, b = memory.propensity
    rules = [
        (memory.max_length >= 1, "max_length", "at least 1", memory.max_length),
        (0 <= memory.validation_share < 1, "validation_share", "0 or a share below 1",
         memory.validation_share),
        (not memory.validation_share or "val" not in memory.splits, "validation_share",
         "0 beside a validation split", memory.validation_share),
        (0 <= memory.seed < 2**64, "seed", "an integer from 0 to 2**64 - 1", memory.seed),
        (a > 0 and b > 0, "propensity", "positive constants A and B", memory.propensity),
        (memory.num_labels is None or memory.num_labels > 0, "num_labels", "at least 1",
         memory.num_labels),
    ]  # fmt: skip
    for good, where, expected, got in rules:
        if not good:
            raise InputError(where, expected, str(got), "correct it")


def _texts(split: str, texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise InputError(f"{split} texts", "a list of strings", "one string", "put it in a list")
    found = list(texts)
    for row, text in enumerate(found):
        if not isinstance(text, str):
            got = f"{type(text).__name__}"
            raise InputError(f"{split} texts, document {row}", "a string", got, "convert it first")
    if not found:
        raise InputError(f"{split} texts", "one text or more", "none", "leave the split out")
    return found


def _rows(split: str, rows: Names | Ids, documents: int) -> list[list[str]] | list[list[int]]:
    """Return the labels of each document as plain strings or ints."""
    if len(rows) != documents:
        got = f"{len(rows)} lists for {documents} texts"
        raise InputError(f"{split} labels", "a list of labels for each text", got, "add the rest")
    found: list[Any] = []
    for row, labels in enumerate(rows):
        where = f"{split} labels, document {row}"
        if isinstance(labels, str):
            got = f"the string {labels[:40]!r}"
            raise InputError(where, "a list of labels", got, f"write [{labels[:40]!r}]")
        found.append([_label(label, where) for label in labels])
    return found


def _label(label: Any, where: str) -> str | int:
    if isinstance(label, str):
        return str(label)
    try:
        if isinstance(label, bool | np.bool_):
            raise TypeError
        return index(label)
    except TypeError:
        got = f"{label!r} ({type(label).__name__})"
        raise InputError(where, "names (strings) or ids (integers)", got, "convert them") from None


def _check_names(names: Sequence[str]) -> None:
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise InputError("label_names", "strings", repr(wrong[0]), "convert them first")
    if len(set(names)) < len(names):
        twice = sorted(name for name in set(names) if names.count(name) > 1)
        raise InputError("label_names", "each name once", f"{twice[0]!r} twice", "leave one out")


def _by_name(rows: Mapping[str, Any], given: list[str] | None) -> tuple[list[str], dict[str, Any]]:
    """Names and label matrices of rows of names; without given names they are numbered sorted."""
    if given is None:
        others = [name for name in rows if name != "train"]
        encoded = encode_label_strings(rows["train"], *(rows[name] for name in others))
        return list(encoded.names), dict(zip(["train", *others], encoded.splits, strict=True))
    ids = {name: number for number, name in enumerate(given)}
    for split, names in rows.items():
        for row, own in enumerate(names):
            if unknown := [name for name in own if name not in ids]:
                where = f"{split} labels, document {row}"
                raise InputError(where, "names among label_names", repr(unknown[0]), "add it there")
    numbered = {name: [[ids[x] for x in own] for own in rows[name]] for name in rows}
    return given, _matrices(numbered, len(given))


def _by_id(
    rows: Mapping[str, Any], names: list[str] | None, num_labels: int | None
) -> dict[str, csr_matrix]:
    """Label matrices of rows of ids."""
    if names is not None and num_labels not in (None, len(names)):
        got = f"{num_labels} beside {len(names)} label_names"
        raise InputError("num_labels", "the number of names", got, "leave num_labels out")
    known = num_labels if names is None else len(names)
    largest = max((label for split in rows.values() for row in split for label in row), default=0)
    labels = max(0, largest) + 1 if known is None else known
    for split, own in rows.items():
        for number, row in enumerate(own):
            if bad := [label for label in row if not 0 <= label < labels]:
                where = f"{split} labels, document {number}"
                mend = "ids count from 0; num_labels or label_names say how many there are"
                raise InputError(where, f"ids from 0 to {labels - 1}", str(bad[0]), mend)
    return _matrices(rows, labels)


def _matrices(rows: Mapping[str, Any], labels: int) -> dict[str, csr_matrix]:
    """CSR float32 [documents, labels] of each split; an id twice in a row counts once."""
    found = {}
    for name, split in rows.items():
        unique = [sorted(set(row)) for row in split]
        indptr = np.zeros(len(unique) + 1, np.int64)
        np.cumsum([len(row) for row in unique], out=indptr[1:])
        columns = np.fromiter((x for row in unique for x in row), np.int64, int(indptr[-1]))
        values = np.ones(len(columns), np.float32)
        found[name] = csr_matrix((values, columns, indptr), shape=(len(unique), labels))
    return found


def _key(folder: Path, memory: Memory, raw: Raw, tokenizer: Tokenizer | None) -> str:
    """sha256 over texts, labels, tokenizer and settings."""
    settings = [
        folder.resolve().name, memory.max_length, memory.validation_share, memory.seed,
        memory.propensity, memory.keep_texts, raw.label_names, raw.num_labels,
        tokenizer and tokenizer.hash, manifest.FORMAT_VERSION, token_store.FORMAT_VERSION,
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, split in raw.splits.items():
        digest.update(os.fsencode(name))
        for text in split.texts or ():
            digest.update(json.dumps(text).encode())
        for array in (split.labels.indptr, split.labels.indices):
            digest.update(np.ascontiguousarray(array, np.int64).tobytes())
        if split.features is not None:
            digest.update(np.int64(split.features.shape[1]).tobytes())
            for array in (split.features.indptr, split.features.indices, split.features.data):
                digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
