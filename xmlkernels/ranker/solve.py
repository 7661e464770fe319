"""Many small linear classifiers: dual coordinate descent, label by label, compiled by numba.

Letters: N documents, D dense columns, V sparse columns, n labels of a block, m documents that a
label is trained on.

The classifier of a label minimises ½‖w‖² + Σ cost_i · loss(y_i · w·x_i) over its documents, with a
constant feature for the bias (so the bias is regularised too). A label's result depends on its own
documents and the seed alone: neither on the threads nor on the other labels. The loops hold no
lock of the interpreter; the caller spreads them over threads. They are compiled at the first
call, so loops replace numpy's own functions (unique, where, slices), which take seconds to compile.

Sources: Hsieh, Chang, Lin, Keerthi & Sundararajan, "A Dual Coordinate Descent Method for
Large-scale Linear SVM" (ICML 2008), algorithm 3 (random order, shrinking), squared hinge; Yu, Huang
& Lin, "Dual coordinate descent methods for logistic regression and maximum entropy models" (Machine
Learning 2011), algorithm 5, logistic loss.
"""

from __future__ import annotations

import math

import numba
import numpy as np

# Sums may be taken in the order that fills a vector register: the same on every run on one machine.
_FAST = {"reassoc", "contract"}
Arrays = tuple[np.ndarray, np.ndarray]
_SEARCH = 8  # weights that are read in the time in which one word is looked up
_INNER = 0.1  # a Newton step past the border goes this share of the way to it (Yu et al.)


@numba.njit(fastmath=_FAST)
def dot(
    i: int,
    dense: np.ndarray,
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    u: np.ndarray,
) -> np.float32:
    """Document i times the weights u [D + V]."""
    width = dense.shape[1]
    total = np.float32(0)
    for j in range(width):
        total += dense[i, j] * u[j]
    for p in range(indptr[i], indptr[i + 1]):
        total += data[p] * u[width + indices[p]]
    return total


@numba.njit
def _add(
    i: int,
    times: float,
    dense: np.ndarray,
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    u: np.ndarray,
) -> None:
    """Add times · document i to u."""
    width = dense.shape[1]
    scale = np.float32(times)
    for j in range(width):
        u[j] += scale * dense[i, j]
    for p in range(indptr[i], indptr[i + 1]):
        u[width + indices[p]] += scale * data[p]


@numba.njit
def _below(state: np.ndarray, bound: int) -> np.int64:
    """Draw a number from 0 to bound - 1.

    splitmix64, whose remainder is even enough for an order of visits.
    """
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((z ^ (z >> np.uint64(31))) % np.uint64(bound))


@numba.njit
def _shuffle(order: np.ndarray, count: int, state: np.ndarray) -> None:
    for last in range(count - 1, 0, -1):
        place = _below(state, last + 1)
        order[last], order[place] = order[place], order[last]


@numba.njit
def _listed(
    listed: np.ndarray, positive: np.ndarray, negatives: int, n: int, state: np.ndarray
) -> Arrays:
    """List the documents of a label, ascending, and +1 or -1 for each.

    Listed ones, positives and up to `negatives` random others; the first two arrive ascending.

    Work and memory grow with the lists, not with N. What is drawn twice counts once.
    """
    drawn = np.empty(negatives, np.int64)
    for k in range(negatives):
        drawn[k] = _below(state, n)
    drawn.sort()
    most = len(listed) + len(positive) + negatives
    docs, y = np.empty(most, np.int64), np.empty(most, np.int8)
    a = b = c = count = 0
    while a < len(listed) or b < len(positive) or c < negatives:
        doc = n
        if a < len(listed):
            doc = min(doc, listed[a])
        if b < len(positive):
            doc = min(doc, positive[b])
        if c < negatives:
            doc = min(doc, drawn[c])
        docs[count], y[count] = doc, -1
        while a < len(listed) and listed[a] == doc:
            a += 1
        while b < len(positive) and positive[b] == doc:
            y[count] = 1
            b += 1
        while c < negatives and drawn[c] == doc:
            c += 1
        count += 1
    return docs[:count], y[:count]


@numba.njit
def _every(positive: np.ndarray, n: int) -> Arrays:
    """All n documents, and +1 or -1 of each."""
    docs, y = np.arange(n), np.empty(n, np.int8)
    for i in range(n):
        y[i] = -1
    for i in positive:
        y[i] = 1
    return docs, y


