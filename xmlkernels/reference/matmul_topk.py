"""Reference of `matmul_topk`: all scores, one stable sort."""

import torch
from torch import Tensor

from xmlkernels.reference.rounding import decode


def matmul_topk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    exclude: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_offset: int = 0,
    rows: int = -1,
) -> tuple[Tensor, Tensor]:
    """See `xmlkernels.ops.matmul_topk`."""
    n = weight.shape[0] if rows < 0 else rows
    w = decode(weight[:n], None if row_scale is None else row_scale[:n])
    z = x.to(w.dtype) @ w.T
    if bias is not None:
        z = z + bias[:n].to(w.dtype)
    z = torch.where(torch.isnan(z), -torch.inf, z)
    if exclude is not None:
        local = exclude - row_offset
        inside = (local >= 0) & (local < n)
        # One more column takes what lies outside, padding included.
        dropped = torch.zeros(z.shape[0], n + 1, dtype=torch.bool, device=z.device)
        dropped.scatter_(1, torch.where(inside, local, n), True)
        z = z.masked_fill(dropped[:, :n], -torch.inf)
    # Stable: equal scores keep the lower row.
    values, order = torch.sort(z, dim=1, descending=True, stable=True)
    values, order = values[:, :k].contiguous(), order[:, :k].contiguous()
    if values.shape[1] < k:
        pad = (values.shape[0], k - values.shape[1])
        values = torch.cat([values, values.new_full(pad, -torch.inf)], 1)
        order = torch.cat([order, order.new_zeros(pad)], 1)
    return values, torch.where(values == -torch.inf, -1, order + row_offset)
