"""`bce_loss`: binary cross-entropy over all labels, differentiable, without the logits matrix."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, library

from xmlkernels.ops.checks import check_positives, check_table, expect
from xmlkernels.ops.define import define, public
from xmlkernels.reference.bce_loss import bce_loss as reference
from xmlkernels.reference.bce_loss import bce_loss_backward as backward_reference


@public
def bce_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_row: Tensor,
    pos_sample: Tensor,
    pos_value: Tensor | None = None,
    *,
    row_scale: Tensor | None = None,
    rows: int = -1,
) -> Tensor:
    """Return the binary cross-entropy, summed over samples and all labels.

    It works in the tiles of `bce_step_`: the `B x L` logits are never held.
    For validation loss, frozen tables and optimizers of one's own. Differentiable in x, weight and
    bias; the dense weight gradient is formed only when weight requires it. The backward scores the
    tiles once more.

    Args:
        x: [B, D] fp32, bf16 or fp16. A non-finite value makes the loss NaN.
        weight: [n, D] label table, fp32, bf16, fp16, or e4m3 with `row_scale` (that one without a
            gradient).
        bias: fp32 [n] or None.
        pos_row, pos_sample, pos_value, row_scale, rows: as in `bce_step_`.

    Returns:
        fp32 [1]: the sum of softplus(z) - y z with z = x Wᵀ + bias.

    Raises:
        InputError: an argument's type, dtype, shape, device or layout does not fit, or, on the CPU,
            positives are not sorted.
    """
    _check(x, weight, bias, pos_row, pos_sample, pos_value, row_scale, rows=rows)
    expect(
        row_scale is None or not weight.requires_grad,
        "bce_loss: argument weight",
        "no gradient asked of an 8-bit table",
        "a tensor that requires one",
        "freeze it: 8 bits hold no gradient; bce_step_ trains such tables",
    )
    op = torch.ops.xmlkernels.bce_loss
    loss: Tensor = op(x, weight, bias, pos_row, pos_sample, pos_value, row_scale, rows=rows)
    return loss


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_row: Tensor,
    pos_sample: Tensor,
    pos_value: Tensor | None = None,
    row_scale: Tensor | None = None,
    *,
    rows: int = -1,
    op: str = "bce_loss",
    **_: object,
) -> None:
    check_table(op, x, weight, bias, rows, row_scale, scaled=True)
    check_positives(op, x, pos_row, pos_sample, pos_value, weight.shape[0] if rows < 0 else rows)


def _fake(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(1, dtype=torch.float32)


def _backward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_row: Tensor,
    pos_sample: Tensor,
    pos_value: Tensor | None = None,
    row_scale: Tensor | None = None,
    *,
    need_dweight: bool = False,
    need_dbias: bool = False,
    **_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape if need_dweight else (0,), dtype=torch.float32)
    dbias = weight.new_empty(weight.shape[0] if need_dbias else 0, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float32), dweight, dbias


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.rows = keyword_only_inputs["rows"]


def _backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *_ = ctx.saved_tensors
    _, need_dweight, need_dbias, *_ = ctx.needs_input_grad
    wanted = {"need_dweight": need_dweight, "need_dbias": need_dbias}
    op = torch.ops.xmlkernels.bce_loss_backward
    dx, dweight, dbias = op(*ctx.saved_tensors, rows=ctx.rows, **wanted)
    return (
        (dx * dloss).to(x.dtype),
        (dweight * dloss).to(weight.dtype) if need_dweight else None,
        dbias * dloss if need_dbias else None,
        *[None] * 4,
    )


# row_scale is not keyword-only: torch's autograd registration takes no tensors that are.
define(reference, _fake, _check, cuda="xmlkernels.triton.bce_loss")
define(
    backward_reference,
    _backward_fake,
    partial(_check, op="bce_loss_backward"),
    cuda="xmlkernels.triton.bce_loss",
)
library.register_autograd("xmlkernels::bce_loss", _backward, setup_context=_setup_context)