@numba.njit
def _squared_hinge(docs, y, cost, squares, x, bias, tolerance, epochs, state, u):  # type: ignore[no-untyped-def]
    """Run algorithm 3 of Hsieh et al. with D_ii = 1/(2·cost_i).

    Returns the bias weight and the passes made.
    """
    dense, indptr, indices, data = x
    m = len(docs)
    alpha = np.zeros(m)
    order = np.arange(m)
    active, bound, constant = m, np.inf, 0.0
    for epoch in range(epochs):
        _shuffle(order, active, state)
        high, low = -np.inf, np.inf
        at = 0
        while at < active:
            k = order[at]
            i, sign = docs[k], float(y[k])
            own = 0.5 / cost[k]
            gradient = (
                sign * (dot(i, dense, indptr, indices, data, u) + bias * constant)
                - 1
                + own * alpha[k]
            )
            if alpha[k] == 0 and gradient > bound:
                active -= 1
                order[at], order[active] = order[active], order[at]
                continue
            projected = min(gradient, 0.0) if alpha[k] == 0 else gradient
            high, low = max(high, projected), min(low, projected)
            if abs(projected) > 1e-12:
                curvature = squares[i] + bias * bias + own
                moved = max(alpha[k] - gradient / curvature, 0.0) - alpha[k]
                alpha[k] += moved
                _add(i, moved * sign, dense, indptr, indices, data, u)
                constant += moved * sign * bias
            at += 1
        bound = high if high > 0 else np.inf
        if high - low <= tolerance:
            if active == m:
                return constant, epoch + 1
            # All the shrunk ones are looked at once more before the end.
            active, bound = m, np.inf
    return constant, epochs


@numba.njit
def _logistic(docs, y, cost, squares, x, bias, tolerance, epochs, state, u):  # type: ignore[no-untyped-def]
    """Run algorithm 5 of Yu et al.

    alpha and cost - alpha are both kept, so that neither loses its digits near 0.
    """
    dense, indptr, indices, data = x
    m = len(docs)
    low = np.minimum(0.001 * cost, 1e-8)
    high = cost - low
    order = np.arange(m)
    constant, inner = 0.0, 1e-2
    for at in range(m):
        _add(docs[at], low[at] * y[at], dense, indptr, indices, data, u)
        constant += low[at] * y[at] * bias
    for epoch in range(epochs):
        _shuffle(order, m, state)
        largest, steps = 0.0, 0
        for k in order:
            i, sign = docs[k], float(y[k])
            a = squares[i] + bias * bias
            b = sign * (dot(i, dense, indptr, indices, data, u) + bias * constant)
            # The sub-problem in whichever of the two variables ends below cost/2.
            first = 0.5 * a * (high[k] - low[k]) + b >= 0
            side = 1.0 if first else -1.0
            before = low[k] if first else high[k]
            z = before if cost[k] - before >= 0.5 * cost[k] else _INNER * before
            slope = a * (z - before) + side * b + math.log(z / (cost[k] - z))
            largest = max(largest, abs(slope))
            newton = 0
            while abs(slope) >= inner and newton < 100:
                step = z - slope / (a + cost[k] / (cost[k] - z) / z)
                z = step if step > 0 else _INNER * z
                slope = a * (z - before) + side * b + math.log(z / (cost[k] - z))
                newton += 1
            if newton:
                steps += newton
                low[k], high[k] = (z, cost[k] - z) if first else (cost[k] - z, z)
                moved = side * (z - before) * sign
                _add(i, moved, dense, indptr, indices, data, u)
                constant += moved * bias
        if largest < tolerance:
            return constant, epoch + 1
        if steps <= m // 10:
            inner = max(1e-8, 0.1 * inner)
    return constant, epochs


