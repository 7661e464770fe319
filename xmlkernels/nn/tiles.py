"""The stream of a table's tiles to the device that works on them, and back.

A tile is a range of rows: a shard of the table for as long as it is worked on. While an op works on
tile i, a thread reads tile i + 1 and another writes tile i - 1 back; three sets of buffers go
round. Of a tile of which some rows alone are asked for, the pages are read and written that hold
those; the other rows of its buffers are of other tiles, or zeros.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import torch
from torch import Tensor

from xmlkernels.nn.table_store import HostRows, Place
from xmlkernels.rows import PAGE, Rows, as_rows, pages, row_bytes

TILE_BYTES = 64 << 20  # of one tile, all buffers together
_SETS = 3  # one is read, one worked on, one written
_AT_ONCE = 8  # pieces on their way: a disk does more of them in the same time
_GAP = 64 << 10  # bytes between two pieces that are read along: a read of its own takes as long

Spans = Mapping[int, Sequence[tuple[int, int]]]
_Pieces = dict[str, list[tuple[int, int]]]  # ranges of rows by the name of the buffer


@dataclass
class _Set:
    """Buffers for one tile.

    Attributes:
        host: uint8, in pages, by name; what is read from and written to.
        device: the same where the op works; host's own where that is the CPU and the rows come
            from files.
        free: when its last use ends; the next waits for it.
    """

    host: dict[str, Tensor]
    device: dict[str, Tensor]
    free: Future[None] | None = None


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

    Sums over tiles depend on how many rows a tile has; that depends on the formats of the buffers
    alone: a power of two, at least 4,096, so that tiles begin with a page and with a group of
    labels.

    Attributes:
        per_tile: rows of a tile; the last has fewer.

    Args:
        place: the rows.
        device: where the op works.
        most: rows that are worked on together: a tile may reach beyond its end by one less.
    """

    def __init__(self, place: Place, device: torch.device, most: int = 1) -> None:
        self.place, self.device = place, device
        self.rows = next(iter(place.rows.values())).shape[0]
        self.per_tile = tile_rows(place.rows.values(), most)
        self._held = min(self.rows, _held_rows(self.per_tile, most))
        self._sets: list[_Set] = []
        self._reader = ThreadPoolExecutor(1, "tile-reader")
        self._writer = ThreadPoolExecutor(1, "tile-writer")
        self._several = ThreadPoolExecutor(_AT_ONCE, "tile-piece")

    def ranges(self) -> list[tuple[int, int]]:
        """(first, end) of each tile."""
        step, n = self.per_tile, self.rows
        return [(start, min(start + step, n)) for start in range(0, n, step)]

    def stream(
        self,
        ranges: Iterable[tuple[int, int]],
        *,
        reads: Sequence[str],
        writes: Sequence[str] = (),
        spans: Spans | None = None,
    ) -> Iterator[Tile]:
        """Give tiles in turn; when the next is asked for, one is written back.

        Args:
            ranges: some of `ranges`, ascending. With `spans` one may end beyond its tile, in the
                next; that has its rows as they were left.
            reads: buffers that are read; those that are written alone hold anything.
            writes: buffers that are written.
            spans: by the first row of a range, the rows in it that are read and written, ascending,
                as (first, end); None: all.

        Raises:
            InputError: the rows cannot be read.
            OSError: the disk refuses.
        """
        names = tuple(dict.fromkeys((*reads, *writes)))
        waiting, sets, writing = iter(ranges), deque(self._free_sets()), deque[Future[None]]()
        reading = deque[tuple[tuple[int, int], _Set, _Pieces, Future[None]]]()
        before: tuple[int, int, _Set] | None = None

        def begin() -> None:
            part = next(waiting, None)
            if part is not None:
                held = sets.popleft()
                pieces = self._pieces(part, names, spans)
                own = {name: pieces[name] for name in reads}
                read = self._reader.submit(self._read, held, part[0], own)
                reading.append((part, held, pieces, read))

        try:
            begin()
            while reading:
                (first, end), held, pieces, read = reading.popleft()
                begin()
                read.result()
                if before is not None and first < before[1]:
                    self._hand_on(before, first, held, writes)
                yield Tile(first, end, self._views(held, names, end - first))
                own = {name: pieces[name] for name in writes}
                done = self._writer.submit(self._write, held, first, own, _recorded(self.device))
                held.free, before = done, (first, end, held)
                sets.append(held)
                writing.append(done)
                while writing and writing[0].done():
                    writing.popleft().result()
        finally:
            for *_, read in reading:
                read.cancel()
            for future in (*(read for *_, read in reading), *writing):
                if not future.cancelled():
                    future.exception()  # waits; nothing touches the buffers any more
        for future in writing:
            future.result()

    def _free_sets(self) -> list[_Set]:
        while len(self._sets) < _SETS:
            host, size = dict[str, Tensor](), self._held
            pinned = self.device.type == "cuda"
            for name, rows in self.place.rows.items():
                straight = pinned and isinstance(rows, HostRows)
                host[name] = pages(0 if straight else size * row_bytes(rows), pinned=pinned)
            device = host
            if pinned:
                device = {
                    name: torch.zeros(size * row_bytes(rows), dtype=torch.uint8, device=self.device)
                    for name, rows in self.place.rows.items()
                }
            self._sets.append(_Set(host, device))
        for held in self._sets:
            held.free = None
        return self._sets

    def _views(self, held: _Set, names: Sequence[str], count: int) -> dict[str, Tensor]:
        return {n: as_rows(held.device[n], count, self.place.rows[n]) for n in names}

    def _hand_on(
        self, before: tuple[int, int, _Set], first: int, held: _Set, names: Sequence[str]
    ) -> None:
        """Copy the rows from `first` on that the tile before has changed.

        They were read before, or while, they were written. Both tiles write the pages that they
        share, this one last.
        """
        its, end, other = before
        into = self._views(held, names, end - first)
        for name, rows in self._views(other, names, end - its).items():
            into[name].copy_(rows[first - its :])

    def _pieces(self, part: tuple[int, int], names: Sequence[str], spans: Spans | None) -> _Pieces:
        """Give the ranges of rows, in whole pages, in which each buffer of a tile is carried."""
        if spans is None:
            return {name: [part] for name in names}
        out = _Pieces()
        for name in names:
            each = row_bytes(self.place.rows[name])
            unit, pieces = PAGE // gcd(PAGE, each), list[tuple[int, int]]()
            for first, end in spans[part[0]]:
                start, stop = first // unit * unit, min(-(-end // unit) * unit, self.rows)
                if pieces and start <= pieces[-1][1] + _GAP // each:
                    start, stop = pieces[-1][0], max(pieces.pop()[1], stop)
                pieces.append((start, stop))
            out[name] = pieces
        return out

    def _read(self, held: _Set, first: int, pieces: _Pieces) -> None:
        if held.free is not None:
            held.free.result()
        found = list(self._places(held, first, pieces))
        reads = [(rows, start, values) for rows, start, values, _ in found if rows is not None]
        self._carry(lambda rows, start, values: rows.read(start, values), reads)
        _copied([(there, values) for *_, values, there in found if there is not None])

    def _places(
        self, held: _Set, first: int, pieces: _Pieces
    ) -> Iterator[tuple[Any, int, Tensor, Tensor | None]]:
        """Give of each piece its rows, the first of them, and where host and device hold it.

        There are no rows to read or write where those of the host are the table's own, and there is
        no place on the device where that is the host.
        """
        cuda = self.device.type == "cuda"
        for name, ranges in pieces.items():
            rows: Any = self.place.rows[name]
            straight = cuda and isinstance(rows, HostRows)
            host = rows.values[first:] if straight else as_rows(held.host[name], self._held, rows)
            device = as_rows(held.device[name], self._held, rows) if cuda else None
            for start, stop in ranges:
                at = slice(start - first, stop - first)
                there = None if device is None else device[at]
                yield None if straight else rows, start, host[at], there

    def _carry(
        self,
        one: Callable[[Any, int, Tensor], None],
        pieces: Sequence[tuple[Any, int, Tensor]],
    ) -> None:
        """Read or write pieces, several at once where there are many."""
        several = _AT_ONCE if len(pieces) > len(self.place.rows) else 1  # else: whole tiles

        def some(first: int) -> None:
            for piece in pieces[first::several]:
                one(*piece)

        done = [self._several.submit(some, first) for first in range(1, several)]
        try:
            some(0)
        finally:
            for future in done:
                future.exception()  # waits: nothing touches the buffers any more
        for future in done:
            future.result()

    def _write(self, held: _Set, first: int, pieces: _Pieces, worked: Any) -> None:
        if worked is not None:
            worked.synchronize()
        found = list(self._places(held, first, pieces))
        _copied([(values, there) for *_, values, there in found if there is not None])
        writes = [(rows, start, values) for rows, start, values, _ in found if rows is not None]
        self._carry(lambda rows, start, values: rows.write(start, values), writes)


def tile_rows(rows: Iterable[Rows | Tensor], most: int = 1) -> int:
    """Rows of a tile whose buffers are those of a table; see `Tiles`."""
    fit = max(1, TILE_BYTES // max(1, sum(map(row_bytes, rows))))
    return max(PAGE, 1 << (fit.bit_length() - 1), 1 << (most - 1).bit_length())


def staging_bytes(rows: Iterable[Rows | Tensor], count: int, most: int = 1) -> int:
    """Bytes of the buffers that the tiles of a table of `count` rows go through."""
    held = list(rows)
    return _SETS * min(_held_rows(tile_rows(held, most), most), count) * sum(map(row_bytes, held))


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
