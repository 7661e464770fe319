"""Shortlists: the clusters that each sample keeps, and the place of a node among its candidates.

All functions take whole batches and never wait for the device. A cascade's candidates of a level
are the nodes of the clusters that a sample kept at the level above. `clusters` int64 [B, K] holds
those clusters, ascending within a row, -1 pads at the end; cluster c owns the nodes
row_ptr[c]:row_ptr[c + 1], at most M. A candidate's place is (slot in the row) * M + (number within
the cluster). So places ascend as nodes do, and "the earlier place" is "the lower node". Source:
CascadeXML (NeurIPS 2022), section 3; that positives are never lost while there is room is ours.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xmlkernels import dist
from xmlkernels.ops import shortlist_merge, shortlist_select
from xmlkernels.ops.shortlist_select import PLACES, locate, rank, sizes

__all__ = [
    "Kept",
    "Whole",
    "best",
    "better",
    "candidates",
    "count",
    "locate",
    "nothing_yet",
    "select",
]


def candidates(clusters: Tensor, row_ptr: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """List the candidates of each sample.

    Args:
        clusters: int64 [B, K], -1 pads.
        row_ptr: int64 [C + 1].
        most: M, at least the size of the largest cluster.

    Returns:
        node: int64 [B, K, M]; beyond a cluster's end, and for pads, a number without meaning.
        real: bool [B, K, M], whether it is a candidate.
    """
    held = clusters.clamp(min=0)
    node = row_ptr[held][:, :, None] + torch.arange(most, device=clusters.device)
    end = torch.where(clusters >= 0, row_ptr[held + 1], 0)
    return node, node < end[:, :, None]


def count(clusters: Tensor, row_ptr: Tensor) -> Tensor:
    """Count the candidates of each sample, int64 [B]."""
    return sizes(row_ptr)[clusters].sum(1)


def best(scores: Tensor, real: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k best candidates: places int64 [B, k], best first, and whether each exists.

    The latter is bool [B, k]: a sample may have fewer than k.
    """
    keys = rank(scores, real, torch.arange(scores.shape[1], device=scores.device))
    top = keys.topk(min(k, keys.shape[1]), dim=1).values
    if top.shape[1] < k:
        top = torch.cat([top, top.new_full((top.shape[0], k - top.shape[1]), -1)], 1)
    there = top >= 0
    return torch.where(there, PLACES - (top & PLACES), 0), there


def nothing_yet(documents: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Give the k best of no rows: values -inf and rows -1, [B, k] each."""
    return (
        torch.full((documents, k), -torch.inf, device=device),
        torch.full((documents, k), -1, dtype=torch.int64, device=device),
    )


def better(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge the k best of two ranges of rows, the lower first; equal values keep that order."""
    values, rows = (torch.cat(pair, 1) for pair in zip(one, other, strict=True))
    order = values.sort(dim=1, descending=True, stable=True).indices
    # Where no row can fill a place it holds -inf, and comes after rows that have this score.
    empty = (rows.gather(1, order) < 0).to(torch.uint8)
    order = order.gather(1, empty.sort(dim=1, stable=True).indices)[:, : one[0].shape[1]]
    return values.gather(1, order), rows.gather(1, order)


class Whole(NamedTuple):
    """Where the candidates of one shard of a level stand among those of the whole level.

    Attributes:
        clusters: int64 [B, K], all clusters that each sample has.
        slot: int64 [B, K'], the columns of the shard's own among them.
        row_ptr, most: of the whole level.
    """

    clusters: Tensor
    slot: Tensor
    row_ptr: Tensor
    most: int

    def first(self, clusters: Tensor, row_ptr: Tensor) -> Tensor:
        """Find the places int64 [B, K'] where the shard's clusters begin; arguments are its own."""
        held = clusters.clamp(min=0)
        return self.slot * self.most + row_ptr[held] - self.row_ptr[held]

    def places(self, clusters: Tensor, row_ptr: Tensor, most: int) -> Tensor:
        """Find the places int64 [B, K', M'] of the shard's candidates; arguments are its own."""
        start = self.first(clusters, row_ptr)
        return start[:, :, None] + torch.arange(most, device=clusters.device)


class Kept(NamedTuple):
    """What each sample hands on.

    Attributes:
        nodes: int64 [B, width], ascending, -1 pads last.
        place: int64 [B, width], their places among the sample's K * M candidates; 0 for pads.
        forced: int64 [1], positives among them.
        scores: fp32 [B, width]; -inf for pads.
    """

    nodes: Tensor
    place: Tensor
    forced: Tensor
    scores: Tensor


def select(
    scores: Tensor,
    clusters: Tensor,
    row_ptr: Tensor,
    k: int,
    *,
    width: int | None = None,
    positives: tuple[Tensor, Tensor] | None = None,
    whole: Whole | None = None,
) -> Kept:
    """Choose the clusters that each sample hands on: its k best nodes, but `positives` first.

    A sample with more than k positives keeps them all, up to `width`; one with fewer fills up to k
    with the best others. Of a level that processes share, each names its own candidates, and all
    have the choice among those of all: each sends its best, and the best of these are kept.

    Args:
        scores: fp32 [B, K, M] of the candidates.
        clusters: int64 [B, K], where the candidates come from.
        row_ptr: int64 [C + 1].
        k: nodes to keep.
        width: columns of the result, k or more (k when not given); fewer where there are fewer
            candidates.
        positives: (node int64 [P], sample int [P]), unique pairs.
        whole: of a level that processes share, where its candidates stand.
    """
    node, sample = (positives if scores.numel() else None) or (None, None)
    level, most = (clusters, row_ptr), scores.shape[2]
    first = None
    if whole is not None:
        first = whole.first(clusters, row_ptr)
        level, most = (whole.clusters, whole.row_ptr), whole.most
    width = min(k if width is None else width, level[0].shape[1] * most)
    keys = shortlist_select(
        scores, clusters, row_ptr, k, width, node=node, sample=sample, first=first
    )
    if whole is not None:
        keys = dist.gather_columns(keys)
    nodes, place, scores, forced = shortlist_merge(keys, *level, most, k, width)
    return Kept(nodes, place, forced, scores)
