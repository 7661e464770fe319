"""Products of sparse matrices, each row cut to its largest entries as it is made."""

from __future__ import annotations

import logging

import numpy as np
from numba import njit
from scipy.sparse import csr_matrix

from xmlkernels.errors import InputError
from xmlkernels.parallel import in_parallel, keep_compiled
from xmlkernels.ticks import Ticks

log = logging.getLogger(__name__)

_ROWS = 1 << 11  # rows a thread does at a time; their kept entries are held uncompacted


def top_product(a: csr_matrix, b: csr_matrix, keep: int, *, what: str = "product") -> csr_matrix:
    """Return the `keep` largest entries (by magnitude) of each row of a · b.

    Every row is summed by one thread in the order of its entries, so the result does not depend on
    their number. Memory besides the result: 12 bytes · V · threads, and one block of kept rows.

    Args:
        a: [n, m]; b: [m, V]; values are taken as fp32.
        keep: of equal entries the lower column stays.
        what: is made, for the lines of progress: one row is a label's.

    Returns:
        fp32 CSR [n, V], columns ascending; entries that are exactly 0 are left out.

    Raises:
        InputError: shapes that do not fit, or keep below 1.
    """
    if a.shape[1] != b.shape[0]:
        raise InputError(
            "product",
            f"{a.shape[1]} rows in the second matrix",
            str(b.shape[0]),
            "pass matrices that belong together",
        )
    if keep < 1:
        raise InputError("keep", "at least 1", str(keep), "keep more")
    n, width = a.shape[0], b.shape[1]
    operands, keep = (*_arrays(a), *_arrays(b)), min(keep, width)
    blocks: dict[int, tuple[np.ndarray, ...]] = {}

    def block(begin: int, end: int) -> None:
        index = np.empty((end - begin, keep), np.int32)
        value = np.empty((end - begin, keep), np.float32)
        count = np.zeros(end - begin, np.int64)
        _product(begin, *operands, width, keep, index, value, count)
        kept = np.arange(keep) < count[:, None]
        blocks[begin] = (index[kept], value[kept], count)

    keep_compiled(_product)
    in_parallel(block, n, _ROWS, done=Ticks(log, what, n, "labels").add)
    ends = np.concatenate(
        [np.zeros(1, np.int64), np.cumsum(np.concatenate([*_third(blocks), np.zeros(0, np.int64)]))]
    )
    indices, values = np.empty(ends[-1], np.int32), np.empty(ends[-1], np.float32)
    # Each block is freed as it is copied: the result is never in memory twice.
    for begin in sorted(blocks):
        index, value, _ = blocks.pop(begin)
        indices[ends[begin] : ends[begin] + len(index)] = index
        values[ends[begin] : ends[begin] + len(index)] = value
    return csr_matrix((values, indices, ends), shape=(n, width))


def _third(blocks: dict[int, tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    return [blocks[begin][2] for begin in sorted(blocks)]


def unit_rows(matrix: csr_matrix, *, in_place: bool = False) -> csr_matrix:
    """Return fp32 with rows of length 1, columns ascending; rows of zeros stay.

    A copy, or the matrix itself (fp32 alone).
    """
    unit = (
        matrix
        if in_place and matrix.dtype == np.float32
        else csr_matrix(matrix, dtype=np.float32, copy=True)
    )
    unit.sum_duplicates()
    keep_compiled(_normalise)
    in_parallel(
        lambda begin, end: _normalise(begin, end, unit.indptr, unit.data), unit.shape[0], _ROWS
    )
    return unit


def _arrays(matrix: csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        matrix.indptr.astype(np.int64),
        matrix.indices.astype(np.int32, copy=False),
        matrix.data.astype(np.float32, copy=False),
    )


@njit(nogil=True)
def _product(  # type: ignore[no-untyped-def]
    start, a_ptr, a_index, a_value, b_ptr, b_index, b_value, width, keep, index, value, count
):
    total, seen = np.zeros(width, np.float32), np.full(width, -1, np.int32)
    touched = np.empty(width, np.int32)
    for row in range(len(count)):
        n = 0
        for i in range(a_ptr[start + row], a_ptr[start + row + 1]):
            factor, inner = a_value[i], a_index[i]
            for j in range(b_ptr[inner], b_ptr[inner + 1]):
                column = b_index[j]
                if seen[column] != row:
                    seen[column] = row
                    total[column] = np.float32(0)
                    touched[n] = column
                    n += 1
                total[column] += factor * b_value[j]
        count[row] = _largest(total, touched[:n], keep, index[row], value[row])


@njit(nogil=True)
def _largest(total, touched, keep, index, value):  # type: ignore[no-untyped-def]
    """Write the entries that stay, by column; return their number."""
    least = np.float32(0)
    if len(touched) > keep:
        size = np.empty(len(touched), np.float32)
        for i in range(len(touched)):
            size[i] = abs(total[touched[i]])
        least = np.partition(size, len(size) - keep)[len(size) - keep]
    n = ties = 0
    for (
        column
    ) in touched:  # the places of `touched` already read take the columns of just this magnitude
        here = abs(total[column])
        if here > least:
            index[n] = column
            n += 1
        elif here == least and here > 0:
            touched[ties] = column
            ties += 1
    tied = touched[:ties]
    tied.sort()
    for i in range(min(ties, keep - n)):
        index[n + i] = tied[i]
    n += min(ties, keep - n)
    kept = index[:n]
    kept.sort()
    for i in range(n):
        value[i] = total[kept[i]]
    return n


@njit(nogil=True)
def _normalise(begin, end, ptr, value):  # type: ignore[no-untyped-def]
    for row in range(begin, end):
        total = 0.0
        for i in range(ptr[row], ptr[row + 1]):
            total += np.float64(value[i]) ** 2
        if total > 0:
            factor = np.float32(1 / np.sqrt(total))
            for i in range(ptr[row], ptr[row + 1]):
                value[i] *= factor
