"""Balanced spherical 2-means of one node of the tree: the compiled loops.

Rows have two blocks, a sparse and a dense one, each of length 1 (or 0) with centres of its own;
similarities add up. The rows most similar to the first centre rather than to the second are the
first half, the centres are the halves' means, and both repeat until the mean similarity of a row to
its own centre rises by less than the tolerance. That mean times n is ‖Σ first‖ + ‖Σ second‖, block
by block, so that the sums of the halves are all that is kept of the centres.

Even starts are the difference of two random rows; odd ones are random scores turned towards the
direction in which the rows differ most (power iteration): on planted clusters the first kind alone
ends in a worse optimum too often.

Dimension letters: n rows of the node, m columns that they use, D width of the dense block, S
starts.
"""

from __future__ import annotations

import numpy as np
from numba import njit

POWER = 8  # steps of the power iteration


@njit(nogil=True)
def split_node(  # type: ignore[no-untyped-def]
    ptr,
    index,
    value,
    dense,
    rows,
    first,
    sample,
    sample_first,
    pairs,
    noise,
    pairwise,
    tolerance,
    rounds,
    column_map,
):
    """Which rows of the node make the first half: bool [n], `first` of them.

    Args:
        ptr, index, value: CSR of all labels; dense [L, D], D may be 0.
        rows: int64 [n], labels of the node.
        sample: int64, positions in `rows` among which the starts are tried; `sample_first` of them
            make its first half.
        pairs: int64 [S, 2], positions in `sample`: the two first centres of the even starts.
        noise: fp32 [S, len(sample)], the first scores of the odd starts.
        pairwise: nodes of up to this many rows are split by their similarities, computed once.
        column_map: int32 [V] of −1; left as it was.
    """
    local = _compacted(ptr, index, value, rows, column_map)
    near = dense[rows]
    if len(rows) <= pairwise:
        return _split_by_similarities(local, near, first, pairs, noise, tolerance, rounds)
    direction, dense_direction = _best_start(
        local, near, sample, sample_first, pairs, noise, tolerance, rounds
    )
    everyone = np.arange(len(rows))
    return _descend(local, near, everyone, direction, dense_direction, first, tolerance, rounds)[1]


@njit(nogil=True)
def _compacted(ptr, index, value, rows, column_map):  # type: ignore[no-untyped-def]
    """Return CSR of the given rows with the m columns they use renumbered.

    (ptr, index, value, columns int32 [m]).
    """
    local_ptr = np.zeros(len(rows) + 1, np.int64)
    for i in range(len(rows)):
        local_ptr[i + 1] = local_ptr[i] + ptr[rows[i] + 1] - ptr[rows[i]]
    local_index = np.empty(local_ptr[-1], np.int32)
    local_value = np.empty(local_ptr[-1], np.float32)
    columns, m = np.empty(min(local_ptr[-1], len(column_map)), np.int32), 0
    for i in range(len(rows)):
        shift = local_ptr[i] - ptr[rows[i]]
        for j in range(ptr[rows[i]], ptr[rows[i] + 1]):
            column = index[j]
            if column_map[column] < 0:
                column_map[column] = m
                columns[m] = column
                m += 1
            local_index[j + shift], local_value[j + shift] = column_map[column], value[j]
    for i in range(m):
        column_map[columns[i]] = -1
    return local_ptr, local_index, local_value, columns[:m]


@njit(nogil=True)
def _best_start(local, near, sample, first, pairs, noise, tolerance, rounds):  # type: ignore[no-untyped-def]
    """Return the difference of the centres after the best start on the sample.

    float32 [m] and [D].
    """
    ptr, index, value, columns = local
    best, direction = -np.inf, np.zeros(len(columns), np.float32)
    dense_direction = np.zeros(near.shape[1], np.float32)
    for start in range(len(pairs)):
        trial, dense_trial = np.zeros(len(columns), np.float32), np.zeros(near.shape[1], np.float32)
        score = np.zeros(len(sample), np.float32)
        if start % 2:
            score[:] = noise[start]
        else:
            score[pairs[start, 0]], score[pairs[start, 1]] = 1, -1
        _add(local, near, sample, score, trial, dense_trial)
        for _ in range(POWER * (start % 2)):
            _score_rows(0, len(sample), ptr, index, value, near, sample, trial, dense_trial, score)
            _centre(score)
            trial[:], dense_trial[:] = 0, 0
            _add(local, near, sample, score, trial, dense_trial)
        objective, _ = _descend(local, near, sample, trial, dense_trial, first, tolerance, rounds)
        if objective > best:
            best, direction, dense_direction = objective, trial, dense_trial
    return direction, dense_direction


