"""Train the levels of a cascade on a batch, each on the shortlist that the one above left."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xmlkernels import dist
from xmlkernels.models.descent import Positives, TreeOnDevice, loss_scale
from xmlkernels.models.training import CascadeTraining
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.cascade_level import CascadeLevel
from xmlkernels.nn.shortlist import Kept, Whole, count, select

Scatter = Callable[[list[Tensor]], list[dist.ScatteredColumns]]


@dataclass(frozen=True)
class LevelSteps:
    """What the steps of all levels gave.

    Attributes:
        dx: per level fp32 [B, D], or on its way where processes share the levels.
        loss: fp32 [1], or [0] when not asked for.
        lost: int64 [R - 1], positives of each level of clusters that found no room.
    """

    dx: list[Tensor] | list[dist.ScatteredColumns]
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
        scatter: begins to sum the gradients of levels that processes share.
        lr, beta1, dx_scale, need_loss: as of `CascadeLevel.step`.
    """
    device, size = x[0].device, x[0].shape[0]
    dxs, lost = list[Tensor](), list[Tensor]()
    out: list[Tensor] | list[dist.ScatteredColumns] = dxs
    losses, pad_losses = torch.zeros(2, 1 if need_loss else 0, device=device)
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
        dxs.append(dx)
        if r + 1 == len(tables) and level.shared:
            out = scatter(dxs)  # on their way while the level finishes its step
        level.after_step()
        if need_loss:
            losses += loss
            pad_losses += scale * pads
        if r + 1 < len(tables):
            k = heads.topk[r]
            width = k + settings.positives_bound
            kept = _select(level, scores, clusters, row_ptr, most, k, width, positives[r])
            clusters = kept.nodes
            lost.append((positives[r][0] < level.shard.rows).sum() - kept.forced)
    if need_loss and tables[-1].shared:
        dist.sum_(losses)
    return LevelSteps(out, losses + pad_losses, torch.cat(lost))


def _select(
    level: CascadeLevel,
    scores: Tensor,
    clusters: Tensor,
    row_ptr: Tensor,
    most: int,
    k: int,
    width: int,
    positives: tuple[Tensor, Tensor],
) -> Kept:
    """Choose what each sample hands on from a level, by the scores that its step gave."""
    if not level.shared:
        return select(scores, clusters, row_ptr, k, width=width, positives=positives)
    here, slot = level.chosen(clusters, row_ptr)
    whole = Whole(clusters, slot, row_ptr, most)
    bounds = level.own(row_ptr).bounds(row_ptr)
    return select(scores, here, bounds, k, width=width, positives=positives, whole=whole)
