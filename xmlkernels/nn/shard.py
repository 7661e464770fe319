"""Which rows of a table a process holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def whole(rows: int) -> Shard:
    """Return the shard that is a table of `rows` rows itself."""
    return Shard(0, rows, rows)


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
