"""Linear classifiers of labels that share their documents, trained all at once; compiled by numba.

Letters: N documents, V columns, m documents of a group, v columns that they use, n labels of it.

`solve` of `solve.py` trains a label at a time: it reads a document once for each label. Where many
labels are trained on the same documents, as those of a cluster are, one reading serves them all:
the weights of a column lie side by side, [v, n], so that a document's margins for all labels are
sums of a few contiguous rows, which fill vector registers. The documents of a group are gathered
first, with their columns numbered anew, so that a group's weights stay in the cache.

Source: the coordinate descent of Hsieh et al. (ICML 2008), as in `solve.py`, squared hinge; the
labels of a group visit the documents in one order.
"""

from __future__ import annotations

import numba
import numpy as np

# Sums may be taken in the order that fills a vector register: the same on every run on one machine.
_FAST = {"reassoc", "contract", "nnan", "nsz"}
Arrays = tuple[np.ndarray, np.ndarray]
Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@numba.njit
def _shuffle(order: np.ndarray, state: np.ndarray) -> None:
    """Put `order` in a random order: Fisher and Yates by splitmix64."""
    for last in range(len(order) - 1, 0, -1):
        state[0] += np.uint64(0x9E3779B97F4A7C15)
        z = state[0]
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        place = np.int64((z ^ (z >> np.uint64(31))) % np.uint64(last + 1))
        order[last], order[place] = order[place], order[last]


@numba.njit(nogil=True)
def gather(
    docs: np.ndarray, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, columns: int
) -> Columns:
    """Take the rows `docs` of a CSR matrix with `columns` columns, those in use numbered anew.

    Returns:
        CSR of the rows (indptr, indices, data), and the column of each new number, ascending.
    """
    place = np.full(columns, -1, np.int32)
    count = 0
    for i in docs:
        count += indptr[i + 1] - indptr[i]
        for p in range(indptr[i], indptr[i + 1]):
            place[indices[p]] = 0
    used = 0
    for j in range(columns):
        if place[j] == 0:
            place[j] = used
            used += 1
    names = np.empty(used, np.int32)
    for j in range(columns):
        if place[j] >= 0:
            names[place[j]] = j
    ends, new, values = (
        np.zeros(len(docs) + 1, np.int64),
        np.empty(count, np.int32),
        np.empty(count, np.float32),
    )
    at = 0
    for k in range(len(docs)):
        for p in range(indptr[docs[k]], indptr[docs[k] + 1]):
            new[at], values[at] = place[indices[p]], data[p]
            at += 1
        ends[k + 1] = at
    return ends, new, values, names


@numba.njit(nogil=True)
def pairs_of(
    docs: np.ndarray, labels: np.ndarray, indptr: np.ndarray, indices: np.ndarray
) -> Arrays:
    """Give the pairs (document, label) new numbers, by document: CSR [m, n] (indptr, indices).

    Args:
        docs: int32 [m], ascending.
        labels: int64 [n].
        indptr, indices: CSR [L, N], the documents of each label, ascending. Those that are not
            among `docs` are left out.
    """
    ends = np.zeros(len(docs) + 1, np.int64)
    for label in labels:
        k = 0
        for p in range(indptr[label], indptr[label + 1]):
            k += np.searchsorted(docs[k:], indices[p])
            if k < len(docs) and docs[k] == indices[p]:
                ends[k + 1] += 1
    for k in range(len(docs)):
        ends[k + 1] += ends[k]
    free, out = ends[:-1].copy(), np.empty(ends[-1], np.int32)
    for b in range(len(labels)):
        k = 0
        for p in range(indptr[labels[b]], indptr[labels[b] + 1]):
            k += np.searchsorted(docs[k:], indices[p])
            if k < len(docs) and docs[k] == indices[p]:
                out[free[k]] = b
                free[k] += 1
    return ends, out


