"""Checked CSR matrices, their .npz files, and filter pairs."""

from __future__ import annotations

import os
import warnings
from array import array
from typing import Any

import numpy as np
import scipy.sparse
from scipy.sparse import csr_matrix

from xmlkernels.data.formats.arrays import open_members
from xmlkernels.data.formats.stored_matrix import checked, read_stored
from xmlkernels.errors import InputError
from xmlkernels.files import DataWarning, PathLike, at_line, open_bytes, quote, replacing

_LONGEST_PAIR = 4096  # characters of a line of filter pairs


def canonical_csr(
    matrix: Any, where: str, *, merge: bool = False, keep_zeros: bool = False
) -> csr_matrix:
    """Return the matrix as CSR float32 with sorted, unique indices and finite values.

    Stored zeros are removed unless kept.

    Args:
        matrix: scipy sparse matrix or array [rows, cols]; left as it is.
        where: what messages call it.
        merge: whether entries that occur twice are added rather than an error.
        keep_zeros: whether stored zeros stay: a score of 0 is not a missing one.

    Raises:
        InputError: not a sparse matrix of two dimensions, damaged, not finite, or with an entry
            twice.
    """
    if not scipy.sparse.issparse(matrix) or matrix.ndim != 2:
        raise InputError(
            where, "a scipy sparse matrix [rows, cols]", type(matrix).__name__, "convert it first"
        )
    if matrix.dtype.kind not in "biuf":
        raise InputError(where, "real numbers", f"dtype {matrix.dtype}", "convert it to float32")
    csr = csr_matrix(checked(matrix, where), copy=True)
    return _canonical(csr, where, merge=merge, keep_zeros=keep_zeros)


def _canonical(csr: csr_matrix, where: str, *, merge: bool, keep_zeros: bool) -> csr_matrix:
    """`canonical_csr` of a well-formed matrix that may be changed."""
    with np.errstate(over="ignore"):
        csr.data = csr.data.astype(np.float32, copy=False)
    bad = np.flatnonzero(~np.isfinite(csr.data))
    if bad.size:
        entry = _entry(csr, int(bad[0]))
        raise InputError(
            f"{where}, {entry}",
            "a finite float32 value",
            f"{csr.data[bad[0]]}",
            "mend or leave it out",
        )
    csr.sort_indices()
    if not csr.has_canonical_format and not merge:
        same = csr.indices[1:] == csr.indices[:-1]
        rows = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
        twice = np.flatnonzero(same & (rows[1:] == rows[:-1]))
        raise InputError(
            f"{where}, {_entry(csr, int(twice[0]))}",
            "one entry",
            "two",
            "merge them (sum_duplicates)",
        )
    csr.sum_duplicates()
    if not keep_zeros:
        csr.eliminate_zeros()
    return csr


def _entry(csr: csr_matrix, at: int) -> str:
    row = int(np.searchsorted(csr.indptr, at, side="right")) - 1
    return f"row {row}, column {csr.indices[at]}"


def check_shape(shape: tuple[int, int], rows: int | None, cols: int | None, where: str) -> None:
    """Raise InputError where the shape is not the one expected; None expects nothing."""
    for what, got, expected in (("rows", shape[0], rows), ("columns", shape[1], cols)):
        if expected is not None and got != expected:
            raise InputError(
                where, f"{expected} {what}", f"{got}", "name the file that belongs here"
            )


def read_npz(
    path: PathLike,
    *,
    rows: int | None = None,
    cols: int | None = None,
    merge_duplicates: bool = False,
    keep_zeros: bool = False,
) -> csr_matrix:
    """Read a matrix written by `scipy.sparse.save_npz` (`Y.trn.npz`), any sparse layout, no pickle.

    Dtypes, sizes, pointers and indices are checked on the arrays of the file, before
    scipy converts them and before anything larger than the file can hold is allocated.

    Args:
        path: the .npz file.
        rows, cols: the shape it must have.
        merge_duplicates: whether entries that occur twice are added rather than an error.
        keep_zeros: whether stored zeros stay, as they must in a file of scores.

    Returns:
        canonical CSR float32 [rows, cols].

    Raises:
        InputError: names the file, and row and column where one entry is at fault.
    """
    name, mend = os.fspath(path), "write it with scipy.sparse.save_npz"
    with open_members(path, mend) as members:
        matrix = read_stored(members, name, mend, rows=rows, cols=cols)
        return _canonical(csr_matrix(matrix), name, merge=merge_duplicates, keep_zeros=keep_zeros)


