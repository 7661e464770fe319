"""Reference of `bce_step_`: the whole `B x L` matrix at once, in fp32 (or fp64)."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from xmlkernels.reference.bce_loss import bce_sum, logits_and_targets
from xmlkernels.reference.hyper import DECAY, DX_SCALE, LR, SCALE
from xmlkernels.reference.rounding import saturate
from xmlkernels.reference.update import update_rows

GROUP = 128  # rows that are skipped together: a number of the op, not of any kernel's tiles


def bce_step_(
    weight: Tensor,
    x: Tensor,
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
    skip_below: float = 0.0,
    skipped: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `xmlkernels.ops.bce_step_`."""
    n = weight.shape[0] if rows < 0 else rows
    z, y, w, e = logits_and_targets(x, weight, bias, pos_row, pos_sample, pos_value, n, row_scale)
    scale, dx_scale = hyper[SCALE].to(w.dtype), hyper[DX_SCALE].to(w.dtype)
    finite = torch.isfinite(x).all()
    g = scale * (torch.sigmoid(z) - y)
    idle = torch.zeros(n, dtype=torch.bool, device=w.device)
    if skip_below > 0:
        idle, count = idle_rows(z, e, pos_row, hyper, bias is not None, skip_below)
        g = g.masked_fill(idle, 0)
        if skipped is not None:
            skipped += torch.where(finite, count, 0)
    nan = torch.full((), torch.nan, dtype=w.dtype, device=w.device)
    dx = torch.where(finite, dx_scale * (g @ w), nan)
    loss = torch.where(finite, scale * bce_sum(z, y), nan) if need_loss else w.new_empty(0)

    def view(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[:n]

    ids = torch.arange(n, device=weight.device) + row_offset
    states = (view(momentum), view(second), view(kahan))
    writes = update_rows(
        weight[:n], g.T @ e, hyper, counter, ids, *states, decoupled, row_scale=view(row_scale)
    )
    if bias is not None:
        writes.append((bias[:n], saturate(bias[:n] - hyper[LR] * g.sum(0), bias.dtype)))
    # Without state and decay a skipped row is not even stored again: its largest |value| of an e4m3
    # table stays, too.
    stateless = momentum is None and kahan is None
    still = idle & (hyper[DECAY] == 0) if stateless else torch.zeros_like(idle)
    for target, value in writes:
        keep = still if target.dim() == 1 else still[:, None]
        target.copy_(torch.where(finite & ~keep, value, target))
    return dx, loss


def idle_rows(
    z: Tensor, e: Tensor, pos_row: Tensor, hyper: Tensor, bias: bool, skip_below: float
) -> tuple[Tensor, Tensor]:
    """Return the rows to skip, bool [n], and the numbers of groups skipped and seen, int64 [2].

    Args:
        z: logits [B, n].
        e: x [B, D] in the working precision.
        pos_row, hyper, skip_below: as in `bce_step_`.
        bias: whether the table has one.
    """
    b, n = z.shape
    groups = -(-n // GROUP)
    # A row of zeros beside the batch, so that the maxima of an empty batch exist.
    peak = (
        pad(torch.sigmoid(z), (0, groups * GROUP - n, 0, 1)).view(b + 1, groups, GROUP).amax((0, 2))
    )
    reach = e.abs().sum(0).amax()
    reach = reach.clamp(min=b) if bias else reach  # a bias is a weight of an x that is 1
    busy = torch.zeros(groups + 1, dtype=torch.bool, device=z.device)
    busy[torch.where(pos_row < n, pos_row // GROUP, groups)] = True
    idle = ~busy[:-1] & ((hyper[LR] * hyper[SCALE]).abs() * peak * reach < skip_below)
    count = torch.stack([idle.sum(), torch.full_like(idle.sum(), groups)])
    return idle.repeat_interleave(GROUP)[:n], count
