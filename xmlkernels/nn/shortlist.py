"""Shortlists: the clusters that each sample keeps, and the place of a node among its candidates.

All functions take whole batches and never wait for the device. A cascade's candidates of a level
are the nodes of the clusters that a sample kept at the level above. `clusters` int64 [B, K] holds
those clusters, ascending within a row, -1 pads at the end; cluster c owns the nodes
row_ptr[c]:row_ptr[c + 1], at most M. A candidate's place is (slot in the row) * M + (number within
the cluster). So places ascend as nodes do, and "the earlier place" is "the lower node". Source:
CascadeXML (NeurIPS 2022), section 3; that positives are never lost while there is room is ours.
"""

import torch
from torch import Tensor

_PLACE_BITS = 30
_PLACES = (1 << _PLACE_BITS) - 1
_FORCED = 1 << 62  # above every score, whose 32 bits are above 30 bits of place


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
    held = clusters.clamp(min=0)
    return torch.where(clusters >= 0, row_ptr[held + 1] - row_ptr[held], 0).sum(1)


def locate(
    node: Tensor, sample: Tensor, clusters: Tensor, row_ptr: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """Find the places of nodes among the candidates.

    Args:
        node: int64 [P], any order; a number outside row_ptr is no candidate.
        sample: int [P], 0 to B - 1.
        clusters: int64 [B, K], ascending, pads last.
        row_ptr: int64 [C + 1].
        most: M.

    Returns:
        place: int64 [P], sample * K * M + place within the sample; 0 where it is no candidate.
        found: bool [P].
    """
    total = row_ptr.shape[0] - 1
    size, slots = clusters.shape
    if size * slots == 0:
        nowhere = torch.zeros_like(node)
        return nowhere, nowhere.bool()
    owner = torch.searchsorted(row_ptr, node, right=True) - 1
    inside = (owner >= 0) & (owner < total)
    # One ascending list for the whole batch: the pads, as cluster `total`, keep each row's end in
    # order.
    base = torch.arange(size, device=clusters.device)[:, None] * (total + 1)
    keys = (torch.where(clusters >= 0, clusters, total) + base).flatten()
    wanted = sample.to(torch.int64) * (total + 1) + owner
    at = torch.searchsorted(keys, wanted).clamp(max=size * slots - 1)
    found = inside & (keys[at] == wanted)
    place = at * most + node - row_ptr[owner.clamp(min=0)]
    return torch.where(found, place, 0), found


def rank(scores: Tensor, real: Tensor) -> Tensor:
    """Give each candidate an int64 of its own that orders as its score does.

    Of equal scores the lower place comes first; -1 where there is no candidate. Exact ties are
    common (a fresh table scores zeros alike, bf16 rounds), and torch.topk leaves open which one it
    takes.

    Args:
        scores: fp32 [B, S]; -0 and 0 are equal.
        real: bool [B, S].
    """
    bits = (scores + 0.0).view(torch.int32)
    # Ascending as integers where the scores ascend as numbers.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    place = _PLACES - torch.arange(scores.shape[1], device=scores.device)
    return torch.where(real, ((ordered.to(torch.int64) + (1 << 31)) << _PLACE_BITS) | place, -1)


def best(scores: Tensor, real: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k best candidates: places int64 [B, k], best first, and whether each exists.

    The latter is bool [B, k]: a sample may have fewer than k.
    """
    keys = rank(scores, real)
    top = keys.topk(min(k, keys.shape[1]), dim=1).values
    if top.shape[1] < k:
        top = torch.cat([top, top.new_full((top.shape[0], k - top.shape[1]), -1)], 1)
    there = top >= 0
    return torch.where(there, _PLACES - (top & _PLACES), 0), there


def select(
    scores: Tensor,
    clusters: Tensor,
    row_ptr: Tensor,
    k: int,
    *,
    width: int | None = None,
    positives: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the clusters that each sample hands on: its k best nodes, but `positives` first.

    A sample with more than k positives keeps them all, up to `width`; one with fewer fills up to k
    with the best others.

    Args:
        scores: fp32 [B, K, M] of the candidates.
        clusters: int64 [B, K], where the candidates come from.
        row_ptr: int64 [C + 1].
        k: nodes to keep.
        width: columns of the result, k or more (k when not given); fewer where there are fewer
            candidates.
        positives: (node int64 [P], sample int [P]), unique pairs.

    Returns:
        kept: int64 [B, width], ascending, -1 pads last.
        place: int64 [B, width], their places among the sample's K * M candidates; 0 for pads.
        forced: int64 [1], positives among them.
    """
    _size, slots, most = scores.shape
    width = min(k if width is None else width, slots * most)
    node, real = candidates(clusters, row_ptr, most)
    keys = rank(scores.flatten(1), real.flatten(1))
    if positives is not None:
        at, found = locate(*positives, clusters, row_ptr, most)
        # One more element takes the positives that are no candidates: to leave them out would need
        # their number.
        mark = torch.zeros(keys.numel() + 1, dtype=torch.bool, device=keys.device)
        mark[torch.where(found, at, keys.numel())] = True
        keys = torch.where(mark[:-1].view(keys.shape), keys | _FORCED, keys)
    top = keys.topk(width, dim=1).values
    forced = top >= _FORCED
    keep = forced | ((top >= 0) & (torch.arange(width, device=top.device) < k))
    # Places ascend as nodes do, so sorting places sorts nodes.
    place = torch.where(keep, _PLACES - (top & _PLACES), _PLACES).sort(1).values
    there = place < _PLACES
    place = torch.where(there, place, 0)
    return torch.where(there, node.flatten(1).gather(1, place), -1), place, forced.sum().reshape(1)
