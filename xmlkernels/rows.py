"""Rows that no memory holds as a whole: in a file, or elsewhere, and read block by block.

A tensor on the meta device stands in for them (`stand_in`), wherever names, shapes and formats are
looked at: it has those, holds no memory, and `rows_behind` gives the rows themselves.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from xmlkernels.errors import InputError
from xmlkernels.files import naming

PAGE = 4096  # what reads and writes past the cache of files are multiples of
BLOCK = 32 << 20  # bytes read at a time where nobody says how many
_BOUNCE = 8 << 20  # bytes of the buffer for reads that begin or end within a page
_DIRECT = getattr(os, "O_DIRECT", 0)  # not every system has it


class Rows(Protocol):
    """A tensor [n, …] that is not in memory as a whole.

    Attributes:
        shape, dtype: of the tensor.
    """

    shape: torch.Size
    dtype: torch.dtype

    def read(self, start: int, out: Tensor) -> None:
        """Fill `out`, contiguous and on the CPU, with as many rows from `start` on as it has.

        Raises:
            InputError: they are not what they were: cut short, or half of them of another step.
        """


class RowRange:
    """Rows `first` to `end` - 1 of others."""

    def __init__(self, rows: Rows, first: int, end: int) -> None:
        self._rows, self._first = rows, first
        self.shape, self.dtype = torch.Size((end - first, *rows.shape[1:])), rows.dtype

    def read(self, start: int, out: Tensor) -> None:
        """Fill `out` with rows from `start` on; see `Rows.read`."""
        self._rows.read(self._first + start, out)


def row_bytes(rows: Rows | Tensor) -> int:
    """Bytes of one row."""
    return rows.shape[1:].numel() * rows.dtype.itemsize


def row_blocks(rows: Rows, count: int = 0) -> Iterator[Tensor]:
    """Read all rows in turn, in one buffer that each block overwrites.

    Args:
        rows: of any shape and format.
        count: rows of a block; 0: as many as have 32 MiB.
    """
    count = count or max(1, BLOCK // max(1, row_bytes(rows)))
    held = pages(min(count, rows.shape[0]) * row_bytes(rows))
    for start in range(0, rows.shape[0], count):
        out = as_rows(held, min(count, rows.shape[0] - start), rows)
        rows.read(start, out)
        yield out


def as_rows(held: Tensor, count: int, like: Rows | Tensor) -> Tensor:
    """View the first bytes of a buffer, uint8 [m], as `count` rows of a tensor's format."""
    used = held[: count * row_bytes(like)].view(like.dtype)
    return used.view(count, *like.shape[1:])


