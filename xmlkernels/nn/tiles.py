"""The stream of a table's tiles to the device that works on them, and back.

A tile is a range of rows: a shard of the table for as long as it is worked on. While an op works on
tile i, a thread reads tile i + 1 and another writes tile i - 1 back; three sets of buffers go
round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xmlkernels.nn.table_store import HostRows, Place
from xmlkernels.rows import PAGE, Rows, as_rows, pages, row_bytes

TILE_BYTES = 64 << 20  # of one tile, all buffers together
_SETS = 3  # one is read, one worked on, one written


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
        tile_bytes: of all buffers of a tile together, at most, unless 4,096 rows have more.
    """

    def __init__(self, place: Place, device: torch.device, tile_bytes: int | None = None) -> None:
        self.place, self.device = place, device
        self.rows = next(iter(place.rows.values())).shape[0]
        self.per_tile = tile_rows(place.rows.values(), tile_bytes)
        self._sets: list[_Set] = []
        self._reader = ThreadPoolExecutor(1, "tile-reader")
        self._writer = ThreadPoolExecutor(1, "tile-writer")

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
    ) -> Iterator[Tile]:
        """Give tiles in turn; when the next is asked for, one is written back.

        Args:
            ranges: some of `ranges`.
            reads: buffers that are read; those that are written alone hold anything.
            writes: buffers that are written.

        Raises:
            InputError: the rows cannot be read.
            OSError: the disk refuses.
        """
        names = tuple(dict.fromkeys((*reads, *writes)))
        waiting, sets, writing = iter(ranges), deque(self._free_sets()), deque[Future[None]]()
        reading = deque[tuple[tuple[int, int], _Set, Future[None]]]()

        def begin() -> None:
            part = next(waiting, None)
            if part is not None:
                held = sets.popleft()
                reading.append((part, held, self._reader.submit(self._read, held, part, reads)))

        try:
            begin()
            while reading:
                (first, end), held, read = reading.popleft()
                begin()
                read.result()
                yield Tile(first, end, self._views(held, names, end - first))
                done = self._writer.submit(
                    self._write, held, first, end, writes, _recorded(self.device)
                )
                held.free = done
                sets.append(held)
                writing.append(done)
                while writing and writing[0].done():
                    writing.popleft().result()
        finally:
            for _, _, read in reading:
                read.cancel()
            for future in (*(read for _, _, read in reading), *writing):
                if not future.cancelled():
                    future.exception()  # waits; nothing touches the buffers any more
        for future in writing:
            future.result()

    def _free_sets(self) -> list[_Set]:
        while len(self._sets) < _SETS:
            host, size = dict[str, Tensor](), min(self.per_tile, self.rows)
            pinned = self.device.type == "cuda"
            for name, rows in self.place.rows.items():
                straight = pinned and isinstance(rows, HostRows)
                host[name] = pages(0 if straight else size * row_bytes(rows), pinned=pinned)
            device = host
            if pinned:
                device = {
                    name: torch.empty(size * row_bytes(rows), dtype=torch.uint8, device=self.device)
                    for name, rows in self.place.rows.items()
                }
            self._sets.append(_Set(host, device))
        for held in self._sets:
            held.free = None
        return self._sets

    def _views(self, held: _Set, names: Sequence[str], count: int) -> dict[str, Tensor]:
        return {n: as_rows(held.device[n], count, self.place.rows[n]) for n in names}

    def _read(self, held: _Set, part: tuple[int, int], names: Sequence[str]) -> None:
        if held.free is not None:
            held.free.result()
        first, end = part
        for name in names:
            rows, cuda = self.place.rows[name], self.device.type == "cuda"
            if isinstance(rows, HostRows) and cuda:
                values = rows.values[first:end]
            else:
                values = as_rows(held.host[name], end - first, rows)
                rows.read(first, values)
            if cuda:
                _copied(as_rows(held.device[name], end - first, rows), values)

    def _write(self, held: _Set, first: int, end: int, names: Sequence[str], worked: Any) -> None:
        if worked is not None:
            worked.synchronize()
        for name in names:
            rows: Any = self.place.rows[name]
            straight = self.device.type == "cuda" and isinstance(rows, HostRows)
            values = (
                rows.values[first:end] if straight else as_rows(held.host[name], end - first, rows)
            )
            if self.device.type == "cuda":
                _copied(values, as_rows(held.device[name], end - first, rows))
            if not straight:
                rows.write(first, values)


def tile_rows(rows: Iterable[Rows | Tensor], tile_bytes: int | None = None) -> int:
    """Rows of a tile whose buffers are those of a table."""
    most = max(1, (tile_bytes or TILE_BYTES) // max(1, sum(map(row_bytes, rows))))
    return max(PAGE, 1 << (most.bit_length() - 1))


def staging_bytes(rows: Iterable[Rows | Tensor], count: int) -> int:
    """Bytes of the buffers that the tiles of a table of `count` rows go through."""
    held = list(rows)
    return _SETS * min(tile_rows(held), count) * sum(map(row_bytes, held))


def _recorded(device: torch.device) -> Any:
    """Record where a card's work on a tile ends; None on the CPU, whose ops have ended."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _copied(out: Tensor, source: Tensor) -> None:
    """Copy between host and card on a stream of this thread alone, and wait for it."""
    card = out.device if out.is_cuda else source.device
    stream = torch.cuda.Stream(card)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        out.copy_(source, non_blocking=True)
    stream.synchronize()
