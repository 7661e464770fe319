"""Reference of `bce_loss` and its backward: the whole `B x L` matrix at once, in fp32 (or fp64)."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from xmlkernels.reference.rounding import decode


def logits_and_targets(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_row: Tensor,
    pos_sample: Tensor,
    pos_value: Tensor | None,
    n: int,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits, targets [B, n], weight [n, D] and x [B, D], in the working precision."""
    w = decode(weight[:n], None if row_scale is None else row_scale[:n])
    work = w.dtype
    e = x.to(work)
    z = e @ w.T
    if bias is not None:
        z = z + bias[:n].to(work)
    real = pos_row < n  # a graph of fixed capacity is filled with rows beyond the last
    value = torch.ones_like(pos_row, dtype=work) if pos_value is None else pos_value.to(work)
    # Filled entries become a zero added at a place that exists, so that no shape depends on the
    # data.
    y = torch.zeros(z.shape[0] * n + 1, dtype=work, device=z.device)
    place = torch.where(real, pos_sample.to(torch.int64) * n + pos_row, z.shape[0] * n)
    y = y.index_add(0, place, torch.where(real, value, 0))
    return z, y[:-1].reshape(z.shape), w, e


def bce_sum(z: Tensor, y: Tensor) -> Tensor:
    """Return the sum over samples and labels of softplus(z) - y z, shape [1]."""
    return (softplus(z) - y * z).sum().reshape(1)


def bce_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_row: Tensor,
    pos_sample: Tensor,
    pos_value: Tensor | None = None,
    row_scale: Tensor | None = None,
    *,
    rows: int = -1,
) -> Tensor:
    """See `xmlkernels.ops.bce_loss`."""
    n = weight.shape[0] if rows < 0 else rows
    z, y, _, _ = logits_and_targets(x, weight, bias, pos_row, pos_sample, pos_value, n, row_scale)
    return torch.where(torch.isfinite(x).all(), bce_sum(z, y), torch.nan)


def bce_loss_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_row: Tensor,
    pos_sample: Tensor,
    pos_value: Tensor | None = None,
    row_scale: Tensor | None = None,
    *,
    rows: int = -1,
    need_dweight: bool = False,
    need_dbias: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the sum: dx [B, D], dweight [L, D], dbias [L]; [0] where not asked."""
    n = weight.shape[0] if rows < 0 else rows
    z, y, w, e = logits_and_targets(x, weight, bias, pos_row, pos_sample, pos_value, n, row_scale)
    g = torch.sigmoid(z) - y
    dweight, dbias = w.new_empty(0), w.new_empty(0)
    if need_dweight:
        dweight = w.new_zeros(weight.shape)
        dweight[:n] = g.T @ e
    if need_dbias:
        dbias = w.new_zeros(weight.shape[0])
        dbias[:n] = g.sum(0)
    return g @ w, dweight, dbias
