"""Which rows of a label tree's levels a process holds, and what a batch asks of them.

The levels of a cascade are shared among processes at the borders of clusters: a cluster's rows
stand in one shard, so that each process takes its clusters' step alone. The coarsest level, whose
rows are one cluster, is cut anywhere. Letters are those of `xmlkernels.nn.shortlist`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from xmlkernels.errors import InputError
from xmlkernels.nn.shard import Shard, shard_rows


def cluster_shards(row_ptr: Tensor, parts: int) -> list[Shard]:
    """Cut a level into shards of whole clusters and about as many rows each.

    Each cut is the border of clusters nearest to its share of the rows, the lower of two: no shard
    has more than its share and one cluster. Where there are fewer clusters than parts, some shards
    are empty.

    Args:
        row_ptr: int64 [C + 1], the rows of each cluster, from 0 to the level's end; on the CPU.
        parts: G, 1 or more.

    Returns:
        G shards in the order of their rows.
    """
    rows = int(row_ptr[-1])
    wanted = torch.tensor([rows * part // parts for part in range(parts + 1)])
    above = torch.searchsorted(row_ptr, wanted)
    below = (above - 1).clamp(min=0)
    nearer = wanted - row_ptr[below] <= row_ptr[above] - wanted
    cuts = row_ptr[torch.where(nearer, below, above)].tolist()
    cuts[0], cuts[-1] = 0, rows
    return [Shard(first, end, rows) for first, end in pairwise(cuts)]


def tree_shards(bounds: Sequence[Tensor], nodes: int, parts: int) -> list[list[Shard]]:
    """Cut every level of a label tree into shards of about as many rows each.

    Args:
        bounds: of each level of clusters, coarse to fine, int64 [n_r + 1]: the label rows under
            each node; on the CPU.
        nodes: n_0, of the coarsest level.
        parts: G, 1 or more.

    Returns:
        For each part the shards of all levels, coarse to fine, the labels' last.
    """
    children = [torch.searchsorted(finer, coarser) for coarser, finer in pairwise(bounds)]
    levels = [[shard_rows(nodes, parts, part) for part in range(parts)]]
    levels += [cluster_shards(row_ptr, parts) for row_ptr in (*children, bounds[-1])]
    return [list(level) for level in zip(*levels, strict=True)]


@dataclass(frozen=True)
class OwnClusters:
    """The clusters of a shard.

    Attributes:
        first, end: their numbers; empty where they are equal.
        row_ptr: int64 [end - first + 1], their rows, counted from the shard's first.
        cut: of a level that is one cluster, the part of it that is here; else None.
    """

    first: int
    end: int
    row_ptr: Tensor
    cut: Shard | None = None

    def bounds(self, row_ptr: Tensor) -> Tensor:
        """Give the rows that are here of each of a level's clusters, numbered as in the level.

        Those of other clusters than the shard's have no meaning.

        Args:
            row_ptr: int64 [C + 1], of the whole level.
        """
        return row_ptr if self.cut is None else row_ptr.clamp(self.cut.first, self.cut.end)

    def most(self, most: int) -> int:
        """Bound the rows that are here of a cluster, of which the level's have `most` at most."""
        return most if self.cut is None else max(1, self.cut.count)

    def chosen(self, clusters: Tensor) -> tuple[Tensor, Tensor]:
        """Pick from each sample's clusters those of the shard. Waits for the device.

        Args:
            clusters: int64 [B, K], ascending, -1 pads last.

        Returns:
            own: int64 [B, K'], the shard's, numbered as before, ascending, -1 pads last; K' is the
            largest number that a sample has, at least 1. slot: int64 [B, K'], their columns; 0 for
            pads.
        """
        if self.cut is not None:
            return clusters, torch.zeros_like(clusters)
        start = ((clusters >= 0) & (clusters < self.first)).sum(1, keepdim=True)
        count = ((clusters >= self.first) & (clusters < self.end)).sum(1, keepdim=True)
        widest = max(1, int(count.max())) if len(clusters) else 1
        column = torch.arange(widest, device=clusters.device)
        there = column < count
        slot = torch.where(there, start + column, 0)
        return torch.where(there, clusters.gather(1, slot), -1), slot


def clusters_of(shard: Shard, row_ptr: Tensor) -> OwnClusters:
    """Find the clusters of a shard. Waits for the device.

    Args:
        shard: of the level's rows.
        row_ptr: int64 [C + 1], the rows of each of the level's clusters, none of them empty.

    Raises:
        InputError: a border of the shard lies within a cluster, of several.
    """
    borders = torch.tensor([shard.first, shard.end], device=row_ptr.device)
    first, end = torch.searchsorted(row_ptr, borders).tolist()
    own = row_ptr[first : end + 1]
    if [int(own[0]), int(own[-1])] != [shard.first, shard.end]:
        if len(row_ptr) == 2:
            return OwnClusters(0, 1, row_ptr.new_tensor([0, shard.count]), shard)
        raise InputError(
            "shard of a level",
            "whole clusters",
            f"rows {shard.first} to {shard.end - 1}, which cut one",
            "cut the level by cluster_shards",
        )
    return OwnClusters(first, end, own - shard.first)
