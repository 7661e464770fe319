"""Pieces of a table's rows, in whole pages of its files, read and written many at once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import numpy as np
from torch import Tensor

from xmlkernels.rows import PAGE, FileRows, Rows, row_bytes

AT_ONCE = 16  # requests on their way: a disk does more of them in the same time
GAP = 16 << 10  # bytes between two pieces that are carried along: a request costs about as much

_Carry = Callable[..., tuple[int, int] | None]


@dataclass(frozen=True)
class Pieces:
    """Ranges of rows in which one buffer is carried.

    Attributes:
        start, stop: int64 [n], ascending; they do not overlap.
    """

    start: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True)
class Part:
    """What is carried of one buffer.

    Attributes:
        rows: where it stands.
        pieces: of it.
        held: memory for rows from `first` on, contiguous, on the CPU.
        first: a row that begins a page.
    """

    rows: Any
    pieces: Pieces
    held: Tensor
    first: int

    def views(self) -> list[tuple[int, Tensor]]:
        """Give the first row and the memory of each piece."""
        first = self.first
        ranges = zip(self.pieces.start.tolist(), self.pieces.stop.tolist(), strict=True)
        return [(start, self.held[start - first : stop - first]) for start, stop in ranges]


def in_pages(rows: Rows | Tensor, start: np.ndarray, stop: np.ndarray) -> Pieces:
    """Round ranges of rows to whole pages of their buffer, and join those that are near.

    Args:
        rows: the buffer, from the beginning of a page on.
        start, stop: int64 [n], n > 0, ascending; the ranges do not overlap.
    """
    each = row_bytes(rows)
    first, end = _rounded(rows, start, stop)
    new = np.ones(len(first), dtype=bool)
    new[1:] = first[1:] > end[:-1] + GAP // each
    return Pieces(first[new], end[np.roll(new, -1)])


def carried_bytes(rows: Rows | Tensor, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Count the bytes that each range adds to what those before it carry, as `in_pages` joins them.

    Returns:
        int64 [n].
    """
    each = row_bytes(rows)
    first, end = _rounded(rows, start, stop)
    near = first[1:] <= end[:-1] + GAP // each
    first[1:][near] = end[:-1][near]
    added: np.ndarray = (end - first) * each
    return added


def _rounded(
    rows: Rows | Tensor, start: np.ndarray, stop: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    unit = PAGE // gcd(PAGE, row_bytes(rows))
    return start // unit * unit, np.minimum(-(-stop // unit) * unit, rows.shape[0])


def carry(parts: Sequence[Part], threads: Executor, *, writes: bool) -> None:
    """Read pieces into memory, or write them from it, several at once.

    Whole pages of files go by one call of native code. What is elsewhere, or begins within a page,
    and all of it where that is not built, goes piece by piece by the given threads.

    Args:
        parts: of each buffer.
        threads: at least `AT_ONCE` of them.
        writes: whether they are written.

    Raises:
        InputError: rows cannot be read.
        OSError: the disk refuses.
    """
    native = _native()
    paged, rest = list[Part](), list[Part]()
    for part in parts:
        (rest if native is None or not _is_paged(part) else paged).append(part)
    if native is not None and paged:
        _carry_paged(native, paged, writes)
    one_by_one = [(part.rows, *piece) for part in rest for piece in part.views()]
    several = AT_ONCE if len(one_by_one) > len(rest) else 1  # else: whole tiles

    def some(first: int) -> None:
        for rows, start, values in one_by_one[first::several]:
            (rows.write if writes else rows.read)(start, values)

    done = [threads.submit(some, first) for first in range(1, several)]
    try:
        some(0)
    finally:
        for future in done:
            future.exception()  # waits: nothing touches the buffers any more
    for future in done:
        future.result()


def _is_paged(part: Part) -> bool:
    rows = part.rows
    if not isinstance(rows, FileRows) or not rows.direct or rows.offset % PAGE:
        return False
    return part.held.data_ptr() % PAGE == 0


def _carry_paged(native: _Carry, parts: Sequence[Part], writes: bool) -> None:
    each = [row_bytes(part.rows) for part in parts]
    counts = [len(part.pieces) for part in parts]
    starts, stops = ([getattr(part.pieces, name) for part in parts] for name in ("start", "stop"))
    place = [s * n + part.rows.offset for s, n, part in zip(starts, each, parts, strict=True)]
    memory = [
        (s - part.first) * n + part.held.data_ptr()
        for s, n, part in zip(starts, each, parts, strict=True)
    ]
    bytes_ = [(stop - s) * n for s, stop, n in zip(starts, stops, each, strict=True)]
    file = np.repeat([part.rows.file for part in parts], counts).astype(np.int64)
    arrays = map(np.concatenate, (place, memory, bytes_))
    failed = native(file, *arrays, writes, AT_ONCE)
    if failed is None:
        return
    piece, error = failed
    part = parts[int(np.searchsorted(np.cumsum(counts), piece, side="right"))]
    raise part.rows.failed(error, int(np.concatenate(place)[piece] + np.concatenate(bytes_)[piece]))


@lru_cache(maxsize=1)
def _native() -> _Carry | None:
    try:
        from xmlkernels._host import carry as native
    except ImportError as error:
        if os.environ.get("XMLKERNELS_REQUIRE_NATIVE") == "1":
            raise
        warnings.warn(
            f"native code that reads many pieces of a table at once is not built ({error}); Python "
            "does the same, slower",
            RuntimeWarning,
            stacklevel=4,
        )
        return None
    found: _Carry = native
    return found
