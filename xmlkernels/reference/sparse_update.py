"""Reference of the sparse updates: the touched rows gathered, updated, put back."""

from typing import Any

import torch
from torch import Tensor

from xmlkernels.reference.hyper import SCALE
from xmlkernels.reference.update import update_rows_at_


def _step(
    param: Tensor, rows: Tensor, grad: Tensor, hyper: Tensor, counter: Tensor, **given: Any
) -> None:
    work = torch.promote_types(param.dtype, torch.float32)
    real = rows < param.shape[0]  # a graph of fixed capacity is filled with rows beyond the last
    scaled = hyper[SCALE].to(work) * torch.where(real[:, None], grad, 0).to(work)
    finite = torch.isfinite(torch.where(real[:, None], grad, 0)).all()
    update_rows_at_(param, rows, scaled, hyper, counter, finite, **given)


def sparse_sgd_(
    param: Tensor,
    momentum: Tensor | None,
    rows: Tensor,
    grad: Tensor,
    hyper: Tensor,
    counter: Tensor,
    *,
    kahan: Tensor | None = None,
    row_decay: Tensor | None = None,
    decay_sum: Tensor | None = None,
    row_offset: int = 0,
    decoupled: bool = False,
) -> None:
    """See `xmlkernels.ops.sparse_sgd_`."""
    decay = {"row_decay": row_decay, "decay_sum": decay_sum, "decoupled": decoupled}
    _step(
        param,
        rows,
        grad,
        hyper,
        counter,
        momentum=momentum,
        kahan=kahan,
        row_offset=row_offset,
        **decay,
    )


def sparse_adagrad_(
    param: Tensor,
    second: Tensor,
    rows: Tensor,
    grad: Tensor,
    hyper: Tensor,
    counter: Tensor,
    *,
    kahan: Tensor | None = None,
    row_decay: Tensor | None = None,
    decay_sum: Tensor | None = None,
    row_offset: int = 0,
    decoupled: bool = False,
) -> None:
    """See `xmlkernels.ops.sparse_adagrad_`."""
    decay = {"row_decay": row_decay, "decay_sum": decay_sum, "decoupled": decoupled}
    _step(
        param,
        rows,
        grad,
        hyper,
        counter,
        second=second,
        kahan=kahan,
        row_offset=row_offset,
        **decay,
    )


def sparse_adam_(
    param: Tensor,
    momentum: Tensor,
    second: Tensor,
    rows: Tensor,
    grad: Tensor,
    hyper: Tensor,
    counter: Tensor,
    *,
    kahan: Tensor | None = None,
    row_step: Tensor | None = None,
    row_decay: Tensor | None = None,
    decay_sum: Tensor | None = None,
    row_offset: int = 0,
    decoupled: bool = False,
) -> None:
    """See `xmlkernels.ops.sparse_adam_`."""
    states = {"momentum": momentum, "second": second, "kahan": kahan, "row_step": row_step}
    decay = {"row_decay": row_decay, "decay_sum": decay_sum, "decoupled": decoupled}
    _step(param, rows, grad, hyper, counter, row_offset=row_offset, **states, **decay)
