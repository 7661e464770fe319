"""Score documents down a label tree, level by level, without training."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from xmlkernels import dist
from xmlkernels.models.scored import Candidates
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.shortlist import Whole, best, candidates, count, locate, select

Positives = Sequence[tuple[Tensor, Tensor]]
_SATURATED = -1e-38  # log probability: above, fp32 would give a logit of infinity; it stays at 87


@dataclass(frozen=True)
class Descent:
    """One level of a descent.

    Of a level that processes share, each has the candidates in its own clusters; nodes and clusters
    keep their numbers in the whole level.

    Attributes:
        above: int64 [B, K], all clusters kept at the level above.
        clusters: int64 [B, K], those of them that are here.
        row_ptr, most: their nodes; see `xmlkernels.nn.shortlist`.
        node: int64 [B, K, M], the candidates; real: bool [B, K, M].
        logits: fp32 [B, K, M], the level's own.
        kept: int64 [B, K'], what is handed on; empty at the last level.
        parent: int64 [B, K'], columns of the parents of `kept` in `above`.
        kept_logits: fp32 [B, K'], the logits of `kept`, -inf for pads.
        counts: int64 [B], candidates of the whole level.
        slot: of a level that is shared, int64 [B, K]: the columns of `clusters` in `above`; else
            None.
    """

    above: Tensor
    clusters: Tensor
    row_ptr: Tensor
    most: int
    node: Tensor
    real: Tensor
    logits: Tensor
    kept: Tensor
    parent: Tensor
    kept_logits: Tensor
    counts: Tensor
    slot: Tensor | None = None


@dataclass(frozen=True)
class TreeOnDevice:
    """The label tree on the device.

    Attributes:
        row_ptr: per level, int64 [C + 1]: its nodes under each of the C clusters above; C = 1 at
            the first level.
        most: per level, M: the largest number of nodes under one cluster.
    """

    row_ptr: tuple[Tensor, ...]
    most: tuple[int, ...]


def descend(
    heads: CascadeHeads,
    x: Sequence[Tensor],
    tree: TreeOnDevice,
    *,
    positives: Positives | None = None,
    bound: int = 0,
) -> Iterator[Descent]:
    """Score level by level: all nodes of the first, then the children of the best clusters.

    The best are the `heads.topk` by the level's own logit.

    Args:
        heads: tables of the levels.
        x: fp32 [B, D] for each level.
        tree: of the heads, on their device.
        positives: pairs of every level, to be kept as training keeps them; None at prediction.
        bound: how many clusters beyond k a row may keep for its positives.
    """
    above = torch.zeros(x[0].shape[0], 1, dtype=torch.int64, device=x[0].device)
    for r, level in enumerate(heads.tables().values()):
        row_ptr, most = tree.row_ptr[r], tree.most[r]
        clusters, counts, slot, whole = above, count(above, row_ptr), None, None
        if level.shared:
            own = level.own(row_ptr)
            clusters, slot = level.chosen(above, row_ptr)
            whole = Whole(above, slot, row_ptr, most)
            row_ptr, most = own.bounds(row_ptr), own.most(most)
        node, real = candidates(clusters, row_ptr, most)
        index = torch.where(real, node - level.shard.first, -1).flatten(1)
        logits = level.scores(x[r], index[0] if r == 0 else index).view(node.shape)
        kept = parent = clusters[:, :0]
        kept_logits = logits[:, 0, :0]
        if r + 1 < len(heads.levels):
            k = heads.topk[r]
            forced = None if positives is None else positives[r]
            width = k if forced is None else k + bound
            more: dict[str, Any] = {"width": width, "positives": forced, "whole": whole}
            chosen = select(logits, clusters, row_ptr, k, **more)
            kept, kept_logits = chosen.nodes, chosen.scores
            parent = chosen.place // tree.most[r]
        own_level = above, clusters, row_ptr, most, node, real, logits
        yield Descent(*own_level, kept, parent, kept_logits, counts, slot)
        above = kept


def kept_in_training(topk: Sequence[int], most: Sequence[int], bound: int) -> list[int]:
    """Count the columns of each level's shortlist in a step, coarse to fine; see `select`.

    Args:
        topk: of each level of clusters.
        most: M of each level, the nodes of the first; see `TreeOnDevice`.
        bound: clusters beyond k that a sample may keep for its positives.
    """
    kept = [1]
    for k, wide in zip(topk, most, strict=False):
        kept.append(min(k + bound, kept[-1] * wide))
    return kept[1:]


def shortlist_traffic(documents: int, processes: int, kept: Sequence[int]) -> int:
    """Return the bytes of shortlists that the first process receives in a step.

    Where processes share the levels, each sends the best of its own clusters for every document.

    Args:
        documents: B, of all processes together.
        processes: G.
        kept: of `kept_in_training`.
    """
    return 8 * (processes - 1) * documents * sum(kept)


def scores_by(scheme: str, levels: Iterable[Descent]) -> Iterator[Tensor]:
    """Score each level's candidates under a scheme, coarse to fine: fp32 [B, K, M].

    Yields:
        The logits for "level", logs of probabilities for the other schemes.
    """
    above: Tensor | None = None
    for level in levels:
        if scheme == "level":
            yield level.logits
            continue
        own = logsigmoid(level.logits)
        if above is not None:
            own = own + (above if level.slot is None else above.gather(1, level.slot))[:, :, None]
        yield own
        kept = logsigmoid(level.kept_logits)
        if above is not None and scheme == "path":
            kept = kept + above.gather(1, level.parent)
        above = kept


def ranked(
    level: Descent, scores: Tensor, k: int, scheme: str, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Give the k best candidates of a level, of all processes where they share it.

    Args:
        level: of `descend`.
        scores: fp32 [B, K, M], by the scheme; see `scores_by`.
        k: nodes per document.
        scheme: of the scores.
        exclude: int64 [B, E], nodes never to be given; -1 pads.

    Returns:
        values: fp32 [B, k], descending: logits of the scheme's probability, -inf where there are
        fewer than k. nodes: int64 [B, k]; equal values in ascending order of node, -1 where there
        are fewer.
    """
    size = level.node.shape[0]
    real = (level.real & ~level.logits.isnan()).flatten(1)
    if exclude is not None and exclude.shape[1] > 0:
        sample = torch.arange(size, device=exclude.device).repeat_interleave(exclude.shape[1])
        place, found = locate(exclude.flatten(), sample, level.clusters, level.row_ptr, level.most)
        barred = torch.zeros(real.numel() + 1, dtype=torch.bool, device=real.device)
        barred[torch.where(found, place, real.numel())] = True
        real = real & ~barred[:-1].view(real.shape)
    scores = scores.flatten(1)
    place, there = best(scores, real, k)
    values = torch.where(there, scores.gather(1, place), -torch.inf)
    nodes = torch.where(there, level.node.flatten(1).gather(1, place), -1)
    if level.slot is not None:
        # Scores, not logits: of two that differ in the last place the logits may be equal.
        values, nodes = dist.merge_topk(values, nodes, k)
    if scheme != "level":
        values = torch.where(nodes >= 0, logit_of_log(values), -torch.inf)
    return values, nodes


def logit_of_log(log_p: Tensor) -> Tensor:
    """Turn log p into log(p / (1 - p)), fp32.

    Exact to a few units in the last place near p = 0 and near p = 1 alike.
    """
    exact = log_p.double().clamp(max=_SATURATED)
    # 1 - p as -expm1(log p) where p is near 1, as 1 - exp(log p) where it is near 0: each loses
    # nothing there.
    other = torch.where(
        exact > -0.6931471805599453, (-torch.expm1(exact)).log(), torch.log1p(-exact.exp())
    )
    return (exact - other).float()


def joined(level: Descent, row_ptr: Tensor, most: int) -> Descent:
    """Bring the candidates of all processes together: the level as one alone would have it.

    Args:
        level: of which each process has its own clusters' candidates.
        row_ptr, most: of the whole level; see `TreeOnDevice`.
    """
    if level.slot is None:
        return level
    clusters = level.above
    node, real = candidates(clusters, row_ptr, most)
    place = Whole(clusters, level.slot, row_ptr, most).places(
        level.clusters, level.row_ptr, level.most
    )
    # One more column takes what is no candidate.
    place = torch.where(level.real, place, clusters.shape[1] * most).flatten(1)
    own = torch.where(level.real, level.logits, 0).flatten(1)
    logits = own.new_zeros(len(own), clusters.shape[1] * most + 1).scatter_(1, place, own)
    # Each stands in one process; the others add 0.
    logits = dist.sum_(logits[:, :-1].contiguous()).view(node.shape)
    return replace(
        level,
        clusters=clusters,
        row_ptr=row_ptr,
        most=most,
        node=node,
        real=real,
        logits=logits,
        slot=None,
    )


def candidates_of(level: Descent, positives: tuple[Tensor, Tensor]) -> Candidates:
    """List the candidates of a level with their logits, and which of them are positive."""
    place, found = locate(*positives, level.clusters, level.row_ptr, level.most)
    hit = torch.zeros(level.node.numel() + 1, dtype=torch.bool, device=place.device)
    hit[torch.where(found, place, level.node.numel())] = True
    nodes = torch.where(level.real, level.node, -1)
    logits = torch.where(level.real, level.logits, -torch.inf)
    hit = hit[:-1].view(level.node.shape)
    return Candidates(nodes.flatten(1), logits.flatten(1), hit.flatten(1))


def loss_of(
    level: Descent, positives: tuple[Tensor, Tensor], weight: float, reference: bool
) -> Tensor:
    """Compute the level's share of the loss [1]: weight times the mean BCE over its candidates.

    See `loss_scale` for the mean. Of a level that processes share, the mean is over all of them.
    """
    place, found = locate(*positives, level.clusters, level.row_ptr, level.most)
    hit = torch.where(found, level.logits.flatten()[place], 0).sum()
    total = torch.where(level.real, softplus(level.logits), 0).sum() - hit
    if level.slot is not None:
        dist.sum_(total)
    scale, pads = loss_scale(level.counts, weight, reference)
    return scale * (total + pads)


def loss_scale(counts: Tensor, weight: float, reference: bool) -> tuple[Tensor, Tensor]:
    """Compute what multiplies a level's summed BCE.

    Args:
        counts: int64 [B], candidates of each sample.
        weight: rw_loss of the level.
        reference: divide by the B x (longest list) matrix as CascadeXML's code does, pads included,
            each of which adds ln 2.

    Returns:
        scale: fp32 [1], weight / number of candidates. pads: fp32 [1], what the pads add to the sum
            (0 but for `reference`).
    """
    real = counts.sum()
    whole = counts.max() * counts.shape[0] if reference else real
    scale = (weight / whole.clamp(min=1)).to(torch.float32).reshape(1)
    return scale, ((whole - real) * 0.6931471805599453).to(torch.float32).reshape(1)
