"""Which clusters a sample keeps, and where a node stands among its candidates: whole batches at a
time, no host sync.

A cascade's candidates of a level are the nodes of the clusters that a sample kept at the level
above. `clusters` int64 [B, K] holds those clusters, ascending within a row, -1 pads at the end;
cluster c owns the nodes row_ptr[c]:row_ptr[c + 1], at most M, and a candidate's place is (slot in
the row) * M + (number within the cluster). So candidates stand in ascending order of their number
too, and "the earlier place" is "the lower node". Source: CascadeXML (NeurIPS 2022), section 3; that
positives are never lost while there is room is ours.
"""

import torch
from torch import Tensor

_PLACE_BITS = 30
_PLACES = (1 << _PLACE_BITS) - 1
_FORCED = 1 << 62  # above every score: 32 bits of score stand on 30 bits of place


def candidates(clusters: Tensor, row_ptr: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The candidates of each sample.

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
    """Candidates of each sample, int64 [B]."""
    held = clusters.clamp(min=0)
    return torch.where(clusters >= 0, row_ptr[held + 1] - row_ptr[held], 0).sum(1)


def locate(
    node: Tensor, sample: Tensor, clusters: Tensor, row_ptr: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """Where nodes stand among the candidates.

    Args:
        node: int64 [P], any order; a number outside row_ptr stands nowhere.
        sample: int [P], 0 to B - 1.
        clusters: int64 [B, K], ascending, pads last.

    Returns:
        place: int64 [P], sample * K * M + place within the sample; 0 where it is no candidate.
        found: bool [P].
    """
    total = row_ptr.shape[0] - 1
    size, slots = clusters.shape
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
    """One int64 per candidate, all different: by score, equal scores by place (the lower first), -1
    where there is none.

    Exact ties are common (a fresh table scores zeros alike, bf16 rounds), and torch.topk leaves
    open which one it takes.

    Args:
        scores: fp32 [B, S]; -0 and 0 are equal.
        real: bool [B, S].
    """
    bits = (scores + 0.0).view(torch.int32)
    ordered = bits ^ (
        (bits >> 31) & 0x7FFFFFFF
    )  # ascending as integers where the scores are as numbers
    place = _PLACES - torch.arange(scores.shape[1], device=scores.device)
    return torch.where(real, ((ordered.to(torch.int64) + (1 << 31)) << _PLACE_BITS) | place, -1)


def best(scores: Tensor, real: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Places int64 [B, k] of the k best candidates, best first, and whether there is one there
    (bool [B, k]).
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
    """The clusters that each sample hands on: its k best nodes; with `positives`, those first.

    A sample with more than k positives keeps them all, up to `width`; one with fewer fills up to k
    with the best others.

    Args:
        scores: fp32 [B, K, M] of the candidates.
        clusters, row_ptr: where the candidates come from.
        k: nodes to keep.
        width: columns of the result, k or more (k when not given); fewer where there are fewer
            candidates.
        positives: (node int64 [P], sample int [P]), unique pairs.

    Returns:
        kept: int64 [B, width], ascending, -1 pads last.
        place: int64 [B, width], where they stand among the sample's K * M candidates; 0 for pads.
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
    # Candidates stand in ascending order, so sorting places sorts nodes.
    place = torch.where(keep, _PLACES - (top & _PLACES), _PLACES).sort(1).values
    there = place < _PLACES
    place = torch.where(there, place, 0)
    return torch.where(there, node.flatten(1).gather(1, place), -1), place, forced.sum().reshape(1)
