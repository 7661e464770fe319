"""Shortlists: the clusters that each sample keeps, and the place of a node among its candidates.

All functions take whole batches and never wait for the device. A cascade's candidates of a level
are the nodes of the clusters that a sample kept at the level above. `clusters` int64 [B, K] holds
those clusters, ascending within a row, -1 pads at the end; cluster c owns the nodes
row_ptr[c]:row_ptr[c + 1], at most M. A candidate's place is (slot in the row) * M + (number within
the cluster). So places ascend as nodes do, and "the earlier place" is "the lower node". Source:
CascadeXML (NeurIPS 2022), section 3; that positives are never lost while there is room is ours.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xmlkernels import dist

_PLACE_BITS = 30
_PLACES = (1 << _PLACE_BITS) - 1
_SCORE_BITS = 32
_SCORES = (1 << _SCORE_BITS) - 1
_PADS = 1 << 62  # above every place and score
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
    return _sizes(row_ptr)[clusters].sum(1)


def _sizes(row_ptr: Tensor) -> Tensor:
    """Count the nodes of each cluster, int64 [C + 1]; the last is 0, that of pads, at -1."""
    return torch.nn.functional.pad(row_ptr.diff(), (0, 1))


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


def rank(scores: Tensor, real: Tensor, place: Tensor | None = None) -> Tensor:
    """Give each candidate an int64 of its own that orders as its score does.

    Of equal scores the lower place comes first; -1 where there is no candidate. Exact ties are
    common (a fresh table scores zeros alike, bf16 rounds), and torch.topk leaves open which one it
    takes.

    Args:
        scores: fp32 [B, S]; -0 and 0 are equal.
        real: bool [B, S].
        place: int64 [B, S], in which order candidates of one score come; None: as they stand.
    """
    bits = (scores + 0.0).view(torch.int32)
    # Ascending as integers where the scores ascend as numbers.
    ordered = bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
    if place is None:
        place = torch.arange(scores.shape[1], device=scores.device)
    keys = ordered.to(torch.int64).add_(1 << 31).bitwise_left_shift_(_PLACE_BITS)
    return keys.bitwise_or_(_PLACES - place).masked_fill_(~real, -1)


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

    def places(self, clusters: Tensor, row_ptr: Tensor, most: int) -> Tensor:
        """Find the places int64 [B, K', M'] of the shard's candidates; arguments are its own."""
        held = clusters.clamp(min=0)
        start = self.slot * self.most + row_ptr[held] - self.row_ptr[held]
        return start[:, :, None] + torch.arange(most, device=clusters.device)


class Kept(NamedTuple):
    """What each sample hands on.

    Attributes:
        nodes: int64 [B, width], ascending, -1 pads last.
        place: int64 [B, width], their places among the sample's K * M candidates; 0 for pads.
        forced: int64 [1], positives among them.
        ordered: int64 [B, width], of which `scores` makes their scores.
    """

    nodes: Tensor
    place: Tensor
    forced: Tensor
    ordered: Tensor

    def scores(self) -> Tensor:
        """Give their scores, fp32 [B, width]; -inf for pads."""
        ordered = (self.ordered - (1 << 31)).to(torch.int32)
        found = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
        return torch.where(self.nodes >= 0, found, -torch.inf)


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
    most, place = scores.shape[2], None
    if whole is not None:
        place = whole.places(clusters, row_ptr, most).flatten(1)
    real = torch.arange(most, device=scores.device) < _sizes(row_ptr)[clusters][:, :, None]
    keys = rank(scores.flatten(1), real.flatten(1), place)
    if positives is not None and keys.numel():
        at, found = locate(*positives, clusters, row_ptr, most)
        # To leave out the positives that are no candidates would need their number.
        keys.view(-1).scatter_add_(0, at, torch.where(found, _FORCED, 0))
    if whole is not None:
        clusters, row_ptr, most = whole.clusters, whole.row_ptr, whole.most
    width = min(k if width is None else width, clusters.shape[1] * most)
    top = _largest(keys, width)
    if whole is not None:
        top = dist.gather_columns(top)
    top = _ascending(top)[:, top.shape[1] - width :]
    forced, keep = top >= _FORCED, top >= 0
    if k < width:
        keep &= forced | (top >= top[:, width - k : width - k + 1])
    # Places ascend as nodes do, so sorting places sorts nodes. Each takes its score along.
    ordered = (top & (_FORCED - 1)) >> _PLACE_BITS
    pairs = ((_PLACES - (top & _PLACES)) << _SCORE_BITS) | ordered
    pairs = _ascending(torch.where(keep, pairs, _PADS))
    place, there = pairs >> _SCORE_BITS, pairs < _PADS
    place = torch.where(there, place, 0)
    slot = place // most
    start = row_ptr[clusters.gather(1, slot).clamp(min=0)] - slot * most
    nodes = torch.where(there, start + place, -1)
    return Kept(nodes, place, forced.sum().reshape(1), pairs & _SCORES)


def _ascending(keys: Tensor) -> Tensor:
    """Sort each row. On a CPU numpy takes a tenth of torch's time: it knows its vector units."""
    if keys.device.type == "cpu" and type(keys) is Tensor:  # numpy takes no subclass
        return torch.from_numpy(np.sort(keys.numpy(), axis=1))
    return keys.sort(1).values


def _largest(keys: Tensor, count: int) -> Tensor:
    """Find the largest keys of each row, int64 [B, count], in any order; -1 pads."""
    top = keys.topk(min(count, keys.shape[1]), dim=1, sorted=False).values
    missing = count - top.shape[1]
    return torch.nn.functional.pad(top, (0, missing), value=-1) if missing else top
