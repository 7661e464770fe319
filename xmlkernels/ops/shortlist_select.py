"""`shortlist_select` and `shortlist_merge`: the clusters that each sample hands on.

A cascade's candidates of a level are the nodes of the clusters that a sample kept at the level
above. Source: CascadeXML (NeurIPS 2022), section 3; that positives are never lost while there is
room is ours.
"""

from typing import Any

import torch
from torch import Tensor

from xmlkernels.errors import InputError
from xmlkernels.ops.checks import check_tensor, expect
from xmlkernels.ops.cluster_checks import check_clusters, check_largest
from xmlkernels.ops.define import define, public
from xmlkernels.reference.shortlist_select import PLACES, locate, rank, sizes
from xmlkernels.reference.shortlist_select import shortlist_merge as reference_merge
from xmlkernels.reference.shortlist_select import shortlist_select as reference

__all__ = ["PLACES", "locate", "rank", "shortlist_merge", "shortlist_select", "sizes"]


@public
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
    """Choose the k best candidates of each sample, but its positives first, as keys.

    A candidate's place is (slot of its cluster in the row) * M + (number within the cluster), and a
    key of 64 bits holds whether the candidate is a positive, its score and its place: keys order as
    candidates do, of equal scores the lower place first. A sample with more than k positives among
    its candidates keeps them all, up to `width`; one with fewer fills up to k with the best others.
    Nothing waits for the device. `shortlist_merge` gives the nodes. Not differentiable.

    Args:
        scores: fp32 [B, K, M] of the candidates; what lies beyond a cluster's end has no meaning.
        clusters: int64 [B, K], ascending in a row, -1 pads last.
        row_ptr: int64 [C + 1]: cluster c owns the nodes row_ptr[c] to row_ptr[c + 1], M at most.
        k: candidates to keep, 0 or more.
        width: columns of the result.
        node, sample: int64 [P] and int32 [P], unique positives in any order; those that are no
            candidates change nothing. None for both: none.
        first: int64 [B, K], the place of each cluster's first node, where it is another: of a part
            of a level.

    Returns:
        int64 [B, width], in the order of their places, -1 pads last.

    Raises:
        InputError: an argument's type, dtype, shape, device or layout does not fit, or, on the CPU,
            its values.
    """
    more: dict[str, Any] = {"node": node, "sample": sample, "first": first}
    _check(scores, clusters, row_ptr, k, width, **more)
    op = torch.ops.xmlkernels.shortlist_select
    keys: Tensor = op(scores.detach(), clusters, row_ptr, k, width, **more)
    return keys


