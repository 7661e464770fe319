"""Reference of `cluster_step_`: the whole `B x L` matrix, masked to each sample's clusters."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from xmlkernels.reference.bce_loss import logits_and_targets
from xmlkernels.reference.hyper import DX_SCALE, LR, SCALE
from xmlkernels.reference.rounding import saturate
from xmlkernels.reference.update import update_rows_at_


def candidates(
    clusters: Tensor, row_ptr: Tensor, cluster_rows: int, n: int
) -> tuple[Tensor, Tensor]:
    """Return the rows that each sample selects: a mask [B, n] and a list [B, K, M] (-1: none)."""
    count = row_ptr.shape[0] - 1
    chosen = torch.zeros(clusters.shape[0], count + 1, dtype=torch.bool, device=clusters.device)
    chosen.scatter_(1, torch.where(clusters >= 0, clusters, count), True)
    chosen[:, count] = False  # the column that took the pads; rows of no cluster look there too
    owner = torch.searchsorted(row_ptr, torch.arange(n, device=row_ptr.device), right=True) - 1
    mask = chosen[:, torch.where(owner >= 0, owner, count)]
    row = row_ptr[clusters.clamp(min=0)][:, :, None] + torch.arange(
        cluster_rows, device=row_ptr.device
    )
    end = row_ptr[1:].clamp(max=n)[clusters.clamp(min=0)] if count else clusters
    return mask, torch.where((clusters[:, :, None] >= 0) & (row < end[:, :, None]), row, -1)


def cluster_step_(
    weight: Tensor,
    x: Tensor,
    clusters: Tensor,
    row_ptr: Tensor,
    cluster_rows: int,
    pos_row: Tensor,
    pos_sample: Tensor,
    hyper: Tensor,
    counter: Tensor,
    *,
    pos_value: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: Tensor | None = None,
    second: Tensor | None = None,
    kahan: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_offset: int = 0,
    rows: int = -1,
    decoupled: bool = False,
    need_loss: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `xmlkernels.ops.cluster_step_`."""
    n = weight.shape[0] if rows < 0 else rows
    mask, row = candidates(clusters, row_ptr, cluster_rows, n)
    touched = mask.any(0)
    z, y, w, e = logits_and_targets(x, weight, bias, pos_row, pos_sample, pos_value, n, row_scale)
    scale, dx_scale = hyper[SCALE].to(w.dtype), hyper[DX_SCALE].to(w.dtype)
    finite = torch.isfinite(x).all()
    nan = torch.full((), torch.nan, dtype=w.dtype, device=w.device)
    g = torch.where(mask, scale * (torch.sigmoid(z) - y), 0)
    # What stands in rows that nobody selects must not reach the sums, NaN included.
    dx = torch.where(finite, dx_scale * (g @ torch.where(touched[:, None], w, 0)), nan)
    listed = torch.cat([z, z.new_zeros(z.shape[0], 1)], 1).gather(
        1, torch.where(row >= 0, row, n).flatten(1)
    )
    scores = torch.where(finite, torch.where(row >= 0, listed.view(row.shape), -torch.inf), nan)
    loss = w.new_empty(0)
    if need_loss:
        loss = torch.where(
            finite, scale * torch.where(mask, softplus(z) - y * z, 0).sum().reshape(1), nan
        )

    if bias is not None:
        moved = saturate(bias[:n] - hyper[LR] * g.sum(0), bias.dtype)
        bias[:n] = torch.where(finite & touched, moved, bias[:n])
    ids = torch.where(touched, torch.arange(n, device=weight.device), weight.shape[0])
    update_rows_at_(
        weight,
        ids,
        g.T @ e,
        hyper,
        counter,
        finite,
        momentum=momentum,
        second=second,
        kahan=kahan,
        row_scale=row_scale,
        row_offset=row_offset,
        decoupled=decoupled,
    )
    return dx, scores, loss
