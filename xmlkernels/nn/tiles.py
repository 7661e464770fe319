"""The stream of a table's tiles to the device that works on them, and back.

A tile is a range of rows: a shard of the table for as long as it is worked on. While an op works on
tile i, a thread reads tile i + 1 and another writes tile i - 1 back; three sets of buffers go
round. Of a tile of which some rows alone are asked for, the pages are read and written that hold
those; the other rows of its buffers are of other tiles, or zeros. On the CPU such a tile reaches
over many more rows than memory holds: addresses, of which those pages alone take memory. That of an
fp8 table does not.
"""

from __future__ import annotations

import mmap
import platform
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xmlkernels.nn.pieces import AT_ONCE, Part, Pieces, carried_bytes, carry, in_pages
from xmlkernels.nn.table import FIRST_SCALE
from xmlkernels.nn.table_store import HostRows, Place
from xmlkernels.rows import PAGE, Rows, as_rows, pages, row_bytes

TILE_BYTES = 64 << 20  # of one tile, all buffers together
REACH = 4 << 30  # bytes of addresses of a tile of some rows; a page of 2 MiB takes 4 KiB of tables
LEAST = 4 << 20  # bytes of a tile of some rows: fewer keep no disk busy
PARTS = 6  # tiles of a step that carries more, at least, so that it reads while it works
_SETS = 3  # one is read, one worked on, one written


@dataclass
class _Set:
    """Buffers for one tile.

    Attributes:
        host: uint8, in pages, by name; what is read from and written to.
        device: the same where the op works; host's own where that is the CPU and the rows come
            from files.
        maps: of the host's buffers whose pages are given back after use.
        free: when its last use ends; the next waits for it.
        sparse: whether its last use was of some rows of a tile.
    """

    host: dict[str, Tensor]
    device: dict[str, Tensor]
    maps: list[mmap.mmap]
    free: Future[None] | None = None
    sparse: bool = False

    def begin(self, sparse: bool) -> None:
        """Wait for its last use, and give back what that took where it is in the way."""
        if self.free is not None:
            self.free.result()
        if sparse or self.sparse:
            for held in self.maps:
                held.madvise(mmap.MADV_DONTNEED)
        self.sparse = sparse


@dataclass(frozen=True)
class Window:
    """Rows that are worked on together.

    Attributes:
        first, end: rows that they lie between; the buffers of a tile begin with the first.
        start, stop: int64 [n], ranges of rows that are carried, ascending; None: all.
    """

    first: int
    end: int
    start: np.ndarray | None = None
    stop: np.ndarray | None = None


@dataclass(frozen=True)
class Tile:
    """A tile that is worked on.

    Attributes:
        first, end: its rows, in the table that is held here.
        buffers: [end - first, …] by name, on the device of the op.
    """

    first: int
    end: int
    buffers: dict[str, Tensor] = field(repr=False)


