"""Reference of `bce_step_`: the whole `B x L` matrix at once, in fp32 (or fp64)."""

import torch
from torch import Tensor

from xmlkernels.reference.bce_loss import bce_sum, logits_and_targets
from xmlkernels.reference.rounding import saturate
from xmlkernels.reference.update import update_rows


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
) -> tuple[Tensor, Tensor]:
    """See `xmlkernels.ops.bce_step_`."""
    n = weight.shape[0] if rows < 0 else rows
    z, y, w, e = logits_and_targets(x, weight, bias, pos_row, pos_sample, pos_value, n, row_scale)
    scale, dx_scale = hyper[5].to(w.dtype), hyper[6].to(w.dtype)
    finite = torch.isfinite(x).all()
    g = scale * (torch.sigmoid(z) - y)
    nan = torch.full((), torch.nan, dtype=w.dtype, device=w.device)
    dx = torch.where(finite, dx_scale * (g @ w), nan)
    loss = torch.where(finite, scale * bce_sum(z, y), nan) if need_loss else w.new_empty(0)

    def view(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[:n]

    ids = torch.arange(n, device=weight.device) + row_offset
    states = (view(momentum), view(second), view(kahan))
    writes = update_rows(weight[:n], g.T @ e, hyper, counter, ids, *states, decoupled, row_scale=view(row_scale))
    if bias is not None:
        writes.append((bias[:n], saturate(bias[:n] - hyper[0] * g.sum(0), bias.dtype)))
    for target, value in writes:
        target.copy_(torch.where(finite, value, target))
    return dx, loss
