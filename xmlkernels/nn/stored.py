"""What every table does that stands in files or on the host, and is streamed to its device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from xmlkernels.errors import InputError
from xmlkernels.nn.shard import Shard
from xmlkernels.nn.table import FIRST_SCALE, Draw, Table, fill_rows, first_values, rows_of
from xmlkernels.nn.table_store import Place, TableStore
from xmlkernels.nn.tiles import Tiles, Window, staging_bytes
from xmlkernels.ops import shortlist_matmul
from xmlkernels.rows import Rows, row_bytes, rows_behind, stand_in

READ = ("weight", "bias", "row_scale")  # what scores are made of


class StoredTable(Table):
    """The part of a stored table that does not depend on its step; a base beside a kind of table.

    The buffers with a row per row are on the meta device: they have shape and format, and no
    memory. The rows are in `place`; `tiles` brings some of them to the device at a time, where
    `_tile`, a table of the same kind that holds just those, does what the whole one is asked for.
    """

    WAITS = True  # the host decides tile by tile
    together = 1  # rows, at most, that a step takes together: those of a cluster

    place: Place
    tiles: Tiles

    def _keep(
        self, tile: Table, store: TableStore | Mapping[str, Rows] | None, draw: Draw | None
    ) -> None:
        """Take the rows' place, and the buffers of a table that is not on the meta device.

        Args:
            tile: of the same kind and options, an empty shard.
            store: where to make the rows, or rows that are there and are only read; None keeps
                none: it is only asked what it would take.
            draw: the first values of rows that are made; None leaves zeros.
        """
        facts = {name: (held.shape, held.dtype) for name, held in self.row_buffers().items()}
        small = {n: held for n, held in tile.named_buffers() if n not in facts}
        for name, held in small.items():
            self._buffers[name] = held
        self._tiled = (tile,)  # no module of this one: it holds the buffers of a tile, or none
        self._share()
        if store is None:
            return
        self.place = (
            store.make(facts, self.shard)
            if isinstance(store, TableStore)
            else Place({name: store[name] for name in facts if name in store})
        )
        self._reach()
        if isinstance(store, TableStore):
            self._fill(draw)

    @property
    def _tile(self) -> Table:
        return self._tiled[0]

    def _share(self) -> None:
        """Let the tile's hyper-parameters and counts be those of the table; its counter is a copy.

        The step of a tile counts, and the table is a step further after the last tile alone.
        """
        held = self.row_buffers()
        for name in self._tile._buffers:
            if name not in held:
                self._tile._buffers[name] = self._buffers[name]
        self._tile.counter = self.counter.clone()

    def _reach(self) -> None:
        self.tiles = Tiles(self.place, self.counter.device, self.together)
        # A checkpoint takes these names for what is behind them.
        for name, rows in self.stored().items():
            self._buffers[name] = stand_in(rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept, order = self.row_buffers(), list(self._buffers)
        for name in kept:
            del self._buffers[name]
        whole: Any = super()
        whole._apply(fn, recurse)
        self._buffers.update(kept)
        for name in order:
            self._buffers[name] = self._buffers.pop(name)
        self._share()
        if hasattr(self, "place"):
            self._reach()
        return self

    def bytes(self) -> dict[str, int]:
        """Bytes in memory: of the buffers that tiles go through, and of the few that stay."""
        rows = self.row_buffers()
        own = {n: t.numel() * t.element_size() for n, t in self.named_buffers() if n not in rows}
        tiles = staging_bytes(rows.values(), self.shard.count, self.together)
        return {"tiles": tiles} | own

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of the rows of each buffer, in files or on the host."""
        return {n: t.shape[0] * row_bytes(t) for n, t in self.row_buffers().items()}

    def stored(self) -> dict[str, Rows]:
        """Give the rows of each buffer; see `Table.stored`."""
        return {name: _Whole(self.place, rows) for name, rows in self.place.rows.items()}

    def _stream(
        self,
        reads: Sequence[str],
        writes: Sequence[str] = (),
        windows: Sequence[Window] | None = None,
    ) -> Iterator[tuple[int, int, Any]]:
        """Give (first, end, table) of each tile; the table is the same one, with other buffers.

        Args:
            reads, writes: names of buffers; those that this table has not are left out.
            windows: the rows that are carried, of `Tiles.windows`; None: all.
        """
        have, tile, first = self.place.rows, self._tile, self.shard.first
        reads, writes = [n for n in reads if n in have], [n for n in writes if n in have]
        if writes and not all(getattr(rows, "writes", False) for rows in have.values()):
            mend = "resume its run, or build it with a store of its own"
            raise InputError(self.NAME, "one that can be written", "one that is only read", mend)
        self.place.check_whole()
        try:
            for part in self.tiles.stream(windows, reads=reads, writes=writes):
                tile._buffers.update(part.buffers)
                tile.counter.copy_(self.counter)
                tile.shard = Shard(first + part.first, first + part.end, self.shard.rows)
                yield part.first, part.end, tile
        finally:
            tile._buffers.update(dict.fromkeys(have))

    def _changing(self, windows: Sequence[Window] | None = None) -> Iterator[Any]:
        """Give each tile, with all its buffers, for a step; then count the step."""
        names, whole = list(self.place.rows), int(self.counter[1])
        for _, _, tile in self._stream(names, names, windows):
            yield tile
            self.place.begin()  # the next tile is asked for, and this one written
        self.counter[1] += 1
        self.place.end(whole + 1)

    def after_step(self) -> None:
        """Do nothing: what follows a step is done tile by tile."""

    def _fill(self, draw: Draw | None) -> None:
        """Write first values; without `draw` the rows stay zeros, but an fp8 table needs scales."""
        scaled = "row_scale" in self.place.rows
        if draw is None and not scaled:
            self.place.end(0)
            return
        seed = int(self.counter[0])
        drawn = first_values(self.shard, self.width, seed, draw) if draw else iter(())
        start, values = next(drawn, (0, torch.empty(0, self.width)))
        for first, end, tile in self._stream((), ("weight", "row_scale")):
            if scaled:
                tile.row_scale.copy_(torch.tensor([FIRST_SCALE, 0.0]))
            if draw is None:
                tile.weight.zero_()
            at = first
            while draw is not None and at < end:
                if at == start + len(values):
                    start, values = next(drawn)
                until = min(end, start + len(values))
                part = values[at - start : until - start]
                fill_rows(tile.weight, tile.row_scale, at - first, part)
                at = until
        self.place.end(0)

    @torch.no_grad()
    def load_rows(self, given: Mapping[str, Tensor]) -> None:
        """Take the rows of a checkpoint, block by block.

        Args:
            given: by the name of the buffer, in memory or standing in for rows, of this shard.
        """
        sources = {name: (rows_behind(t), t) for name, t in given.items()}
        if all(
            rows is not None and rows is self.place.rows.get(n) for n, (rows, _) in sources.items()
        ):
            return  # they are its own
        self.place.begin()
        for part in self.tiles.stream(reads=(), writes=list(sources)):
            for name, (rows, tensor) in sources.items():
                into = part.buffers[name]
                if rows is None:
                    into.copy_(tensor[part.first : part.end])
                elif into.device.type == "cpu":
                    rows.read(part.first, into)
                else:
                    held = torch.empty_like(into, device="cpu")
                    rows.read(part.first, held)
                    into.copy_(held)
        self.place.end(int(self.counter[1]))

    def rows(self, start: int, end: int) -> Tensor:
        """Copy the rows start:end to fp32 [end - start, D], on the CPU."""
        self.place.check_whole()
        held = {}
        for name in ("weight", "row_scale"):
            if name in self.place.rows:
                source = self.place.rows[name]
                held[name] = torch.empty(end - start, *source.shape[1:], dtype=source.dtype)
                source.read(start, held[name])
        return rows_of(held["weight"], held.get("row_scale"), 0, end - start)

    @torch.no_grad()
    def scores(self, x: Tensor, index: Tensor) -> Tensor:
        """Score chosen rows; see `Table.scores`. The pages that hold them are read."""
        out = torch.full((x.shape[0], index.shape[-1]), -torch.inf, device=x.device)
        lists = index.reshape(-1, index.shape[-1])
        sample, column = (lists >= 0).nonzero(as_tuple=True)
        row = lists[sample, column]
        each = torch.unique(row)
        windows = self.tiles.windows(each, each + 1)
        ends = torch.tensor([window.end for window in windows], device=row.device)
        part = torch.searchsorted(ends, row, right=True)
        order = (part * len(lists) + sample).argsort(stable=True)
        sample, column, row = sample[order], column[order], row[order]
        begin, stops = 0, torch.bincount(part, minlength=len(windows)).cumsum(0).tolist()
        for (first, _, tile), stop in zip(self._stream(READ, windows=windows), stops, strict=True):
            its, place = sample[begin:stop], column[begin:stop]
            # A list for each sample, of its rows of this tile alone.
            at = torch.arange(len(its), device=its.device) - torch.searchsorted(its, its)
            local = index.new_full((len(lists), int(at.max()) + 1), -1)
            local[its, at] = row[begin:stop] - first
            chosen = local if index.dim() > 1 else local[0]
            z = shortlist_matmul(x, tile.weight, tile.bias, chosen, tile.row_scale)
            if index.dim() > 1:
                out[its, place] = z[its, at]
            else:
                out[:, place] = z[:, at]
            begin = stop
        return out


class _Whole:
    """Rows as a checkpoint takes them: refused where they are of no whole step."""

    def __init__(self, place: Place, rows: Rows) -> None:
        self.shape, self.dtype, self._place, self._rows = rows.shape, rows.dtype, place, rows

    def read(self, start: int, out: Tensor) -> None:
        """Fill `out` with rows from `start` on; see `Rows.read`."""
        self._place.check_whole()
        self._rows.read(start, out)
