"""Reference of `shortlist_matmul` and its backward: the gathered `B x S x D` rows at once."""

import torch
from torch import Tensor

from xmlkernels.reference.rounding import decode


def gathered_rows(
    x: Tensor, weight: Tensor, index: Tensor, row_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows [B, S, D], places of real entries [B, S], index [B, S], and x [B, D].

    Rows (zeros at pads) and x are in the working precision: fp32, or fp64.
    """
    work = decode(weight[:0], None if row_scale is None else row_scale[:0]).dtype
    wide = index.expand(x.shape[0], index.shape[-1])
    real = wide >= 0
    rows = torch.zeros(*wide.shape, weight.shape[1], dtype=work, device=weight.device)
    named = wide[real]
    rows[real] = decode(weight[named], None if row_scale is None else row_scale[named])
    return rows, real, wide, x.to(work)


def shortlist_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, row_scale: Tensor | None = None
) -> Tensor:
    """See `xmlkernels.ops.shortlist_matmul`."""
    rows, real, wide, e = gathered_rows(x, weight, index, row_scale)
    z = torch.einsum("bd,bsd->bs", e, rows)
    if bias is not None:
        z[real] += bias[wide[real]].to(z.dtype)
    return torch.where(real, z, -torch.inf)


def shortlist_backward(
    dlogits: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    row_scale: Tensor | None = None,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `shortlist_matmul`.

    Args:
        dlogits: [B, S], gradient of the logits; what it holds at pads is ignored, NaN included.
        x, weight, index, row_scale: as in the forward.

    Returns:
        dx: [B, D] in the working precision; [0] when not asked.
        rows: int64 [U], the table rows that a sample names, each once, ascending; [0] when neither
            of the next is asked.
        grad: [U, D], gradient of those rows; [0, D] when not asked.
        dbias: [U], gradient of their bias; [0] when not asked.
    """
    table, real, wide, e = gathered_rows(x, weight, index, row_scale)
    g = torch.where(real, dlogits.to(e.dtype), 0)
    dx = torch.einsum("bs,bsd->bd", g, table) if need_dx else e.new_empty(0)
    rows, grad, dbias = index.new_empty(0), e.new_empty(0, weight.shape[1]), e.new_empty(0)
    if need_dweight or need_dbias:
        rows, place = torch.unique(wide[real], return_inverse=True)
    if need_dweight:
        shares = g[real][:, None] * e[real.nonzero()[:, 0]]
        grad = e.new_zeros(len(rows), weight.shape[1]).index_add(0, place, shares)
    if need_dbias:
        dbias = e.new_zeros(len(rows)).index_add(0, place, g[real])
    return dx, rows, grad, dbias