@public
def shortlist_merge(
    keys: Tensor, clusters: Tensor, row_ptr: Tensor, most: int, k: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give the nodes of the best keys of each sample: of `shortlist_select`, from several parts.

    It keeps of all keys what `shortlist_select` keeps of the candidates.

    Args:
        keys: int64 [B, N], no key twice in a row, -1 pads anywhere.
        clusters: int64 [B, K], row_ptr: int64 [C + 1], most: M: of the whole level, in which the
            places count.
        k, width: as of `shortlist_select`.

    Returns:
        nodes: int64 [B, width], in the order of their places, -1 pads last.
        places: int64 [B, width], 0 for pads.
        scores: fp32 [B, width], -inf for pads.
        forced: int64 [1], positives among them.

    Raises:
        InputError: an argument's type, dtype, shape, device or layout does not fit, or, on the CPU,
            its values.
    """
    _check_merge(keys, clusters, row_ptr, most, k, width)
    op = torch.ops.xmlkernels.shortlist_merge
    out: tuple[Tensor, Tensor, Tensor, Tensor] = op(keys, clusters, row_ptr, most, k, width)
    return out


def _check(
    scores: Tensor,
    clusters: Tensor,
    row_ptr: Tensor,
    k: int,
    width: int,
    *,
    node: Tensor | None = None,
    sample: Tensor | None = None,
    first: Tensor | None = None,
) -> None:
    op = "shortlist_select"
    check_tensor(op, "scores", scores, (torch.float32,), (None, None, None), scores.device)
    samples, slots, most = scores.shape
    check_clusters(op, clusters, row_ptr, samples, scores.device)
    check_tensor(op, "clusters", clusters, (torch.int64,), (samples, slots), scores.device)
    check_largest(op, "scores", row_ptr, most)
    _check_numbers(op, slots, most, k, width)
    if (node is None) != (sample is None):
        expected, got = "one beside node", "None" if sample is None else "a tensor without node"
        raise InputError(f"{op}: argument sample", expected, got, "pass both or none")
    if node is not None and sample is not None:
        check_tensor(op, "node", node, (torch.int64,), (None,), scores.device)
        check_tensor(op, "sample", sample, (torch.int32,), node.shape, scores.device)
    if first is not None:
        check_tensor(op, "first", first, (torch.int64,), (samples, slots), scores.device)
    if scores.device.type != "cpu":
        return
    if sample is not None and len(sample):
        low, high = (int(value) for value in torch.aminmax(sample))
        where, expected = f"{op}: argument sample", f"samples from 0 to {samples - 1}"
        got, mend = f"{low} to {high}", "number samples within the batch"
        expect(low >= 0 and high < samples, where, expected, got, mend)
    if first is not None and first.numel():
        low, high = (int(value) for value in torch.aminmax(first))
        where, expected = f"{op}: argument first", f"places from 0 to {PLACES + 1 - most}"
        got, mend = f"{low} to {high}", "count places within one sample's candidates"
        expect(low >= 0 and high <= PLACES + 1 - most, where, expected, got, mend)


def _check_merge(
    keys: Tensor, clusters: Tensor, row_ptr: Tensor, most: int, k: int, width: int
) -> None:
    op = "shortlist_merge"
    check_tensor(op, "keys", keys, (torch.int64,), (None, None), keys.device)
    check_clusters(op, clusters, row_ptr, keys.shape[0], keys.device)
    check_largest(op, "most", row_ptr, most)
    _check_numbers(op, clusters.shape[1], most, k, width)
    if keys.device.type != "cpu" or not keys.numel() or int(keys.max()) < 0:
        return
    places = clusters.shape[1] * most
    largest = PLACES - int((keys & PLACES).min())  # of a pad 0
    where, expected = f"{op}: argument keys", f"places below {places}, K times most"
    mend = "pass what shortlist_select gave for parts of these clusters"
    expect(largest < places, where, expected, str(largest), mend)


def _check_numbers(op: str, slots: int, most: int, k: int, width: int) -> None:
    expected, got = "at most 2^30 candidates of a sample", f"{slots} clusters of {most}"
    where, mend = f"{op}: argument clusters", "keep fewer clusters"
    expect(slots * most <= PLACES + 1, where, expected, got, mend)
    for name, value in (("k", k), ("width", width)):
        where, mend = f"{op}: argument {name}", "pass the number of nodes to keep"
        expect(value >= 0, where, "0 or more", str(value), mend)


def _fake(
    scores: Tensor, clusters: Tensor, row_ptr: Tensor, k: int, width: int, **_: object
) -> Tensor:
    return scores.new_empty((scores.shape[0], width), dtype=torch.int64)


def _fake_merge(
    keys: Tensor, clusters: Tensor, row_ptr: Tensor, most: int, k: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nodes = keys.new_empty((keys.shape[0], width))
    scores = keys.new_empty(nodes.shape, dtype=torch.float32)
    return nodes, torch.empty_like(nodes), scores, keys.new_empty(1)


# On a card the reference is the kernel: short work on B rows of some hundred keys.
_CARD = "xmlkernels.reference.shortlist_select"
define(reference, _fake, _check, cuda=_CARD)
define(reference_merge, _fake_merge, _check_merge, cuda=_CARD)