class Tiles:
    """Streams the tiles of a table to a device and back.

    Sums over all tiles depend on how many rows a tile has; that depends on the formats of the
    buffers alone: a power of two, at least 4,096, so that tiles begin with a page and with a group
    of labels. Sums over tiles of some rows depend on which rows those are.

    Attributes:
        per_tile: rows of a tile; the last has fewer.
        reach: rows over which a tile of some rows reaches at most.

    Args:
        place: the rows.
        device: where the op works.
        most: rows that are worked on together: a tile may reach beyond its end by one less.
    """

    def __init__(self, place: Place, device: torch.device, most: int = 1) -> None:
        self.place, self.device = place, device
        self.rows = next(iter(place.rows.values())).shape[0]
        self.per_tile = tile_rows(place.rows.values(), most)
        self._each = sum(map(row_bytes, place.rows.values()))
        reach = _held_rows(self.per_tile, most)
        # The scales of all rows of a tile are looked at, those that are not carried too.
        self._wide = device.type != "cuda" and "row_scale" not in place.rows
        if self._wide:
            reach = max(reach, REACH // max(1, self._each) // PAGE * PAGE)
        self.reach = min(self.rows, reach)
        self._sets: list[_Set] = []
        self._reader = ThreadPoolExecutor(1, "tile-reader")
        self._writer = ThreadPoolExecutor(1, "tile-writer")
        self._several = ThreadPoolExecutor(2 * AT_ONCE, "tile-piece")

    def ranges(self) -> list[tuple[int, int]]:
        """(first, end) of each tile."""
        step, n = self.per_tile, self.rows
        return [(start, min(start + step, n)) for start in range(0, n, step)]

    def windows(self, start: Tensor, end: Tensor) -> list[Window]:
        """Gather ranges of rows into tiles of about as many bytes. Waits for the device.

        Tiles have the bytes of `TILE_BYTES` at most, or those that begin within 4,096 rows: no page
        is that of more than two, which follow each other. A range is never cut.

        Args:
            start, end: int64 [n], of each range, none longer than `most`, ascending; they do not
                overlap.
        """
        starts, ends = start.cpu().numpy(), end.cpu().numpy()
        if not len(starts):
            return []
        held = self.place.rows.values()
        total = np.cumsum(sum(carried_bytes(rows, starts, ends) for rows in held))
        limit = min(self.per_tile * self._each, max(LEAST, int(total[-1]) // PARTS))
        out, begin = list[Window](), 0
        while begin < len(starts):
            first = int(starts[begin]) // PAGE * PAGE
            full = np.searchsorted(total, (total[begin - 1] if begin else 0) + limit, "right")
            near = np.searchsorted(starts, first + PAGE)
            last = min(max(full, near), np.searchsorted(ends, first + self.reach, "right"))
            own = slice(begin, int(last))
            out.append(Window(first, int(ends[last - 1]), starts[own], ends[own]))
            begin = int(last)
        return out

    def stream(
        self,
        windows: Iterable[Window] | None = None,
        *,
        reads: Sequence[str],
        writes: Sequence[str] = (),
    ) -> Iterator[Tile]:
        """Give tiles in turn; when the next is asked for, one is written back.

        Args:
            windows: of `windows`; None: all tiles, whole.
            reads: buffers that are read; those that are written alone hold anything.
            writes: buffers that are written.

        Raises:
            InputError: the rows cannot be read.
            OSError: the disk refuses.
        """
        names = tuple(dict.fromkeys((*reads, *writes)))
        if windows is None:
            windows = (Window(first, end) for first, end in self.ranges())
        waiting, sets, writing = iter(windows), deque(self._free_sets()), deque[Future[None]]()
        reading = deque[tuple[Window, _Set, Future[dict[str, Pieces]]]]()
        before: tuple[Window, _Set, dict[str, Pieces]] | None = None

        def begin() -> None:
            part = next(waiting, None)
            if part is not None:
                held = sets.popleft()
                reading.append((part, held, self._reader.submit(self._read, held, part, reads)))

        try:
            begin()
            while reading:
                window, held, read = reading.popleft()
                begin()
                pieces = read.result()
                if before is not None:
                    self._hand_on(*before, window, held, pieces, writes)
                pieces |= self._pieces(window, [n for n in writes if n not in pieces])
                first, end = window.first, window.end
                yield Tile(first, end, self._views(held, names, end - first))
                own = {name: pieces[name] for name in writes}
                done = self._writer.submit(self._write, held, first, own, _recorded(self.device))
                held.free, before = done, (window, held, pieces)
                sets.append(held)
                writing.append(done)
                while writing and writing[0].done():
                    writing.popleft().result()
        finally:
            left: list[Future[Any]] = [read for _, _, read in reading]
            for read in left:
                read.cancel()
            for future in (*left, *writing):
                if not future.cancelled():
                    future.exception()  # waits; nothing touches the buffers any more
        for future in writing:
            future.result()

    def _free_sets(self) -> list[_Set]:
        while len(self._sets) < _SETS:
            host, maps, size = dict[str, Tensor](), list[mmap.mmap](), self.reach
            pinned = self.device.type == "cuda"
            for name, rows in self.place.rows.items():
                count = size * row_bytes(rows)
                if self._wide:
                    maps.append(_addresses(count))
                    host[name] = torch.frombuffer(maps[-1], dtype=torch.uint8)
                else:
                    straight = pinned and isinstance(rows, HostRows)
                    host[name] = pages(0 if straight else count, pinned=pinned)
            device = host
            if pinned:
                device = {
                    name: torch.zeros(size * row_bytes(rows), dtype=torch.uint8, device=self.device)
                    for name, rows in self.place.rows.items()
                }
            if "row_scale" in device:
                rows = self.place.rows["row_scale"]
                as_rows(device["row_scale"], size, rows).copy_(torch.tensor([FIRST_SCALE, 0.0]))
            self._sets.append(_Set(host, device, maps))
        for held in self._sets:
            held.free = None
        return self._sets

    def _views(self, held: _Set, names: Sequence[str], count: int) -> dict[str, Tensor]:
        return {n: as_rows(held.device[n], count, self.place.rows[n]) for n in names}

    def _hand_on(
        self,
        before: Window,
        other: _Set,
        its: Mapping[str, Pieces],
        window: Window,
        held: _Set,
        pieces: Mapping[str, Pieces],
        names: Sequence[str],
    ) -> None:
        """Copy the rows that the tile before has changed, of the page that both carry.

        They were read before, or while, they were written. Both tiles write that page, this one
        last.
        """
        for name in names:
            if name not in pieces:
                continue
            start, stop = int(pieces[name].start[0]), int(its[name].stop[-1])
            if start < stop:
                rows = self.place.rows[name]
                into = as_rows(held.device[name], self.reach, rows)
                source = as_rows(other.device[name], self.reach, rows)
                at = slice(start - before.first, stop - before.first)
                into[start - window.first : stop - window.first].copy_(source[at])

    def _pieces(self, window: Window, names: Iterable[str]) -> dict[str, Pieces]:
        """Give the ranges of rows, in whole pages, in which each buffer of a tile is carried."""
        if window.start is None or window.stop is None:
            whole = Pieces(np.array([window.first]), np.array([window.end]))
            return dict.fromkeys(names, whole)
        return {n: in_pages(self.place.rows[n], window.start, window.stop) for n in names}

    def _read(self, held: _Set, window: Window, names: Sequence[str]) -> dict[str, Pieces]:
        held.begin(window.start is not None)
        pieces = self._pieces(window, names)
        parts, copies = self._parts(held, window.first, pieces)
        carry(parts, self._several, writes=False)
        _copied([(there, here) for here, there in copies])
        return pieces

    def _parts(
        self, held: _Set, first: int, pieces: Mapping[str, Pieces]
    ) -> tuple[list[Part], list[tuple[Tensor, Tensor]]]:
        """Give what is read or written, and what is copied between host and card: (host, card).

        Nothing is read or written where the rows of the host are the table's own, and there is
        nothing to copy where the op works on the host.
        """
        parts, copies = list[Part](), list[tuple[Tensor, Tensor]]()
        for name, own in pieces.items():
            rows: Any = self.place.rows[name]
            if self.device.type != "cuda":
                parts.append(Part(rows, own, as_rows(held.host[name], self.reach, rows), first))
                continue
            if isinstance(rows, HostRows):
                part = Part(rows, own, rows.values[first:], first)
            else:
                part = Part(rows, own, as_rows(held.host[name], self.reach, rows), first)
                parts.append(part)
            card = Part(rows, own, as_rows(held.device[name], self.reach, rows), first)
            pairs = zip(part.views(), card.views(), strict=True)
            copies += [(here, there) for (_, here), (_, there) in pairs]
        return parts, copies

    def _write(self, held: _Set, first: int, pieces: Mapping[str, Pieces], worked: Any) -> None:
        if worked is not None:
            worked.synchronize()
        parts, copies = self._parts(held, first, pieces)
        _copied(copies)
        carry(parts, self._several, writes=True)


def tile_rows(rows: Iterable[Rows | Tensor], most: int = 1) -> int:
    """Rows of a tile whose buffers are those of a table; see `Tiles`."""
    fit = max(1, TILE_BYTES // max(1, sum(map(row_bytes, rows))))
    return max(PAGE, 1 << (fit.bit_length() - 1), 1 << (most - 1).bit_length())


def staging_bytes(rows: Iterable[Rows | Tensor], count: int, most: int = 1) -> int:
    """Bytes of the buffers that the tiles of a table of `count` rows go through."""
    held = list(rows)
    return _SETS * min(_held_rows(tile_rows(held, most), most), count) * sum(map(row_bytes, held))


def _addresses(count: int) -> mmap.mmap:
    """Take a range of addresses; a page takes memory once it is touched, until it is given back."""
    size = max(1, -(-count // PAGE)) * PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64"):
        flags |= 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
    held = mmap.mmap(-1, size, flags=flags)
    for advice in ("MADV_NOHUGEPAGE", "MADV_DONTFORK"):  # a page of 4 KiB is one; ours alone
        if hasattr(mmap, advice):
            held.madvise(getattr(mmap, advice))
    return held


def _held_rows(per_tile: int, most: int) -> int:
    """Rows that the buffers of a tile have room for: those beyond its end fill whole pages."""
    return per_tile + -(-(most - 1) // PAGE) * PAGE


def _recorded(device: torch.device) -> Any:
    """Record where a card's work on a tile ends; None on the CPU, whose ops have ended."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _copied(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy from host to card, or back, on a stream of this thread alone, and wait for it.

    Args:
        copies: (out, source) of each.
    """
    if not copies:
        return
    out, source = copies[0]
    stream = torch.cuda.Stream(out.device if out.is_cuda else source.device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for out, source in copies:
            out.copy_(source, non_blocking=True)
    stream.synchronize()
