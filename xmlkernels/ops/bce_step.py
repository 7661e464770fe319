"""`bce_step_`: one training step of the full label table."""

from typing import Any

import torch
from torch import Tensor

from xmlkernels.ops.checks import (
    check_memory,
    check_no_gradient,
    check_positives,
    check_row_offset,
    check_states,
    check_steering,
    check_table,
    check_tensor,
    expect,
)
from xmlkernels.ops.define import define, mark_written, public
from xmlkernels.reference.bce_step import bce_step_ as reference


@public
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
    """Score all labels and train the table on the summed binary cross-entropy, tile by tile.

    With z = x Wᵀ + bias and G = scale (σ(z) - y): dx = dx_scale G W, from the rows as they were
    before the step, and each row is updated in place with its gradient Gᵀ x. Neither the `B x L`
    logits nor the `L x D` gradient is ever held. Not differentiable: pass dx to
    `embedding.backward(dx)`. Source: Renee (MLSys 2023), section 4; the tiles are ours.

    Args:
        weight: [n, D] label table, fp32, bf16, fp16, or e4m3 with `row_scale`; updated. Below fp32,
            stores round stochastically without bias; every store saturates at the format's largest
            finite value.
        x: [B, D] embeddings, fp32, bf16 or fp16. A non-finite value anywhere leaves every tensor as
            it was, and dx and loss become NaN. On bf16 and e4m3 tables the products take x rounded
            to bf16; on a GPU they take it rounded to fp16 on fp16 tables, and 256 (σ - y) in that
            format, so targets saturate at ±255 there.
        pos_row: int64 [P], table rows of the positives, ascending; rows from `rows` on are fill and
            are ignored.
        pos_sample: int32 [P], their samples; pairs sorted by (row, sample), unique.
        hyper: fp32 [7], see `Hyper`; on the table's device.
        counter: int64 [2]: seed and step (from 0), on the table's device. The random words depend
            on these, the global row and the column alone.
        pos_value: fp32 [P], target of each pair; 1 when not given.
        bias: fp32 [n], updated by plain SGD with the same lr, without decay.
        momentum: [n, D] fp32, bf16 or fp16, updated. Alone: SGD momentum (dampening 0). With
            `second`: Adam's first moment.
        second: [n, D], Adam's second moment, updated; needs `momentum`.
        kahan: [n, D] of the table's dtype (bf16 or fp16), updated: holds what rounding left over;
            stores then round to nearest. Not with e4m3: what it left over would need a wider table
            than bf16 itself.
        row_scale: fp32 [n, 2] for an e4m3 table (a value is row_scale[row, 0] times its code).
            Column 0: the row's scale, a power of two (2^-8 to begin with: range ±1.75), fixed
            within a step; stores saturate at 448 times it. Column 1, updated: the largest |value|
            that the row has stored; between steps `rescale_rows_` reads it.
        row_offset: global row of weight[0], for a table that is one shard of a larger one.
        rows: number of real rows; those beyond are padding, never scored or trained. -1: all.
        decoupled: decay shrinks the weights (w -= lr decay w) instead of entering the gradient
            (L2).
        need_loss: also return the loss.
        skip_below: above 0, groups of 128 rows that would hardly change are left out of dx and of
            the update; see Skipping.
        skipped: int64 [2]; groups skipped and groups seen are added to it, on the device. With
            `skip_below` alone.

    Skipping: rows 128 i to 128 i + 127 of this table are skipped when no positive lies among them
        and

        lr |scale| max(σ of the group's rows, over the batch) max_d(sum_b |x_bd|) < skip_below

    (with a bias, x has a column of ones beside it). Their part of G is then taken as 0 in dx and in
    the update: two of three products are saved. Decay, momentum and Adam's moments go on with a
    gradient of 0; where there is neither decay nor a state, the rows are not stored again. The loss
    stays exact. Of rows without positives, each gradient pushes the logits down, so what is left
    out is a bias, not noise. Its bounds: a step of SGD changes each weight (and bias) by less than
    skip_below less or more than without skipping; with momentum what a step leaves out counts up to
    1 / (1 - momentum) times as much in the end; Adam divides by its root, so there lr times the
    gradient is bounded, not the step. dx loses less than dx_scale skip_below / (lr max_d(sum_b
    |x_bd|)) times the sum of |w_ld| over the skipped rows l, in each column d. A row that drifts
    upwards for want of gradients passes the bound and is trained again. Sigma and x are taken as
    the products see them, so a group within rounding of the bound may be decided either way. A
    shard whose row_offset is a multiple of 128 skips what the whole table would.

    Returns:
        dx: fp32 [B, D].
        loss: fp32 [1], scale times the sum over samples and labels of softplus(z) - y z; [0] when
            not asked.

    Raises:
        InputError: an argument's type, dtype, shape, device or layout does not fit, a tensor that
            is updated shares memory with another, or, on the CPU, positives are not sorted or hyper
            is not finite.
    """
    positives = (pos_row, pos_sample)
    options: dict[str, Any] = {"pos_value": pos_value, "bias": bias, "row_scale": row_scale}
    options |= {"momentum": momentum, "second": second, "kahan": kahan}
    options |= {"row_offset": row_offset, "rows": rows, "decoupled": decoupled}
    options |= {"need_loss": need_loss, "skip_below": skip_below, "skipped": skipped}
    _check(weight, x, *positives, hyper, counter, **options)
    mark_written(weight, bias, momentum, second, kahan, row_scale, skipped)
    op = torch.ops.xmlkernels.bce_step_
    out: tuple[Tensor, Tensor] = op(weight, x.detach(), *positives, hyper, counter, **options)
    return out


def _check(
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
    skip_below: float = 0.0,
    skipped: Tensor | None = None,
    **_: object,
) -> None:
    op = "bce_step_"
    check_table(op, x, weight, bias, rows, row_scale, scaled=True)
    check_positives(op, x, pos_row, pos_sample, pos_value, weight.shape[0] if rows < 0 else rows)
    check_steering(op, hyper, counter, weight.device)
    check_states(op, weight, momentum, second, kahan, row_wise=False)
    check_row_offset(op, row_offset, weight.shape[0])
    check_no_gradient(op, weight)
    expect(
        0 <= skip_below < float("inf"),
        f"{op}: argument skip_below",
        "a finite number from 0 (skips nothing)",
        str(skip_below),
        "pass the change of a weight that may be left out, a fraction of the table's unit",
    )
    if skipped is not None:
        check_tensor(op, "skipped", skipped, (torch.int64,), (2,), weight.device)
        expect(
            skip_below > 0,
            f"{op}: argument skipped",
            "skip_below above 0 beside it",
            str(skip_below),
            "leave it out: without skip_below nothing is skipped",
        )
    written = {"weight": weight, "bias": bias, "row_scale": row_scale, "skipped": skipped}
    written |= {"momentum": momentum, "second": second, "kahan": kahan}
    read = {"x": x, "pos_row": pos_row, "pos_sample": pos_sample, "pos_value": pos_value}
    read |= {"hyper": hyper, "counter": counter}
    check_memory(op, written, read)


def _fake(
    weight: Tensor,
    x: Tensor,
    pos_row: Tensor,
    pos_sample: Tensor,
    hyper: Tensor,
    counter: Tensor,
    *,
    need_loss: bool = False,
    **_: object,
) -> tuple[Tensor, Tensor]:
    loss = x.new_empty(int(need_loss), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float32), loss


define(
    reference,
    _fake,
    _check,
    writes=("weight", "bias", "momentum", "second", "kahan", "row_scale", "skipped"),
    cuda="xmlkernels.triton.bce_step",
)
