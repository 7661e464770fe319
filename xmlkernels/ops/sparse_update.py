"""`sparse_sgd_`, `sparse_adagrad_`, `sparse_adam_`: a step of an optimizer on touched rows alone.

Common to the three:

    param: [n, D] fp32, bf16 or fp16; updated. Below fp32, stores round stochastically without bias;
        every store saturates at the format's largest finite value. A row that is not in `rows`, and
        its state, is neither read nor written.
    rows: int64 [N], unique, ascending. Entries of n or more are fill, at the end, and are ignored
        with their gradient.
    grad: [N, D] fp32, bf16 or fp16. A non-finite value in a real row leaves every tensor as it was.
    hyper: fp32 [7], see `Hyper`; on the table's device. scale multiplies grad, before everything
        else; dx_scale is not used. epsilon is to be above 0 for Adagrad and Adam: with 0, a
        gradient of 0 on a second moment of 0 gives NaN, as in torch.
    counter: int64 [2]: seed and step (from 0), on the table's device. The random words depend on
        these, the global row and the column alone.
    kahan: [n, D] of param's dtype (below fp32), updated: holds what rounding left over; stores then
        round to nearest.
    row_decay, decay_sum: fp32 [n] (updated) and fp32 [1], together, with decoupled=True: the exact
        decay applied late. decay_sum is the sum of log1p(-lr decay) over all steps up to and
        including this one, kept by the caller; a row is multiplied by exp(decay_sum -
        row_decay[row]) in place of 1 - lr decay, and row_decay[row] becomes decay_sum.
    row_offset: global row of param[0], for a table that is one shard of a larger one.
    decoupled: decay shrinks the weights (w *= 1 - lr decay) instead of entering the gradient (g +=
        decay w).

Each raises InputError where an argument's type, dtype, shape, device or layout does not fit, a
tensor that is updated shares memory with another, or, on the CPU, rows are not ascending or hyper
is not finite.
"""

from typing import Any

import torch
from torch import Tensor

from xmlkernels.errors import InputError
from xmlkernels.ops.checks import (
    STATE_DTYPES,
    check_table_shape,
    check_tensor,
    check_updated_table,
    expect,
)
from xmlkernels.ops.define import define, mark_written, public
from xmlkernels.reference import sparse_update as reference


@public
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
    """Take a step of SGD on N rows of a table.

    m = beta1 m + g, w -= lr m; without `momentum`, w -= lr g.

    Args:
        param, rows, grad, hyper, counter, kahan, row_decay, decay_sum, row_offset, decoupled: see
            the top of this module.
        momentum: [n, D] fp32, bf16 or fp16, updated (dampening 0, no Nesterov), or None for plain
            SGD.

    Raises:
        InputError: see the top of this module.
    """
    options: dict[str, Any] = {"kahan": kahan, "row_decay": row_decay, "decay_sum": decay_sum}
    options |= {"row_offset": row_offset, "decoupled": decoupled}
    _check_sgd(param, momentum, rows, grad, hyper, counter, **options)
    mark_written(param, momentum, kahan, row_decay)
    op = torch.ops.xmlkernels.sparse_sgd_
    op(param, momentum, rows, grad.detach(), hyper, counter, **options)


@public
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
    """Take a step of Adagrad (Duchi, Hazan, Singer, JMLR 2011) on N rows of a table.

    v += g², w -= lr g / (sqrt(v) + epsilon).

    Args:
        param, rows, grad, hyper, counter, kahan, row_decay, decay_sum, row_offset, decoupled: see
            the top of this module.
        second: v, fp32, bf16 or fp16, updated: [n, D], or [n] for one value per row, fed by the
            mean of g² over the row.

    Raises:
        InputError: see the top of this module.
    """
    options: dict[str, Any] = {"kahan": kahan, "row_decay": row_decay, "decay_sum": decay_sum}
    options |= {"row_offset": row_offset, "decoupled": decoupled}
    _check_adagrad(param, second, rows, grad, hyper, counter, **options)
    mark_written(param, second, kahan, row_decay)
    op = torch.ops.xmlkernels.sparse_adagrad_
    op(param, second, rows, grad.detach(), hyper, counter, **options)


