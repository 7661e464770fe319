"""Train the levels of a cascade on a batch, each on the shortlist that the one above left."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xmlkernels import dist
from xmlkernels.models.descent import Positives, TreeOnDevice, loss_scale
from xmlkernels.models.training import CascadeTraining
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.shortlist import count, select

Scatter = Callable[[Tensor], dist.Scattered]


@dataclass(frozen=True)
class LevelSteps:
    """What the steps of all levels gave.

    Attributes:
        dx: per level fp32 [B, D], or on its way where processes share the level.
        loss: fp32 [1], or [0] when not asked for.
        lost: int64 [R - 1], positives of each level of clusters that found no room.
    """

    dx: list[Tensor | dist.Scattered]
    loss: Tensor
    lost: Tensor


def train_levels(
    heads: CascadeHeads,
    tree: TreeOnDevice,
    x: list[Tensor],
    positives: Positives,
    settings: CascadeTraining,
    scatter: Scatter,
    *,
    lr: float | Tensor,
    beta1: float | Tensor | None,
    dx_scale: Tensor,
    need_loss: bool,
) -> LevelSteps:
    """Take the step of every level, coarse to fine.

    Args:
        heads: the tables.
        tree: of the heads, on their device.
        x: fp32 [B, D] for each level; one that is not finite leaves every table as it was.
        positives: (node, sample) of every level.
        settings: weights of the levels, and room for positives.
        scatter: begins to sum the gradient of a level that processes share.
        lr, beta1, dx_scale, need_loss: as of `CascadeLevel.step`.
    """
    device, size = x[0].device, x[0].shape[0]
    out, lost = list[Tensor | dist.Scattered](), list[Tensor]()
    losses = torch.zeros(1 if need_loss else 0, device=device)
    clusters = torch.zeros(size, 1, dtype=torch.int64, device=device)
    tables = list(heads.tables().values())
    for r, (level, weight) in enumerate(zip(tables, settings.weights(len(tables)), strict=True)):
        row_ptr, most = tree.row_ptr[r], tree.most[r]
        scale, pads = loss_scale(count(clusters, row_ptr), weight, settings.reference_loss)
        dx, scores, loss = level.update(
            x[r],
            clusters,
            row_ptr,
            most,
            positives[r],
            lr=lr,
            beta1=beta1,
            scale=scale,
            dx_scale=dx_scale,
            need_loss=need_loss,
        )
        # On its way while the level finishes its step.
        out.append(scatter(dx) if level.shared else dx)
        level.after_step()
        if need_loss:
            losses += (dist.sum_(loss) if level.shared else loss) + scale * pads
        if r + 1 < len(tables):
            k = heads.topk[r]
            width = k + settings.positives_bound
            choose = _select_together if tables[-1].shared else _select
            clusters, forced = choose(scores, clusters, row_ptr, k, width, positives[r])
            lost.append((positives[r][0] < level.nodes).sum() - forced)
    return LevelSteps(out, losses, torch.cat(lost))


def _select(
    scores: Tensor,
    clusters: Tensor,
    row_ptr: Tensor,
    k: int,
    width: int,
    positives: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Choose what each sample hands on, and count the positives in it: see `select`."""
    kept, _, forced = select(scores, clusters, row_ptr, k, width=width, positives=positives)
    return kept, forced


def _select_together(
    scores: Tensor,
    clusters: Tensor,
    row_ptr: Tensor,
    k: int,
    width: int,
    positives: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Do what `_select` does, each process for its part of the samples.

    All have the same scores. Sorting them takes longer than a level's step, and the result is
    small.
    """
    counts = [part.stop - part.start for part in dist.parts(len(scores))]
    own, (node, sample) = dist.part(len(scores)), positives
    inside = (sample >= own.start) & (sample < own.stop)
    mine = torch.where(inside, node, -1), torch.where(inside, sample - own.start, 0)
    kept, forced = _select(scores[own], clusters[own], row_ptr, k, width, mine)
    # One more row takes the number of positives.
    sent = torch.cat([kept, forced.expand(1, kept.shape[1])])
    rows = [n + 1 for n in counts]
    found = torch.split(dist.gather_rows(sent, rows), rows)
    total = torch.stack([part[-1, :1] for part in found]).sum(0)
    return torch.cat([part[:-1] for part in found]), total
