"""What a scikit-learn user gives: texts or features, and labels of three kinds, as matrices.

Letters: N documents, V columns of features, L labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_matrix, issparse, vstack
from sklearn.exceptions import DataConversionWarning
from sklearn.utils.multiclass import check_classification_targets

from xmlkernels.errors import InputError

Kind = Literal["lists", "matrix", "single"]
LISTS: Kind = "lists"
MATRIX: Kind = "matrix"
SINGLE: Kind = "single"
_ROW = (list, tuple, np.ndarray, np.generic, int, float)  # of a feature matrix that is a list


@dataclass(frozen=True)
class Targets:
    """Labels of N documents.

    Attributes:
        kind: names in a list for each; a matrix [N, L]; or one class for each.
        labels: lists of strings, CSR [N, L], or an array [N].
    """

    kind: Kind
    labels: Any


def is_texts(documents: Any) -> bool:
    """Return whether these are texts: a list, tuple, array or series of strings.

    Raises:
        InputError: a single text, or texts with something else between them.
    """
    if isinstance(documents, str | bytes):
        got, mend = repr(documents[:40]), "write [text] for a single one"
        raise InputError("X", "a list of texts, or a feature matrix", got, mend)
    if issparse(documents):
        return False
    if isinstance(documents, list | tuple):
        other = next((x for x in enumerate(documents) if not isinstance(x[1], str)), None)
        if other is not None and (other[0] or not isinstance(other[1], _ROW)):
            place, got = f"X: document {other[0]}", type(other[1]).__name__
            raise InputError(place, "a text", got, "convert it, or leave the document out")
        return bool(documents) and other is None
    if getattr(documents, "ndim", 0) != 1 or not len(documents):
        return False
    return all(isinstance(text, str) for text in documents)


def count(documents: Any) -> int:
    """Return N."""
    return int(documents.shape[0]) if issparse(documents) else len(documents)


def joined(parts: Sequence[Any]) -> Any:
    """Return documents of several calls as one list or one matrix."""
    if len(parts) == 1:
        return parts[0]
    if issparse(parts[0]):
        return csr_matrix(vstack(parts, "csr"))
    return [text for part in parts for text in part]


def read_targets(y: Any, documents: int) -> Targets:
    """Tell the three kinds of labels apart.

    Raises:
        InputError: no labels, another number of them than of documents, or of no known kind.
    """
    if y is None:
        # The words that scikit-learn's own checks look for.
        expected = "labels: XMLClassifier requires y to be passed, but the target y is None"
        raise InputError("y", expected, "None", "give labels")
    found: Targets
    if issparse(y):
        found = Targets(MATRIX, csr_matrix(y))
    elif lists(y):
        for number, row in enumerate(y):
            if any(name is None or (isinstance(name, float) and isnan(name)) for name in row):
                mend = "leave it out of the list"
                raise InputError(f"y: document {number}", "names of labels", "None or NaN", mend)
        found = Targets(LISTS, [[str(name) for name in row] for row in y])
    else:
        found = _array(np.asarray(y))
    there = count(found.labels)
    if there != documents:
        mend = "give labels for each document"
        raise InputError("y", f"labels of {documents:,} documents", f"{there:,}", mend)
    return found


def lists(y: Any) -> bool:
    """Return whether y holds a list of names for each document."""
    if not isinstance(y, list | tuple) and np.asarray(y).dtype != object:
        return False
    rows = list(y)
    inside = all(isinstance(row, list | tuple | set | frozenset) for row in rows)
    named = any(isinstance(name, str) for row in rows for name in row) if inside else False
    return inside and bool(rows) and (named or not any(map(len, rows)))


def _array(y: np.ndarray) -> Targets:
    if y.ndim == 2 and y.shape[1] == 1:
        told = "A column-vector y was passed when a 1d array was expected; it is raveled"
        warnings.warn(told, DataConversionWarning, stacklevel=4)
        y = y.ravel()
    if y.ndim == 2:
        numbers = y.astype(np.float32)
        if not np.isin(numbers, (0, 1)).all():
            mend = "correct it, or write the names of labels as strings"
            raise InputError("y", "a matrix of zeros and ones", "other values", mend)
        return Targets(MATRIX, csr_matrix(numbers))
    if y.ndim != 1:
        expected = "lists of names, a matrix [N, L], or one class each"
        raise InputError("y", expected, f"an array of {y.ndim} dimensions", "convert it")
    check_classification_targets(y)
    return Targets(SINGLE, y)


def encode_targets(
    parts: Sequence[Targets], classes: Any = None, *, unknown: Literal["raise", "ignore"] = "raise"
) -> tuple[np.ndarray, csr_matrix]:
    """Give the labels numbers.

    Args:
        parts: labels of one kind.
        classes: all labels, sorted; by default those that occur.
        unknown: what happens to labels that are not among `classes`.

    Returns:
        The labels [L], and CSR float32 [N, L] of ones.

    Raises:
        InputError: matrices of other widths, or an unknown label.
    """
    kind = parts[0].kind
    if kind == MATRIX:
        widths = {part.labels.shape[1] for part in parts}
        if classes is not None:
            widths.add(len(classes))
        if len(widths) > 1:
            got = " and ".join(map(str, sorted(widths)))
            raise InputError("y", "matrices of one number of labels", got, "give all columns")
        whole = csr_matrix(vstack([part.labels for part in parts], "csr"), dtype=np.float32)
        whole.sum_duplicates()
        whole.eliminate_zeros()
        whole.data[:] = 1
        return np.arange(whole.shape[1]), whole
    if kind == SINGLE:
        flat = np.concatenate([part.labels for part in parts])
        ends = np.arange(len(flat) + 1)
    else:
        rows = [sorted(set(row)) for part in parts for row in part.labels]
        flat = np.array([name for row in rows for name in row], dtype=object)
        ends = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    known = np.unique(flat.astype(str) if kind == LISTS else flat) if classes is None else classes
    place = {name: number for number, name in enumerate(known.tolist())}
    numbers = np.array([place.get(name, -1) for name in flat.tolist()], np.int64)
    if (bad := np.flatnonzero(numbers < 0)).size and unknown == "raise":
        got = repr(flat.tolist()[bad[0]])
        raise InputError("y", "labels among classes", got, "name every class in the first call")
    kept = numbers >= 0
    ends = np.concatenate([[0], np.cumsum(kept)])[ends]
    ones = np.ones(int(kept.sum()), np.float32)
    return known, csr_matrix((ones, numbers[kept], ends), (len(ends) - 1, len(known)))
