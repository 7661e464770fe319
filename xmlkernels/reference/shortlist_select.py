"""Reference of `shortlist_select` and `shortlist_merge`: keys that order as candidates do.

It is what a card runs, too: nothing here waits for the device.
"""

import torch
from torch import Tensor

PLACE_BITS = 30
PLACES = (1 << PLACE_BITS) - 1
FORCED = 1 << 62  # above every score, whose 32 bits are above 30 bits of place
_SCORES = (1 << 32) - 1


def shortlist_select(
    scores: Tensor,
    clusters: Tensor,
    row_ptr: Tensor,
    k: int,
    width: int,
    *,
    node: Tensor | None = None,
    sample: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """See `xmlkernels.ops.shortlist_select`."""
    size, slots, most = scores.shape
    number = torch.arange(most, device=scores.device)
    if first is None:
        first = torch.arange(slots, device=scores.device) * most
    place = first[..., None] + number
    real = number < sizes(row_ptr)[clusters][:, :, None]
    keys = rank(scores.flatten(1), real.flatten(1), place.expand(size, slots, most).flatten(1))
    if node is not None and sample is not None and keys.numel():
        at, found = locate(node, sample, clusters, row_ptr, most)
        # To leave out the positives that are no candidates would need their number.
        keys.view(-1).scatter_add_(0, at, torch.where(found, FORCED, 0))
    return _best(keys, k, width)


def shortlist_merge(
    keys: Tensor, clusters: Tensor, row_ptr: Tensor, most: int, k: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `xmlkernels.ops.shortlist_merge`."""
    keys = _best(keys, k, width)
    there, ordered = keys >= 0, (keys >> PLACE_BITS) & _SCORES
    place = torch.where(there, PLACES - (keys & PLACES), 0)
    if clusters.shape[1] == 0:
        clusters = torch.nn.functional.pad(clusters, (0, 1), value=-1)
    slot = place // max(1, most)
    start = row_ptr[clusters.gather(1, slot).clamp(min=0)] - slot * most
    nodes = torch.where(there, start + place, -1)
    bits = (ordered - (1 << 31)).to(torch.int32)
    found = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    forced = (keys >= FORCED).sum().reshape(1)
    return nodes, place, torch.where(there, found, -torch.inf), forced


def _best(keys: Tensor, k: int, width: int) -> Tensor:
    """Keep the k best keys of each row, but all forced ones first: int64 [B, width].

    They come in ascending order of their places, -1 pads last.
    """
    top = keys.topk(min(width, keys.shape[1]), dim=1).values
    top = torch.nn.functional.pad(top, (0, width - top.shape[1]), value=-1)
    number = torch.arange(width, device=keys.device)
    keep = (top >= 0) & ((top >= FORCED) | (number < k))
    place = torch.where(keep, PLACES - (top & PLACES), FORCED)
    return torch.where(keep, top, -1).gather(1, place.argsort(1))


def sizes(row_ptr: Tensor) -> Tensor:
    """Count the nodes of each cluster, int64 [C + 1]; the last is 0, that of pads, at -1."""
    return torch.nn.functional.pad(row_ptr.diff(), (0, 1))


def rank(scores: Tensor, real: Tensor, place: Tensor) -> Tensor:
    """Give each candidate an int64 of its own that orders as its score does.

    Of equal scores the lower place comes first; -1 where there is no candidate. Exact ties are
    common (a fresh table scores zeros alike, bf16 rounds), and torch.topk leaves open which one it
    takes.

    Args:
        scores: fp32 [B, S]; -0 and 0 are equal.
        real: bool [B, S].
        place: int64 [B, S] or [S], in which order candidates of one score come.
    """
    bits = (scores + 0.0).view(torch.int32)
    # Ascending as integers where the scores ascend as numbers.
    ordered = bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
    keys = ordered.to(torch.int64).add_(1 << 31).bitwise_left_shift_(PLACE_BITS)
    return keys.bitwise_or_(PLACES - place).masked_fill_(~real, -1)


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
