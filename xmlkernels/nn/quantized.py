"""Label tables of int8, for prediction alone: a byte per weight and a scale per row.

No op reads int8: rows are turned into fp32 a tile at a time, and scored by the ops that there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from xmlkernels.nn.cascade_level import CascadeLevel, moved
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.shard import Shard, own_positives, whole
from xmlkernels.nn.shortlist import better, nothing_yet
from xmlkernels.nn.table import Table
from xmlkernels.ops import bce_loss, matmul_topk, shortlist_matmul

INT8 = "int8"
_TILE = 1 << 22  # weights that are held in fp32 at one time
_LARGEST = 127


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows fp32 [n, D] to int8 [n, D] and a scale fp32 [n]: the largest of a row is 127."""
    scale = values.abs().amax(1).clamp(min=2.0**-100) / _LARGEST
    return (values / scale[:, None]).round().to(torch.int8), scale


class QuantizedTable(Table):
    """A table whose weights are int8. It is not trained.

    Attributes:
        weight: int8 [n, D].
        scale: fp32 [n]; a weight is its byte times its row's scale.
    """

    scale: Tensor

    def _hold(self, rows: int) -> None:
        """Take room for all rows, in place of the none that it was built with."""
        self.shard, self.shared = whole(rows), False
        self.weight = torch.zeros(rows, self.width, dtype=torch.int8)
        self.register_buffer("scale", torch.ones(rows))
        if self.bias is not None:
            self.bias = torch.zeros(rows)

    def rows(self, start: int, end: int) -> Tensor:
        """Copy the rows start:end to fp32; see `Table.rows`."""
        return self.weight[start:end].float() * self.scale[start:end, None]

    def _tiles(self) -> Iterator[tuple[Shard, Tensor, Tensor | None]]:
        """Yield rows in turn, with their biases."""
        count, step = len(self.weight), max(1, _TILE // max(1, self.width))
        for first in range(0, count, step):
            end = min(first + step, count)
            bias = None if self.bias is None else self.bias[first:end]
            yield Shard(first, end, count), self.rows(first, end), bias

    @torch.no_grad()
    def scores(self, x: Tensor, index: Tensor) -> Tensor:
        """Score chosen rows; see `Table.scores`."""
        x, index = moved(self.weight.device, x, index)
        used, place = torch.unique(index.clamp(min=0), return_inverse=True)
        table = self.weight[used].float() * self.scale[used, None]
        bias = None if self.bias is None else self.bias[used]
        return shortlist_matmul(x, table, bias, torch.where(index < 0, -1, place), None)

    @torch.no_grad()
    def topk(self, x: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the k best rows of all, tile by tile; see `Table.topk`."""
        found = nothing_yet(len(x), k, x.device)
        for shard, table, bias in self._tiles():
            own = matmul_topk(x, table, bias, k, exclude=exclude, row_offset=shard.first)
            found = better(found, own)
        return found

    @torch.no_grad()
    def loss(self, x: Tensor, pos_row: Tensor, pos_sample: Tensor) -> Tensor:
        """Sum the loss [1] over samples and all rows, tile by tile; not differentiable."""
        total = torch.zeros(1, device=x.device)
        for shard, table, bias in self._tiles():
            total += bce_loss(x, table, bias, *own_positives(pos_row, pos_sample, shard))
        return total


class QuantizedHead(QuantizedTable, FullHead):
    """A full head of int8 rows; arguments as of `FullHead`, whose `dtype` is "int8"."""

    def __init__(self, labels: int, width: int, *, dtype: str, bias: bool = False) -> None:
        FullHead.__init__(self, labels, width, bias=bias, std=0, shard=Shard(0, 0, labels))
        self.config["dtype"] = dtype
        self._hold(labels)


class QuantizedLevel(QuantizedTable, CascadeLevel):
    """A cascade's label level of int8 rows; arguments as of `CascadeLevel`."""

    def __init__(self, nodes: int, width: int, per_sample: int, **options: Any) -> None:
        options |= {"dtype": "fp32", "fill": False, "shard": Shard(0, 0, nodes)}
        CascadeLevel.__init__(self, nodes, width, per_sample, **options)
        self._hold(nodes)