def write_npz(path: PathLike, matrix: Any, *, keep_zeros: bool = False) -> None:
    """Write a matrix as `scipy.sparse.save_npz` does; the file appears whole or not at all.

    Stored zeros are left out unless `keep_zeros`, for files of scores, where they are scores like
    others.

    Raises:
        InputError: a value is not finite, an entry occurs twice, or the folder cannot be written.
    """
    matrix = canonical_csr(matrix, f"the matrix for {os.fspath(path)}", keep_zeros=keep_zeros)
    with replacing(path) as file:
        scipy.sparse.save_npz(file, matrix)


def read_filter_pairs(
    path: PathLike, *, rows: int | None = None, labels: int | None = None
) -> np.ndarray:
    """Read `filter_labels_test.txt`: lines `row label`, no header; an empty file has no pairs.

    Predictions of these pairs are removed before ranking (a document that is also a label).

    Args:
        path: plain or packed.
        rows, labels: ids must be below these.

    Returns:
        int64 [n, 2], in the order of the file; blank lines are skipped.

    Raises:
        InputError: names file and line.
    """
    pairs = array("q")
    with open_bytes(path, may_be_empty=True) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_PAIR + 1), b""), 1):
            fields = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).split()
            if len(line) > _LONGEST_PAIR or (
                fields and (len(fields) != 2 or not all(field.isdigit() for field in fields))
            ):
                raise InputError(
                    at_line(path, number),
                    "`row label`, two ids from 0",
                    quote(line.strip()),
                    "mend the line",
                )
            for field, what, limit in zip(fields, ("row", "label"), (rows, labels), strict=False):
                if len(field) > 18 or (limit is not None and int(field) >= limit):
                    bound = (
                        "below 10^18"
                        if limit is None
                        else f"from 0 to {limit - 1}"
                        if limit
                        else "(there is none)"
                    )
                    mend = "name the file that belongs here"
                    raise InputError(at_line(path, number), f"a {what} {bound}", quote(field), mend)
            pairs.extend(map(int, fields))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def write_filter_pairs(path: PathLike, pairs: np.ndarray) -> None:
    """Write pairs [n, 2] as `row label` lines; the file appears whole or not at all.

    Raises:
        InputError: not whole numbers [n, 2], negative, or the folder cannot be written.
    """
    pairs = np.asarray(pairs)
    if (
        pairs.ndim != 2
        or pairs.shape[1] != 2
        or (pairs.size and (pairs.dtype.kind not in "iu" or pairs.min() < 0))
    ):
        got = f"{pairs.dtype} {list(pairs.shape)}" + (
            ", some negative" if pairs.dtype.kind == "i" else ""
        )
        raise InputError(
            f"the pairs for {os.fspath(path)}",
            "whole numbers from 0, shape [n, 2]",
            got,
            "convert them",
        )
    with replacing(path) as file:
        file.write("".join(f"{row} {label}\n" for row, label in pairs.tolist()).encode("ascii"))


def drop_unlabelled(labels: csr_matrix, *, keep: bool, name: str, told: bool = True) -> np.ndarray:
    """Return the rows to use, where some documents have no label.

    A warning says how many have none.

    Args:
        labels: CSR [rows, labels].
        keep: whether rows without a label stay (they teach what no label fits) or go.
        name: what messages call the split, such as its file.
        told: say which row is the first: where rows are those of a file.

    Returns:
        int64 [kept], ascending. Take the same rows of texts and tokens, and `select_pairs` of
        filter pairs.

    Raises:
        InputError: no row has a label.
    """
    labelled = np.flatnonzero(np.diff(labels.indptr)).astype(np.int64)
    rows = labels.shape[0]
    empty = rows - len(labelled)
    if not len(labelled):
        raise InputError(
            name, "documents with labels", f"{rows} without any", "check that it is the label file"
        )
    if empty:
        lost = int(np.setdiff1d(np.arange(rows), labelled, assume_unique=True)[0])
        what = "kept" if keep else "dropped"
        first = f" (first: row {lost})" if told else ""
        warnings.warn(
            f"{name}: {empty} of {rows} documents have no label{first}; {what}",
            DataWarning,
            2,
        )
    return np.arange(rows, dtype=np.int64) if keep else labelled


def select_pairs(pairs: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Renumber filter pairs [n, 2] to the rows (ascending) that `drop_unlabelled` kept.

    Pairs of dropped rows are removed.
    """
    at = np.searchsorted(kept, pairs[:, 0])
    held = at < len(kept)
    held[held] = kept[at[held]] == pairs[held, 0]
    return np.stack([at[held], pairs[held, 1]], axis=1).astype(np.int64)
