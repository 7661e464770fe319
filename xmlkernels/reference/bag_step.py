"""Reference of `bag_step_`: gradients of all occurrences summed by row, then a sparse update."""

import torch
from torch import Tensor

from xmlkernels.reference.hyper import SCALE
from xmlkernels.reference.update import update_rows_at_


def bag_step_(
    weight: Tensor,
    grad: Tensor,
    token: Tensor,
    offset: Tensor,
    hyper: Tensor,
    counter: Tensor,
    *,
    token_weight: Tensor | None = None,
    momentum: Tensor | None = None,
    second: Tensor | None = None,
    kahan: Tensor | None = None,
    row_step: Tensor | None = None,
    row_decay: Tensor | None = None,
    decay_sum: Tensor | None = None,
    row_offset: int = 0,
    decoupled: bool = False,
) -> None:
    """See `xmlkernels.ops.bag_step_`."""
    work = torch.promote_types(weight.dtype, torch.float32)
    factor = torch.ones_like(token, dtype=work) if token_weight is None else token_weight.to(work)
    place = torch.arange(token.shape[0], device=token.device)
    real = (token >= 0) & (place >= offset[0]) & (place < offset[-1])
    # The first bag that ends behind the occurrence.
    bag = torch.searchsorted(offset[1:], place[real], right=True)
    rows, at = torch.unique(token[real], return_inverse=True)
    summed = torch.zeros(rows.shape[0], weight.shape[1], dtype=work, device=weight.device)
    summed.index_add_(0, at, factor[real][:, None] * grad[bag].to(work))
    update_rows_at_(
        weight,
        rows,
        hyper[SCALE].to(work) * summed,
        hyper,
        counter,
        torch.isfinite(grad).all() & torch.isfinite(factor).all(),
        momentum=momentum,
        second=second,
        kahan=kahan,
        row_step=row_step,
        row_decay=row_decay,
        decay_sum=decay_sum,
        row_offset=row_offset,
        decoupled=decoupled,
    )