@njit(nogil=True)
def _add(local, near, rows, factor, total, dense_total):  # type: ignore[no-untyped-def]
    """Add Σ factor of a row · row to total, block by block."""
    ptr, index, value, _columns = local
    for i in range(len(rows)):
        if factor[i] == 0:
            continue
        for j in range(ptr[rows[i]], ptr[rows[i] + 1]):
            total[index[j]] += factor[i] * value[j]
        for j in range(near.shape[1]):
            dense_total[j] += factor[i] * near[rows[i], j]


@njit(nogil=True)
def _centre(score):  # type: ignore[no-untyped-def]
    """Mean 0 and, unless all are equal, length 1."""
    mean = square = 0.0
    for i in range(len(score)):
        mean += score[i]
    mean /= len(score)
    for i in range(len(score)):
        square += (score[i] - mean) ** 2
    by = 1 / np.sqrt(square) if square > 0 else 0.0
    for i in range(len(score)):
        score[i] = (score[i] - mean) * by


@njit(nogil=True)
def _descend(local, near, rows, direction, dense_direction, first, tolerance, rounds):  # type: ignore[no-untyped-def]
    """Run 2-means on some rows of a node.

    Returns (objective, is_first bool [len(rows)]) and leaves the last directions.
    """
    ptr, index, value, columns = local
    n, m, width = len(rows), len(columns), near.shape[1]
    is_first = np.zeros(n, np.bool_)
    score = np.empty(n, np.float32)
    whole = np.zeros(m)
    dense_whole = np.zeros(width)
    half = np.zeros(m)
    dense_half = np.zeros(width)
    _add(local, near, rows, np.ones(n), whole, dense_whole)
    before = -np.inf
    for _ in range(rounds):
        _score_rows(0, n, ptr, index, value, near, rows, direction, dense_direction, score)
        chosen = _highest(score, first)
        # Only rows that moved.
        _add(local, near, rows, chosen * 1.0 - is_first * 1.0, half, dense_half)
        is_first = chosen
        objective = _new_direction(whole, half, direction) + _new_direction(
            dense_whole, dense_half, dense_direction
        )
        if objective - before < tolerance * n:
            break
        before = objective
    return objective, is_first


@njit(nogil=True)
def _sparse_dot(begin, end, index, value, direction):  # type: ignore[no-untyped-def]
    """Four sums side by side: one alone would wait for each addition."""
    a = b = c = d = np.float32(0)
    j = begin
    while j + 4 <= end:
        a += value[j] * direction[index[j]]
        b += value[j + 1] * direction[index[j + 1]]
        c += value[j + 2] * direction[index[j + 2]]
        d += value[j + 3] * direction[index[j + 3]]
        j += 4
    while j < end:
        a += value[j] * direction[index[j]]
        j += 1
    return (a + b) + (c + d)


@njit(nogil=True)
def _highest(score, first):  # type: ignore[no-untyped-def]
    """Return bool [n]: the `first` rows of highest score; of equal ones the earlier."""
    chosen = np.zeros(len(score), np.bool_)
    least = np.partition(score, len(score) - first)[len(score) - first]
    room = first
    for i in range(len(score)):
        if score[i] > least:
            chosen[i] = True
            room -= 1
    for i in range(len(score)):
        if room > 0 and score[i] == least:
            chosen[i] = True
            room -= 1
    return chosen


@njit(nogil=True)
def _new_direction(whole, half, direction):  # type: ignore[no-untyped-def]
    """Write the difference of the two unit centres, fp32; return ‖first‖ + ‖second‖ of the sums."""
    a = b = 0.0
    for j in range(len(whole)):
        a += half[j] ** 2
        b += (whole[j] - half[j]) ** 2
    a, b = np.sqrt(a), np.sqrt(b)
    by_a, by_b = 1 / a if a > 0 else 0.0, 1 / b if b > 0 else 0.0
    for j in range(len(whole)):
        direction[j] = half[j] * by_a - (whole[j] - half[j]) * by_b
    return a + b