@public
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
    """Take a step of "lazy" Adam on N rows of a table; the moments of other rows are left alone.

    m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g²,
    w -= lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon),
    where t is counter's step + 1, or the row's own count with `row_step` (Kingma, Ba, ICLR 2015).

    Args:
        param, rows, grad, hyper, counter, kahan, row_decay, decay_sum, row_offset, decoupled: see
            the top of this module.
        momentum: m [n, D] fp32, bf16 or fp16, updated.
        second: v, fp32, bf16 or fp16, updated: [n, D], or [n] for one value per row, fed by the
            mean of g² over the row.
        row_step: int64 [n], each row's number of updates so far; raised by 1 here, and then the
            row's t.

    Raises:
        InputError: see the top of this module.
    """
    options: dict[str, Any] = {"kahan": kahan, "row_decay": row_decay, "decay_sum": decay_sum}
    options |= {"row_offset": row_offset, "decoupled": decoupled}
    options["row_step"] = row_step
    _check_adam(param, momentum, second, rows, grad, hyper, counter, **options)
    mark_written(param, momentum, second, kahan, row_step, row_decay)
    op = torch.ops.xmlkernels.sparse_adam_
    op(param, momentum, second, rows, grad.detach(), hyper, counter, **options)


def _check(
    op: str, param: Tensor, rows: Tensor, grad: Tensor, hyper: Tensor, counter: Tensor, **given: Any
) -> None:
    check_table_shape(op, "param", param)
    _check_touched_rows(op, rows, grad, param)
    check_updated_table(
        op, "param", param, hyper, counter, **given, rest={"rows": rows, "grad": grad}
    )


def _check_touched_rows(op: str, rows: Tensor, grad: Tensor, param: Tensor) -> None:
    """Check rows [N] and grad [N, D]: real rows ascending and unique, fill at the end."""
    check_tensor(op, "rows", rows, (torch.int64,), (None,), param.device)
    check_tensor(op, "grad", grad, STATE_DTYPES, (rows.shape[0], param.shape[1]), param.device)
    if param.device.type != "cpu" or rows.numel() == 0:
        return
    expect(
        int(rows[0]) >= 0,
        f"{op}: argument rows",
        f"rows from 0 to {param.shape[0] - 1}, and {param.shape[0]} or more as fill",
        f"{int(rows[0])} at 0",
        "number rows within param",
    )
    later = (rows[1:] > rows[:-1]) | ((rows[1:] == rows[:-1]) & (rows[1:] >= param.shape[0]))
    if not bool(later.all()):
        at = int((~later).nonzero()[0]) + 1
        raise InputError(
            f"{op}: argument rows",
            "unique rows in ascending order",
            f"{int(rows[at])} after {int(rows[at - 1])} at {at}",
            "sort them and add up the gradients of equal rows (a coalesced sparse gradient has "
            "both done)",
        )


def _check_sgd(param: Tensor, momentum: Tensor | None, *rest: Tensor, **given: Any) -> None:
    _check("sparse_sgd_", param, *rest, momentum=momentum, **given)


def _check_adagrad(param: Tensor, second: Tensor, *rest: Tensor, **given: Any) -> None:
    _check("sparse_adagrad_", param, *rest, second=second, **given)


def _check_adam(
    param: Tensor, momentum: Tensor, second: Tensor, *rest: Tensor, **given: Any
) -> None:
    _check("sparse_adam_", param, *rest, momentum=momentum, second=second, **given)


def _fake(*_: object, **__: object) -> None:
    return None


define(
    reference.sparse_sgd_,
    _fake,
    _check_sgd,
    writes=("param", "momentum", "kahan", "row_decay"),
)
define(
    reference.sparse_adagrad_,
    _fake,
    _check_adagrad,
    writes=("param", "second", "kahan", "row_decay"),
)
define(
    reference.sparse_adam_,
    _fake,
    _check_adam,
    writes=("param", "momentum", "second", "kahan", "row_step", "row_decay"),
)
