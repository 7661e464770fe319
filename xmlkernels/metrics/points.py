"""Targets and predictions, checked and gone through block by block, for every set of metrics."""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.sparse import csr_matrix, issparse

from xmlkernels.errors import InputError

BLOCK = 1 << 20  # predictions looked at together: bounds the working memory at any N and K


def checked(
    top_rows: np.ndarray, targets: csr_matrix, ks: Sequence[int]
) -> tuple[csr_matrix, tuple[int, ...]]:
    """Return the targets in canonical form and the cut-offs, ascending.

    Raises:
        InputError: shapes that do not match, no test point, k below 1.
    """
    found = canonical(targets, "targets")
    if (
        not isinstance(top_rows, np.ndarray)
        or top_rows.ndim != 2
        or top_rows.dtype.kind not in "iu"
    ):
        got = (
            f"{type(top_rows).__name__} {getattr(top_rows, 'dtype', '')} "
            f"{getattr(top_rows, 'shape', '')}"
        ).strip()
        raise InputError(
            "top_rows",
            "an integer array [N, K] of label numbers",
            got,
            "pass the rows, not the values",
        )
    if top_rows.shape[0] != found.shape[0]:
        raise InputError(
            "top_rows",
            f"{found.shape[0]} points as in targets",
            str(top_rows.shape[0]),
            "predict the same split",
        )
    if 0 in found.shape:
        raise InputError(
            "targets",
            "at least one point and one label",
            f"shape {found.shape}",
            "pass a filled split",
        )
    if not ks or any(not isinstance(k, int | np.integer) or k < 1 for k in ks):
        raise InputError("ks", "whole numbers from 1", str(list(ks)), "pass for example (1, 3, 5)")
    return found, tuple(sorted({int(k) for k in ks}))


def checked_weights(weight: np.ndarray, labels: int) -> np.ndarray:
    """Return inverse propensities as float64 [L], or raise InputError."""
    weight = np.asarray(weight, np.float64)
    if weight.shape != (labels,) or not np.isfinite(weight).all():
        raise InputError(
            "inv_propensity",
            f"{labels} finite values, one per label",
            f"shape {weight.shape}",
            "compute it from the training matrix of the same dataset",
        )
    return weight


def canonical(matrix: csr_matrix, where: str) -> csr_matrix:
    """Return CSR with sorted unique indices and no stored zeros, and leave the caller's alone."""
    if not issparse(matrix) or matrix.ndim != 2:
        raise InputError(
            where,
            "a scipy sparse matrix [points, labels]",
            type(matrix).__name__,
            "convert it with csr_matrix",
        )
    csr = matrix.tocsr()
    if not csr.has_canonical_format or (csr.nnz and not csr.data.all()):
        csr = csr.copy()
        csr.eliminate_zeros()
        csr.sum_duplicates()
    return csr


def blocks(
    top_rows: np.ndarray, targets: csr_matrix, deepest: int
) -> Iterator[tuple[np.ndarray, np.ndarray, csr_matrix]]:
    """Yield blocks of points: labels [n, deepest] padded by -1, hits, targets [n, L]."""
    n, labels = targets.shape
    size = max(1, BLOCK // max(deepest, 1))
    for start in range(0, n, size):
        part = targets[start : start + size]
        rows = top_rows[start : start + size, :deepest].astype(np.int64, copy=False)
        if rows.size and (rows.min() < -1 or rows.max() >= labels):
            bad = int(np.flatnonzero(((rows < -1) | (rows >= labels)).any(1))[0])
            got = next(int(label) for label in rows[bad] if not -1 <= label < labels)
            raise InputError(
                f"top_rows, point {start + bad}",
                f"labels from 0 to {labels - 1}, or -1 for none",
                str(got),
                "check that predictions and targets number the labels alike",
            )
        ordered = np.sort(rows, axis=1)
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
        if twice.any():
            raise InputError(
                f"top_rows, point {start + int(twice.argmax())}",
                "each label once",
                "a label twice",
                "merge the predictions",
            )
        if rows.shape[1] < deepest:
            rows = np.pad(rows, ((0, 0), (0, deepest - rows.shape[1])), constant_values=-1)
        yield rows, hits_of(rows, part), part


def hits_of(rows: np.ndarray, targets: csr_matrix) -> np.ndarray:
    """Return whether rows[i, j] is a positive of point i; bool, shape of rows; -1 is none."""
    n, labels = targets.shape
    if targets.nnz == 0 or rows.size == 0:
        return np.zeros(rows.shape, bool)
    keys = (
        np.repeat(np.arange(n, dtype=np.int64) * labels, np.diff(targets.indptr)) + targets.indices
    )
    wanted = (np.arange(n, dtype=np.int64)[:, None] * labels + rows).ravel()
    place = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.asarray((keys[place] == wanted).reshape(rows.shape) & (rows >= 0))


def best_weights(targets: csr_matrix, weight: np.ndarray, deepest: int) -> np.ndarray:
    """Return the `deepest` largest weights among each point's positives, descending.

    0 where it has fewer; float64 [n, deepest].
    """
    count = np.diff(targets.indptr)
    point = np.repeat(np.arange(len(count)), count)
    values = weight[targets.indices]
    values = values[np.lexsort((-values, point))]
    place = np.arange(targets.nnz) - np.repeat(targets.indptr[:-1], count)
    best = np.zeros((len(count), deepest))
    kept = place < deepest
    best[point[kept], place[kept]] = values[kept]
    return best


def between(ks: tuple[int, ...]) -> list[slice]:
    """Return the places that each cut-off adds to the one before it."""
    return [slice(start, end) for start, end in zip((0, *ks), ks, strict=False)]


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return above / below, 0 where below is 0."""
    ratio: np.ndarray = np.divide(above, below, out=np.zeros(np.shape(below)), where=below != 0)
    return ratio


def known_labels(top_rows: np.ndarray, targets: csr_matrix, deepest: int) -> np.ndarray:
    """Return the labels that are true or predicted somewhere, ascending, int64.

    All others add 0 to every sum over labels.
    """
    known = np.unique(targets.indices)
    for rows, _, _ in blocks(top_rows, targets, deepest):
        known = np.union1d(known, rows[rows >= 0])
    return known


def count_in(known: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Count how often each known label is among those found, int64."""
    return np.bincount(np.searchsorted(known, found), minlength=len(known))