@njit(nogil=True)
def _split_by_similarities(local, near, first, pairs, noise, tolerance, rounds):  # type: ignore[no-untyped-def]
    """Run the same iteration on the n × n similarities of a small node, from every start."""
    ptr, index, value, columns = local
    n = len(ptr) - 1
    similar, dense_similar = np.empty((n, n), np.float32), np.empty((n, n), np.float32)
    spread = np.zeros(len(columns), np.float32)
    for i in range(n):
        for j in range(ptr[i], ptr[i + 1]):
            spread[index[j]] = value[j]
        for k in range(i, n):
            similar[i, k] = similar[k, i] = _sparse_dot(ptr[k], ptr[k + 1], index, value, spread)
            total = np.float32(0)
            for j in range(near.shape[1]):
                total += near[i, j] * near[k, j]
            dense_similar[i, k] = dense_similar[k, i] = total
        for j in range(ptr[i], ptr[i + 1]):
            spread[index[j]] = 0
    best, is_first = -np.inf, np.zeros(n, np.bool_)
    score, half, dense_half = np.empty(n, np.float32), np.empty(n), np.empty(n)
    whole, dense_whole = np.zeros(n), np.zeros(n)
    for i in range(n):
        for k in range(n):
            whole[k] += similar[i, k]
            dense_whole[k] += dense_similar[i, k]
    for start in range(len(pairs)):
        a, b = pairs[start, 0], pairs[start, 1]
        for k in range(n):
            score[k] = similar[a, k] - similar[b, k] + dense_similar[a, k] - dense_similar[b, k]
        if start % 2:
            score[:] = noise[start]
        for _ in range(POWER * (start % 2)):
            _centre(score)
            half[:] = 0
            for i in range(n):
                for k in range(n):
                    half[k] += score[i] * (similar[i, k] + dense_similar[i, k])
            score[:] = half
        before = -np.inf
        for _ in range(rounds):
            chosen = _highest(score, first)
            half[:], dense_half[:] = 0, 0
            for i in range(n):
                if chosen[i]:
                    for k in range(n):
                        half[k] += similar[i, k]
                        dense_half[k] += dense_similar[i, k]
            score[:] = 0
            objective = _add_scores(chosen, whole, half, score) + _add_scores(
                chosen, dense_whole, dense_half, score
            )
            if objective > best:
                best, is_first = objective, chosen
            if objective - before < tolerance * n:
                break
            before = objective
    return is_first


@njit(nogil=True)
def _add_scores(is_first, whole, half, score):  # type: ignore[no-untyped-def]
    """Add to each row its similarity to the first centre less that to the second.

    Returns ‖first‖ + ‖second‖ of the sums.

    half[k] is the similarity of row k to the sum of the first half.
    """
    a = b = 0.0
    for k in range(len(score)):
        if is_first[k]:
            a += half[k]
        else:
            b += whole[k] - half[k]
    a, b = np.sqrt(max(a, 0.0)), np.sqrt(max(b, 0.0))
    by_a, by_b = 1 / a if a > 0 else 0.0, 1 / b if b > 0 else 0.0
    for k in range(len(score)):
        score[k] += half[k] * by_a - (whole[k] - half[k]) * by_b
    return a + b


@njit(nogil=True)
def _score_rows(begin, end, ptr, index, value, dense, rows, direction, dense_direction, score):  # type: ignore[no-untyped-def]
    """Similarity of the rows begin:end of a node to the first centre less that to the second."""
    for i in range(begin, end):
        row = rows[i]
        total = _sparse_dot(ptr[row], ptr[row + 1], index, value, direction)
        for k in range(dense.shape[1]):
            total += dense[row, k] * dense_direction[k]
        score[i] = total


# Of the functions below and above, Python calls only those whose names have no underscore, and no
# loop calls these: numba cannot take a function from its cache that it has met inside another
# cached one.


@njit(nogil=True)
def start_on_sample(  # type: ignore[no-untyped-def]
    ptr,
    index,
    value,
    dense,
    rows,
    first,
    pairs,
    noise,
    tolerance,
    rounds,
    column_map,
    direction,
    dense_direction,
):
    """Write the best start on a sample of labels.

    The directions are float32 [V] (zeros before) and [D].
    """
    local = _compacted(ptr, index, value, rows, column_map)
    sample = np.arange(len(rows))
    found, dense_direction[:] = _best_start(
        local, dense[rows], sample, first, pairs, noise, tolerance, rounds
    )
    columns = local[3]
    for i in range(len(columns)):
        direction[columns[i]] = found[i]


@njit(nogil=True)
def score_some(begin, end, ptr, index, value, dense, rows, direction, dense_direction, score):  # type: ignore[no-untyped-def]
    """`_score_rows` for Python."""
    _score_rows(begin, end, ptr, index, value, dense, rows, direction, dense_direction, score)