@numba.njit(nogil=True, fastmath=_FAST)
def _visit_all(  # type: ignore[no-untyped-def]
    order, x, squares, positives, excluded, place, how, alpha, weights, constant, spread
):
    """Visit every document once, in `order`; change alpha [m, a], weights [v, a], constant [a].

    Args:
        place: int32 [n], where a label stands among the a that are still in training, or -1.
        spread: float32 [2, a], filled with the least and the largest projected gradient.
    """
    indptr, indices, data = x
    cost, positive_weight, bias = how
    count = weights.shape[1]
    zero, one, inert = np.float32(0), np.float32(1), np.float32(-1e30)
    feature = np.float32(bias)
    own, own_positive = np.float32(0.5 / cost), np.float32(0.5 / (cost * positive_weight))
    margin, moved = np.empty(count, np.float32), np.empty(count, np.float32)
    kept = np.empty((2, len(place)), np.float32)
    low, high = spread[0], spread[1]
    for b in range(count):
        low[b], high[b] = np.float32(np.inf), np.float32(-np.inf)
    for i in order:
        for b in range(count):
            margin[b] = feature * constant[b]
        for p in range(indptr[i], indptr[i + 1]):
            row, value = weights[indices[p]], data[p]
            for b in range(count):
                margin[b] += value * row[b]
        a = alpha[i]
        # A margin far below the border and an alpha of 0 make the loop over negatives pass by.
        first, last = positives[0][i], positives[0][i + 1]
        for p in range(first, last):
            b = place[positives[1][p]]
            if b >= 0:
                kept[0, p - first], kept[1, p - first] = margin[b], a[b]
                margin[b], a[b] = inert, zero
        for p in range(excluded[0][i], excluded[0][i + 1]):
            b = place[excluded[1][p]]
            if b >= 0:
                margin[b] = inert
        square = squares[i] + feature * feature
        step = one / (square + own)
        for b in range(count):
            gradient = own * a[b] - margin[b] - one
            at_border = gradient if gradient < zero else zero
            projected = at_border if a[b] == zero else gradient
            low[b] = projected if projected < low[b] else low[b]
            high[b] = projected if projected > high[b] else high[b]
            new = a[b] - gradient * step
            new = new if new > zero else zero
            moved[b] = a[b] - new
            a[b] = new
        step = one / (square + own_positive)
        for p in range(first, last):
            b = place[positives[1][p]]
            if b >= 0:
                before = kept[1, p - first]
                gradient = own_positive * before + kept[0, p - first] - one
                projected = min(gradient, zero) if before == zero else gradient
                low[b], high[b] = min(low[b], projected), max(high[b], projected)
                a[b] = max(before - gradient * step, zero)
                moved[b] = a[b] - before
        for b in range(count):
            constant[b] += feature * moved[b]
        for p in range(indptr[i], indptr[i + 1]):
            row, value = weights[indices[p]], data[p]
            for b in range(count):
                row[b] += value * moved[b]


@numba.njit(nogil=True)
def _take(matrix: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Columns of a matrix, contiguous."""
    out = np.empty((len(matrix), len(columns)), matrix.dtype)
    for i in range(len(matrix)):
        for k in range(len(columns)):
            out[i, k] = matrix[i, columns[k]]
    return out


@numba.njit(nogil=True)
def solve_jointly(x, squares, positives, excluded, how, seed, weights, constant, passes):  # type: ignore[no-untyped-def]
    """Train the n labels of a group on its m documents.

    Fills weights float32 [v, n], constant float32 [n] and passes int64 [n] (zeros before).

    A label is done when its projected gradients spread over `tolerance` at most. Labels that are
    done go on until a quarter of those in training are: then only the others stay, in narrower
    arrays.

    Args:
        x: (indptr int64, indices int32, data float32) of the documents' features [m, v].
        squares: float32 [m], squared length of each document.
        positives: CSR [m, n] (indptr int64, indices int32) of the true pairs.
        excluded: the same of pairs that a label is not trained on; a true one stays.
        how: (cost, positive_weight, bias, tolerance, epochs).
        seed: uint64.
    """
    cost, positive_weight, bias, tolerance, epochs = how
    m, n = len(squares), len(constant)
    state, order = np.empty(1, np.uint64), np.arange(m)
    state[0] = np.uint64(seed)
    names, place = np.arange(n), np.arange(n).astype(np.int32)
    alpha, inside, bound = np.zeros((m, n), np.float32), weights, constant
    for epoch in range(epochs):
        _shuffle(order, state)
        spread = np.empty((2, len(names)), np.float32)
        _visit_all(
            order,
            x,
            squares,
            positives,
            excluded,
            place,
            (cost, positive_weight, bias),
            alpha,
            inside,
            bound,
            spread,
        )
        left = np.flatnonzero(spread[1] - spread[0] > tolerance)
        passes[names] = epoch + 1
        if 4 * len(left) > 3 * len(names) and epoch + 1 < epochs:
            continue
        if len(names) < n:
            for k in range(len(names)):
                constant[names[k]] = bound[k]
                for j in range(len(weights)):
                    weights[j, names[k]] = inside[j, k]
        if len(left) == 0:
            return
        names = names[left]
        place[:] = -1
        for k in range(len(names)):
            place[names[k]] = k
        alpha, inside, bound = _take(alpha, left), _take(inside, left), bound[left]


@numba.njit(nogil=True)
def keep_large(
    weights: np.ndarray, names: np.ndarray, first: int, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep the weights above the threshold in size: CSR [n, V] (ends, columns, values).

    Args:
        weights: float32 [v, n].
        names: int32 [v], the column of each row, ascending.
        first: rows before this one are kept whole.
    """
    v, n = weights.shape
    ends = np.zeros(n + 1, np.int64)
    for j in range(v):
        for b in range(n):
            if j < first or abs(weights[j, b]) > threshold:
                ends[b + 1] += 1
    for b in range(n):
        ends[b + 1] += ends[b]
    free = ends[:-1].copy()
    columns, values = np.empty(ends[-1], np.int32), np.empty(ends[-1], np.float32)
    for j in range(v):
        for b in range(n):
            if j < first or abs(weights[j, b]) > threshold:
                columns[free[b]], values[free[b]] = names[j], weights[j, b]
                free[b] += 1
    return ends, columns, values
