"""Compiled loops over candidates: one level down a tree, and the best of a list; by numba.

Letters: N documents, C clusters of a level, n children of them, V columns, K kept per document.
"""

from __future__ import annotations

import numba
import numpy as np

_FAST = {"reassoc", "contract"}


@numba.njit
def _insert(values: np.ndarray, names: np.ndarray, count: int, value: float, name: int) -> int:
    """Insert into lists [K] in descending order, lower names first among equals; return the count.

    `count` places are taken. What falls off the end is lost.
    """
    k = len(values)
    if count == k:
        last = values[k - 1]
        if value < last or (value == last and name > names[k - 1]):
            return count
    at = min(count, k - 1)
    while at > 0 and (values[at - 1] < value or (values[at - 1] == value and names[at - 1] > name)):
        values[at], names[at] = values[at - 1], names[at - 1]
        at -= 1
    values[at], names[at] = value, name
    return min(count + 1, k)


@numba.njit(nogil=True, fastmath=_FAST)
def keep_children(begin, end, x, kept, ends, weights, bias, logistic, values, names):  # type: ignore[no-untyped-def]
    """Keep the best children of the clusters kept for documents begin to end.

    Args:
        x: (indptr, indices, data), CSR [N, V].
        kept: (clusters int32 [N, k], -1 pads; log-probabilities float64 [N, k]).
        ends: int64 [C + 1], the children ends[c] to ends[c + 1] - 1 of each cluster.
        weights: (indptr, indices, data) of CSR [V, n], children ascending.
        bias: float32 [n].
        values, names: float64 and int32 [N, K], filled with log-probabilities and children, best
            first; -inf and -1 before.
    """
    indptr, indices, data = x
    starts, children, weight = weights
    margin = np.empty(len(bias), np.float32)
    for i in range(begin, end):
        count = 0
        for q in range(kept[0].shape[1]):
            cluster = kept[0][i, q]
            if cluster < 0:
                continue
            first, last = ends[cluster], ends[cluster + 1]
            for child in range(first, last):
                margin[child] = bias[child]
            for p in range(indptr[i], indptr[i + 1]):
                low, high = starts[indices[p]], starts[indices[p] + 1]
                stop, value = high, data[p]
                while low < high:  # the first child of this cluster
                    middle = (low + high) // 2
                    if children[middle] < first:
                        low = middle + 1
                    else:
                        high = middle
                while low < stop and children[low] < last:
                    margin[children[low]] += value * weight[low]
                    low += 1
            for child in range(first, last):
                m = np.float64(margin[child])
                if logistic:
                    log_p = -np.log1p(np.exp(-m)) if m > -30 else m
                else:
                    short = max(0.0, 1.0 - m)
                    log_p = -short * short
                count = _insert(values[i], names[i], count, kept[1][i, q] + log_p, child)


@numba.njit(nogil=True)
def best_stored(
    begin: int,
    end: int,
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    values: np.ndarray,
    names: np.ndarray,
) -> None:
    """Fill rows begin to end of values and names [N, K] with the best entries of a CSR matrix.

    Lower columns come first among equals. Places without an entry stay as they are.
    """
    for i in range(begin, end):
        count = 0
        for p in range(indptr[i], indptr[i + 1]):
            count = _insert(values[i], names[i], count, data[p], indices[p])


@numba.njit(nogil=True)
def mark_undominated(
    begin: int,
    end: int,
    indptr: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    k: int,
    kept: np.ndarray,
) -> None:
    """Mark the entries of CSR rows that fewer than k others of the row beat in both of two scores.

    Args:
        first, second: float64 [nnz], the scores. Of entries with the same first one, those that
            come first in the row are looked at first.
        kept: bool [nnz], filled.
    """
    best = np.empty(k, np.float64)
    for i in range(begin, end):
        count = 0
        start = indptr[i]
        order = np.argsort(-first[start : indptr[i + 1]], kind="mergesort")
        for place in order:
            value = second[start + place]
            kept[start + place] = count < k or value > best[k - 1]
            if not kept[start + place]:
                continue
            at = min(count, k - 1)
            while at > 0 and best[at - 1] < value:
                best[at] = best[at - 1]
                at -= 1
            best[at] = value
            count = min(count + 1, k)
