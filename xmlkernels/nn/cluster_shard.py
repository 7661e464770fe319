"""Which clusters of labels a process holds, and what a batch asks of them.

The label level of a cascade is shared among processes at the borders of clusters: a cluster's rows
stand in one shard, so that each process takes its clusters' step alone. Letters are those of
`xmlkernels.nn.shortlist`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from xmlkernels.errors import InputError
from xmlkernels.nn.shard import Shard


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


@dataclass(frozen=True)
class OwnClusters:
    """The clusters of a shard.

    Attributes:
        first, end: their numbers; empty where they are equal.
        row_ptr: int64 [end - first + 1], their rows, counted from the shard's first.
    """

    first: int
    end: int
    row_ptr: Tensor

    def chosen(self, clusters: Tensor) -> tuple[Tensor, Tensor]:
        """Pick from each sample's clusters those of the shard. Waits for the device.

        Args:
            clusters: int64 [B, K], ascending, -1 pads last.

        Returns:
            own: int64 [B, K'], the shard's, numbered as before, ascending, -1 pads last; K' is the
            largest number that a sample has, at least 1. slot: int64 [B, K'], their columns; 0 for
            pads.
        """
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
        InputError: a border of the shard lies within a cluster.
    """
    borders = torch.tensor([shard.first, shard.end], device=row_ptr.device)
    first, end = torch.searchsorted(row_ptr, borders).tolist()
    own = row_ptr[first : end + 1]
    if [int(own[0]), int(own[-1])] != [shard.first, shard.end]:
        raise InputError(
            "shard of the label level",
            "whole clusters",
            f"rows {shard.first} to {shard.end - 1}, which cut one",
            "cut the level by cluster_shards",
        )
    return OwnClusters(first, end, own - shard.first)
