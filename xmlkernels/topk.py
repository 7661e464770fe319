"""The k best candidates of each point, from scores, without filtered pairs.

Letters: N points, L labels, K candidates kept per point, k predictions wanted. Rankings are pairs
(values, rows) [N, K] in descending order of score; a place without a candidate holds row -1 and
value -inf.
"""

import numpy as np
from scipy.sparse import csr_matrix, issparse

from xmlkernels.errors import InputError

_BLOCK = 1 << 22  # stored scores or candidates looked at together


def top_rows_from_csr(scores: csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best stored labels of each point; of equal scores the lower label first.

    Every stored entry is a candidate, also one with score 0 or below; an absent label is never one.

    Args:
        scores: [N, L] sparse; entries that occur twice are added; left as it is.
        k: labels per point.

    Returns:
        values float32 [N, k] (float64 where the scores are) and rows int64 [N, k].

    Raises:
        InputError: not a sparse matrix, a NaN among the scores, or k below 1.
    """
    if not issparse(scores) or scores.ndim != 2:
        raise InputError(
            "scores",
            "a scipy sparse matrix [points, labels]",
            type(scores).__name__,
            "convert it first",
        )
    _check_k(k)
    matrix = scores.tocsr()
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    n = matrix.shape[0]
    values = np.full((n, k), -np.inf, np.float64 if matrix.dtype == np.float64 else np.float32)
    rows = np.full((n, k), -1, np.int64)
    size = max(1, int(_BLOCK // max(1.0, matrix.nnz / max(1, n))))
    for start in range(0, n, size):
        part = matrix[start : start + size]
        if np.isnan(part.data).any():
            at = int(np.isnan(part.data).argmax())
            where = (
                f"scores, point {start + int(np.searchsorted(part.indptr, at, 'right')) - 1}, "
                f"label {part.indices[at]}"
            )
            raise InputError(where, "a number", "NaN", "look for the NaN in the model")
        count = np.diff(part.indptr)
        point = np.repeat(np.arange(len(count)), count)
        # Indices ascend within a row and lexsort is stable: of equal scores the lower label stays
        # first.
        order = np.lexsort((-part.data.astype(values.dtype), point))
        place = np.arange(part.nnz) - np.repeat(part.indptr[:-1], count)
        kept = place < k
        values[start + point[kept], place[kept]] = part.data[order[kept]]
        rows[start + point[kept], place[kept]] = part.indices[order[kept]]
    return values, rows


def candidates_needed(k: int, filter_pairs: np.ndarray, num_labels: int | None = None) -> int:
    """How many candidates per point leave k after any point's filter pairs are removed.

    Args:
        k: predictions wanted per point.
        filter_pairs: int64 [n, 2] of (point, label); pairs that occur twice count once.
        num_labels: L, where known: never more are needed.

    Raises:
        InputError: k below 1, or pairs of another shape.
    """
    _check_k(k)
    pairs = np.unique(_check_pairs(filter_pairs), axis=0)
    most = int(np.unique(pairs[:, 0], return_counts=True)[1].max(initial=0))
    return k + most if num_labels is None else min(k + most, num_labels)


def drop_filtered(
    top_rows: np.ndarray,
    top_values: np.ndarray,
    filter_pairs: np.ndarray,
    k: int,
    *,
    num_labels: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best candidates of each point that are not filtered.

    Pairs are removed before the cut to k.

    Args:
        top_rows: int64 [N, K], best first, -1 where there is none.
        top_values: float [N, K].
        filter_pairs: int64 [n, 2] of (point, label).
        k: predictions wanted per point.
        num_labels: L, where known: with K = L nothing is missing however much is removed.

    Returns:
        rows int64 [N, k] and values [N, k], in the order of the arguments; -1 and -inf where fewer
        than k are left.

    Raises:
        InputError: shapes that do not match, a pair of a point that is not there, or a point that
            may have lost a prediction because too few candidates were kept (keep
            `candidates_needed`).
    """
    _check_k(k)
    numbers = top_rows.dtype.kind in "iu" and top_values.dtype.kind == "f"
    if not numbers or top_rows.ndim != 2 or top_rows.shape != top_values.shape:
        got = f"{top_rows.dtype} {top_rows.shape} and {top_values.dtype} {top_values.shape}"
        raise InputError(
            "top_rows and top_values",
            "an integer and a float array [N, K]",
            got,
            "pass the rows first",
        )
    pairs = _check_pairs(filter_pairs)
    n, candidates = top_rows.shape
    if pairs.size and not 0 <= pairs[:, 0].min() <= pairs[:, 0].max() < n:
        bad = pairs[(pairs[:, 0] < 0) | (pairs[:, 0] >= n)][0]
        raise InputError(
            f"filter_pairs, pair {bad.tolist()}",
            f"points from 0 to {n - 1}",
            str(bad[0]),
            "pass the pairs of this split",
        )
    missing = ((0, 0), (0, max(0, k - candidates)))
    rows = np.pad(top_rows[:, :k].astype(np.int64), missing, constant_values=-1)
    values = np.pad(top_values[:, :k], missing, constant_values=-np.inf)
    # Most points have no pair: only the others are looked at.
    hurt, of_pair = np.unique(pairs[:, 0], return_inverse=True)
    size = max(1, _BLOCK // max(1, candidates))
    for start in range(0, len(hurt), size):
        points = hurt[start : start + size]
        here = (of_pair >= start) & (of_pair < start + size)
        kept_rows, kept_values = _without(
            top_rows[points], top_values[points], of_pair[here] - start, pairs[here, 1]
        )
        left = (kept_rows >= 0).sum(1)
        # A row that was not full has lost nothing: no candidate comes after its last one.
        few = (top_rows[points] >= 0).all(1) & (left < k) & (left < candidates)
        if few.any() and (num_labels is None or candidates < num_labels):
            raise InputError(
                f"top_rows, point {points[few.argmax()]}",
                f"{k} candidates after its filter pairs are removed",
                str(int(left[few.argmax()])),
                f"keep {candidates_needed(k, pairs, num_labels)} candidates per point",
            )
        rows[points, :candidates] = kept_rows[:, :k]
        values[points, :candidates] = kept_values[:, :k]
    return rows, values


def _without(
    rows: np.ndarray, values: np.ndarray, point: np.ndarray, label: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Remove the pairs (point, label) from candidates [n, K] and move the rest up.

    -1 and -inf fill the end.
    """
    pair, place = np.nonzero(rows[point] == label[:, None])
    removed = np.zeros(rows.shape, bool)
    removed[point[pair], place] = True
    order = np.argsort(removed, axis=1, kind="stable")
    rows, values = np.where(removed, -1, rows), np.where(removed, -np.inf, values)
    return np.take_along_axis(rows, order, 1), np.take_along_axis(values, order, 1)


def _check_k(k: int) -> None:
    if not isinstance(k, int | np.integer) or k < 1:
        raise InputError("k", "a whole number from 1", repr(k), "ask for at least one label")


def _check_pairs(filter_pairs: np.ndarray) -> np.ndarray:
    pairs = np.asarray(filter_pairs)
    if pairs.size == 0:
        return np.zeros((0, 2), np.int64)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
        got = f"{pairs.dtype} {pairs.shape}"
        raise InputError(
            "filter_pairs",
            "an integer array [n, 2] of (point, label)",
            got,
            "read them with the filter reader",
        )
    if pairs[:, 1].min() < 0:
        bad = int(pairs[:, 1].argmin())
        raise InputError(
            f"filter_pairs, pair {bad}",
            "label numbers from 0",
            str(pairs[bad, 1]),
            "number labels from 0",
        )
    return pairs.astype(np.int64, copy=False)
