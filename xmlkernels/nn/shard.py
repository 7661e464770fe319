"""Which rows of a table a process holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xmlkernels import dist
from xmlkernels.rows import RowRange, row_bytes, rows_behind, stand_in

UNIT = 128  # rows of a tile, and of a group that is skipped


@dataclass(frozen=True)
class Shard:
    """The rows first to end - 1 of a table of `rows` rows.

    Attributes:
        first, end: in the whole table; empty where they are equal.
        rows: of the whole table.
    """

    first: int
    end: int
    rows: int

    @property
    def count(self) -> int:
        """Rows of the shard."""
        return self.end - self.first

    @property
    def whole(self) -> bool:
        """Whether it is the table itself."""
        return self.count == self.rows


def shard_rows(rows: int, processes: int, rank: int, *, aligned: bool = False) -> Shard:
    """Return one process's share of a table, in consecutive parts of nearly the same size.

    Parts of a large table begin at multiples of 128 rows: groups of rows that are skipped, and
    tiles of a GPU, are then those of the whole table. That makes the largest part at most a
    hundredth larger; a smaller table is cut between any two rows.

    Args:
        rows: of the whole table.
        processes, rank: how many there are, and which one.
        aligned: begin at multiples of 128 however small the table is.
    """
    unit = UNIT if aligned or rows >= 100 * UNIT * processes else 1
    each, rest = divmod(-(-rows // unit), processes)
    first = each * rank + min(rank, rest)
    end = first + each + (rank < rest)
    return Shard(min(rows, unit * first), min(rows, unit * end), rows)


def whole(rows: int) -> Shard:
    """Return the shard that is a table of `rows` rows itself."""
    return Shard(0, rows, rows)


def own_rows(tensor: Tensor, shard: Shard | None) -> Tensor:
    """Cut a shard's rows from a whole table; rows that are cut already, or no shard, stay."""
    if shard is None or tensor.shape[:1] != (shard.rows,) or shard.whole:
        return tensor
    rows = rows_behind(tensor)
    if rows is not None:
        return stand_in(RowRange(rows, shard.first, shard.end))
    return tensor[shard.first : shard.end]


def own_positives(pos_row: Tensor, pos_sample: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Cut a shard's positives from those of the whole table; rows are counted from its first.

    Waits for the device, unless the shard is the whole.

    Args:
        pos_row: int64 [P], rows of the whole table, ascending.
        pos_sample: [P].
        shard: the rows that are kept.
    """
    if shard.whole:
        return pos_row, pos_sample
    bounds = torch.tensor([shard.first, shard.end], device=pos_row.device)
    first, end = torch.searchsorted(pos_row, bounds).tolist()
    return pos_row[first:end] - shard.first, pos_sample[first:end]


def part_bytes(parameter: Tensor, processes: int) -> int:
    """Bytes of the rows of a parameter that the first of G processes holds; see `dist`."""
    if processes == 1:
        return parameter.numel() * parameter.element_size()
    return dist.rows_of_each(parameter.shape[0], processes) * row_bytes(parameter)


def own_bytes(tensor: Tensor) -> int:
    """Bytes that this process holds of a parameter, or of any tensor."""
    own = dist.own(tensor)
    return own.numel() * own.element_size()