def pages(count: int, *, pinned: bool = False) -> Tensor:
    """Make a buffer uint8 [m] of whole pages, m at least `count`; `pinned` for a card's copies."""
    size = max(1, -(-count // PAGE)) * PAGE
    if pinned:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def stand_in(rows: Rows) -> Tensor:
    """Make a tensor without memory that `rows_behind` finds the rows of."""
    out = torch.empty(rows.shape, dtype=rows.dtype, device="meta")
    out._rows = rows  # type: ignore[attr-defined]
    return out


def rows_behind(tensor: Tensor) -> Rows | None:
    """Give the rows that a tensor stands in for; None for one that holds its own values."""
    found: Rows | None = getattr(tensor, "_rows", None)
    return found


def in_memory(tensor: Tensor) -> Tensor:
    """Read what a tensor stands in for as a whole; any other is handed on as it is."""
    rows = rows_behind(tensor)
    if rows is None:
        return tensor
    out = torch.empty(rows.shape, dtype=rows.dtype)
    rows.read(0, out)
    return out


class FileRows:
    """Rows of a file, raw and little-endian, from `offset` on.

    Reads and writes go past the system's cache of files (O_DIRECT) where the file system allows it:
    a table that is larger than memory would only push everything else out of it, and be copied
    once more. Elsewhere what was read or written is dropped from the cache.

    Attributes:
        shape, dtype: of the tensor.
        writes: whether it may be written.
        file: its descriptor.
        offset: bytes before its first row.
        direct: whether reads and writes go past the cache.

    Args:
        path: of the file; it may be renamed or removed as soon as this is made.
        shape, dtype: of the tensor.
        offset: bytes before its first row.
        writes: it may be written, and is made where it is not there.

    Raises:
        OSError: the file cannot be opened, or the disk has no room for it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: torch.Size | tuple[int, ...],
        dtype: torch.dtype,
        *,
        offset: int = 0,
        writes: bool = False,
    ) -> None:
        self.path, self.shape, self.dtype = Path(path), torch.Size(shape), dtype
        self.writes = writes
        self.offset, self._row = offset, torch.Size(shape)[1:].numel() * dtype.itemsize
        self._bounces = threading.local()
        how = os.O_RDWR | os.O_CREAT if writes else os.O_RDONLY
        self.file = os.open(path, how, 0o666)
        try:
            if writes:
                _make_room(self.file, offset + self.shape[0] * self._row)
            self.direct = self._past_the_cache(how)
        except BaseException:
            os.close(self.file)
            raise

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self.file)

    def _past_the_cache(self, how: int) -> bool:
        """Open the file anew without the cache, and see whether a page can be read so."""
        if not _DIRECT:
            return False
        try:
            file = os.open(self.path, how & ~os.O_CREAT | _DIRECT)
        except OSError:
            return False
        try:
            os.preadv(file, [_view(pages(PAGE))], 0)
        except OSError:
            os.close(file)
            return False
        os.close(self.file)
        self.file = file
        return True

    def read(self, start: int, out: Tensor) -> None:
        """Fill `out` with rows from `start` on; see `Rows.read`."""
        first, count = self.offset + start * self._row, out.numel() * out.itemsize
        if not count:
            return
        whole = first % PAGE == 0 and out.data_ptr() % PAGE == 0
        if not self.direct:
            self._fill(first, _view(out), count)
            _drop(self.file, first, count)
            return
        straight = count // PAGE * PAGE if whole else 0
        if straight:
            self._fill(first, _view(out)[:straight], straight)
        if straight < count:
            self._around(first + straight, _view(out)[straight:])

    def _around(self, first: int, out: memoryview) -> None:
        """Read bytes that begin or end within a page, by a buffer of whole pages."""
        bounce: Tensor | None = getattr(self._bounces, "held", None)
        if bounce is None:
            bounce = self._bounces.held = pages(_BOUNCE)
        view, done = _view(bounce), 0
        while done < len(out):
            before = (first + done) % PAGE
            part = min(len(out) - done, _BOUNCE - before)
            asked = -(-(before + part) // PAGE) * PAGE
            self._fill(first + done - before, view[:asked], before + part)
            out[done : done + part] = view[before : before + part]
            done += part

    def _fill(self, first: int, out: memoryview, needed: int) -> None:
        """Read into `out`; at least the bytes needed must be there."""
        done = 0
        while done < needed:
            with naming(self.path):
                got = os.preadv(self.file, [out[done:]], first + done)
            if not got:
                raise self.failed(0, first + needed)
            done += got

    def failed(self, error: int, end: int) -> Exception:
        """Say why bytes before `end` were not carried: errno, or 0 where the file ends before."""
        if error:
            return OSError(error, os.strerror(error), str(self.path))
        expected = f"{end:,} bytes, and rows to there"
        mend = "go on from a checkpoint that is whole"
        got = f"{os.fstat(self.file).st_size:,} bytes"
        return InputError(str(self.path), expected, got, mend)

    def write(self, start: int, values: Tensor) -> None:
        """Write rows from `start` on.

        Args:
            start: their first byte begins a page.
            values: contiguous, on the CPU, at the beginning of a buffer of `pages`: what follows
                them there, up to a whole page, is written too, unless it would overwrite rows.

        Raises:
            ValueError: rows that begin or end within a page of others.
            OSError: the disk refuses.
        """
        first, count = self.offset + start * self._row, values.numel() * values.itemsize
        last = start + len(values) == self.shape[0]
        if not count:
            return
        if first % PAGE or (count % PAGE and not last):
            raise ValueError("rows that are written begin and end with a page")
        whole = -(-count // PAGE) * PAGE if self.direct else count
        data = (ctypes.c_char * whole).from_address(values.data_ptr())
        view, done = memoryview(data).cast("B"), 0
        while done < whole:
            with naming(self.path):
                done += os.pwritev(self.file, [view[done:]], first + done)
        if not self.direct:
            _drop(self.file, first, count)


def _view(tensor: Tensor) -> memoryview:
    """Give a tensor's memory as bytes."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return flat.numpy().data.cast("B") if flat.numel() else memoryview(b"")


def _drop(file: int, first: int, count: int) -> None:
    """Tell the system that it need not keep these bytes in its cache."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, first, count, os.POSIX_FADV_DONTNEED)


def _make_room(file: int, count: int) -> None:
    """Make a file of whole pages of zeros, so that a full disk is told of before the first step."""
    size = max(1, -(-count // PAGE)) * PAGE
    os.ftruncate(file, 0)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    os.ftruncate(file, size)
