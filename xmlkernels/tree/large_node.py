"""Balanced spherical 2-means of a large node by all threads: scores by rows, sums by columns.

A column's sum is made by one thread in the order of the rows, so the result does not depend on the
number of threads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit

from xmlkernels.parallel import in_parallel, threads
from xmlkernels.tree.two_means import score_some, start_on_sample

_ROWS = 1024  # rows a thread scores at a time

Csr = tuple[np.ndarray, np.ndarray, np.ndarray]


def split_large(
    matrix: Csr,
    dense: np.ndarray,
    rows: np.ndarray,
    first: int,
    sample: np.ndarray,
    sample_first: int,
    pairs: np.ndarray,
    noise: np.ndarray,
    tolerance: float,
    rounds: int,
    column_map: np.ndarray,
    tick: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Split a node as `two_means.split_node` does, without a copy of its rows.

    Columns of each row must ascend. `tick` is called in each round.
    """
    direction = np.zeros(len(column_map), np.float32)
    dense_direction = np.zeros(dense.shape[1], np.float32)
    start_on_sample(
        *matrix,
        dense,
        rows[sample],
        sample_first,
        pairs,
        noise,
        tolerance,
        rounds,
        column_map,
        direction,
        dense_direction,
    )
    whole, half = np.zeros(len(direction)), np.zeros(len(direction))
    dense_whole, dense_half = np.zeros(dense.shape[1]), np.zeros(dense.shape[1])
    _add(matrix, dense, rows, np.ones(len(rows)), whole, dense_whole)
    score, is_first = np.empty(len(rows), np.float32), np.zeros(len(rows), bool)
    before = -np.inf
    for _ in range(rounds):
        tick()
        in_parallel(
            lambda a, b: score_some(a, b, *matrix, dense, rows, direction, dense_direction, score),
            len(rows),
            _ROWS,
        )
        chosen = np.zeros(len(rows), bool)
        chosen[np.argsort(-score, kind="stable")[:first]] = True
        moved = np.flatnonzero(chosen != is_first)
        _add(matrix, dense, rows[moved], np.where(chosen[moved], 1.0, -1.0), half, dense_half)
        is_first = chosen
        objective = _turn(whole, half, direction) + _turn(dense_whole, dense_half, dense_direction)
        if objective - before < tolerance * len(rows):
            break
        before = objective
    return is_first


def _turn(whole: np.ndarray, half: np.ndarray, direction: np.ndarray) -> float:
    """Write the difference of the two unit centres; return ‖first‖ + ‖second‖ of the sums.

    No BLAS: the order of its sums depends on its threads.
    """
    other = whole - half
    a, b = float(np.sqrt(np.square(half).sum())), float(np.sqrt(np.square(other).sum()))
    direction[:] = half / (a or 1.0) - other / (b or 1.0)
    return a + b


def _add(
    matrix: Csr,
    dense: np.ndarray,
    rows: np.ndarray,
    sign: np.ndarray,
    total: np.ndarray,
    dense_total: np.ndarray,
) -> None:
    """Add Σ sign · row to total.

    The threads share the columns, by the entries of some of the rows.
    """
    ptr, index, _ = matrix
    some = rows[:: max(1, len(rows) // 64)]
    seen = (
        np.sort(np.concatenate([index[ptr[row] : ptr[row + 1]] for row in some]))
        if len(rows)
        else index[:0]
    )
    parts = threads()
    inner = [int(seen[len(seen) * part // parts]) if len(seen) else 0 for part in range(1, parts)]
    bounds = [0, *inner, len(total)]
    in_parallel(
        lambda a, _: add_columns(*matrix, rows, sign, bounds[a], bounds[a + 1], total), parts, 1
    )
    add_dense(dense, rows, sign, dense_total)


@njit(nogil=True)
def add_columns(ptr, index, value, rows, sign, low, high, total):  # type: ignore[no-untyped-def]
    """Add Σ sign · row to total, in columns low:high alone."""
    for i in range(len(rows)):
        end = ptr[rows[i] + 1]
        a, b = ptr[rows[i]], end
        while a < b:  # to the first entry at or beyond `low`
            middle = (a + b) // 2
            if index[middle] < low:
                a = middle + 1
            else:
                b = middle
        while a < end and index[a] < high:
            total[index[a]] += sign[i] * value[a]
            a += 1


@njit(nogil=True)
def add_dense(dense, rows, sign, total):  # type: ignore[no-untyped-def]
    """Add Σ sign · row of the dense block to total."""
    for i in range(len(rows)):
        for k in range(dense.shape[1]):
            total[k] += sign[i] * dense[rows[i], k]