@numba.njit(nogil=True)
def solve(begin, end, labels, lists, positives, squares, x, how, seed, block, constant, passes):  # type: ignore[no-untyped-def]
    """Train labels[begin:end].

    Fills their rows of block float32 [n, D + V] (zeros before), constant and passes [n].

    Args:
        labels: int64 [n], label ids.
        lists, positives: (indptr, indices) of CSR [L, N]: each label's listed documents and its
            positives. An empty `lists[0]` lists every document for every label.
        squares: float32 [N], squared length of each document.
        x: (dense, indptr, indices, data) of the features.
        how: (logistic, cost, positive_weight, bias, tolerance, epochs, negatives).
        seed: uint64.
    """
    logistic, cost, positive_weight, bias, tolerance, epochs, negatives = how
    n = len(squares)
    for b in range(begin, end):
        label = labels[b]
        state = np.empty(1, np.uint64)
        state[0] = np.uint64(seed) ^ (np.uint64(label + 1) * np.uint64(0xD1342543DE82EF95))
        positive = positives[1][positives[0][label] : positives[0][label + 1]]
        if len(lists[0]):
            listed = lists[1][lists[0][label] : lists[0][label + 1]]
            docs, y = _listed(listed, positive, negatives, n, state)
        else:
            docs, y = _every(positive, n)
        if not len(docs):
            continue
        costs = np.empty(len(docs))
        for k in range(len(docs)):
            costs[k] = cost * positive_weight if y[k] > 0 else cost
        if logistic:
            constant[b], passes[b] = _logistic(
                docs, y, costs, squares, x, bias, tolerance, epochs, state, block[b]
            )
        else:
            constant[b], passes[b] = _squared_hinge(
                docs, y, costs, squares, x, bias, tolerance, epochs, state, block[b]
            )


@numba.njit(nogil=True)
def keep(
    begin: int,
    end: int,
    block: np.ndarray,
    width: int,
    threshold: float,
    kept: np.ndarray,
    columns: np.ndarray,
) -> None:
    """Move the sparse weights above the threshold (in size) of rows begin to end to the front.

    Rows are those of block [n, D + V].

    Args:
        kept: int64 [n], filled with how many they are.
        columns: int32 [n, V], filled in front with their columns, ascending.
    """
    for b in range(begin, end):
        count = 0
        for j in range(width, block.shape[1]):
            if abs(block[b, j]) > threshold:
                block[b, width + count] = block[b, j]
                columns[b, count] = j - width
                count += 1
        kept[b] = count


@numba.njit
def weight_at(columns, values, first, last, wanted):  # type: ignore[no-untyped-def]
    """Return the weight of a column between two places of ascending columns; 0 where it is none.

    Args:
        columns: int32, ascending from first to last.
        values: float32, their weights.
        first, last: the places.
        wanted: the column.
    """
    end = last
    while first < last:
        middle = (first + last) // 2
        if columns[middle] < wanted:
            first = middle + 1
        else:
            last = middle
    return values[first] if first < end and columns[first] == wanted else np.float32(0)


@numba.njit(nogil=True)
def score(begin, end, weights, constant, x, pairs, out):  # type: ignore[no-untyped-def]
    """out[p] = w_label · x_document + constant_label for every listed pair of labels begin to end.

    Both ways through the weights of a label give the same bits.

    Args:
        weights: (dense [L, D], indptr, indices, data, V, whether columns ascend) of the labels.
        constant: float32 [L], the bias.
        x: as in `solve`.
        pairs: (indptr [L + 1], document of each pair, its place in `out`): pairs sorted by label.
    """
    dense, indptr, indices, data = x
    width, columns = dense.shape[1], weights[4]
    # One label's weights as a full row, which every document of its list then meets.
    u = np.zeros(width + columns, np.float32)
    for label in range(begin, end):
        first, last = pairs[0][label], pairs[0][label + 1]
        if first == last:
            continue
        for j in range(width):
            u[j] = weights[0][label, j]
        begins, ends = weights[1][label], weights[1][label + 1]
        words = 0
        for p in range(first, last):
            words += indptr[pairs[1][p] + 1] - indptr[pairs[1][p]]
        if weights[5] and words * _SEARCH < ends - begins:
            # A few short texts: look up their words, and leave the label's others alone.
            for p in range(first, last):
                i = pairs[1][p]
                for q in range(indptr[i], indptr[i + 1]):
                    u[width + indices[q]] = weight_at(
                        weights[2], weights[3], begins, ends, indices[q]
                    )
                out[pairs[2][p]] = dot(i, dense, indptr, indices, data, u) + constant[label]
                for q in range(indptr[i], indptr[i + 1]):
                    u[width + indices[q]] = 0
            continue
        for p in range(begins, ends):
            u[width + weights[2][p]] = weights[3][p]
        for p in range(first, last):
            out[pairs[2][p]] = dot(pairs[1][p], dense, indptr, indices, data, u) + constant[label]
        for p in range(begins, ends):
            u[width + weights[2][p]] = 0
