"""`bag_step_`: the backward of an embedding bag and the update of its touched rows in one."""

from typing import Any

import torch
from torch import Tensor

from xmlkernels.ops.checks import (
    STATE_DTYPES,
    check_table_shape,
    check_tensor,
    check_updated_table,
    expect,
)
from xmlkernels.ops.define import define, mark_written, public
from xmlkernels.reference.bag_step import bag_step_ as reference


@public
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
    """Take the gradient of summed bags to the rows in them and update each such row once.

    Bag b is the sum over j from offset[b] to offset[b + 1] of token_weight[j] weight[token[j]] (a
    mean: weights of 1 / length). A row's gradient is the sum of token_weight[j] grad[bag of j] over
    its occurrences j, in ascending order and in fp32; neither `n x D` nor `T x D` values are ever
    held. Then the row takes one step: SGD; SGD with momentum where `momentum` is given; Adagrad
    with `second` alone; Adam with both. Other rows and their states are untouched.

    Args:
        weight: [n, D] fp32, bf16 or fp16, updated; rounding and saturation as in `sparse_update`.
        grad: [B, D] fp32, bf16 or fp16, gradient of the bags. A non-finite value in grad or
            token_weight, anywhere, leaves every tensor as it was.
        token: int64 [T], row of each occurrence; -1 is fill and is ignored.
        offset: int64 [B + 1], ascending, from 0 to at most T: bag b is token[offset[b]:offset[b +
            1]]. Occurrences that lie in no bag are ignored.
        hyper, counter: as in `sparse_update`.
        token_weight: fp32 [T]; 1 when not given.
        momentum: [n, D] fp32, bf16 or fp16, updated.
        second: [n, D], or [n] for one value per row, fp32, bf16 or fp16, updated.
        kahan, row_step, row_decay, decay_sum, row_offset, decoupled: as in `sparse_update`;
            row_step needs Adam.

    Raises:
        InputError: an argument's type, dtype, shape, device or layout does not fit, a tensor that
            is updated shares memory with another, or, on the CPU, tokens or offsets lie outside or
            hyper is not finite.
    """
    options: dict[str, Any] = {"token_weight": token_weight}
    options |= {"momentum": momentum, "second": second, "kahan": kahan, "row_step": row_step}
    options |= {"row_decay": row_decay, "decay_sum": decay_sum}
    options |= {"row_offset": row_offset, "decoupled": decoupled}
    _check(weight, grad, token, offset, hyper, counter, **options)
    mark_written(weight, momentum, second, kahan, row_step, row_decay)
    op = torch.ops.xmlkernels.bag_step_
    op(weight, grad.detach(), token, offset, hyper, counter, **options)


def _check(
    weight: Tensor,
    grad: Tensor,
    token: Tensor,
    offset: Tensor,
    hyper: Tensor,
    counter: Tensor,
    *,
    token_weight: Tensor | None = None,
    **given: Any,
) -> None:
    op = "bag_step_"
    check_table_shape(op, "weight", weight)
    check_tensor(op, "grad", grad, STATE_DTYPES, (None, weight.shape[1]), weight.device)
    check_tensor(op, "token", token, (torch.int64,), (None,), weight.device)
    check_tensor(op, "offset", offset, (torch.int64,), (grad.shape[0] + 1,), weight.device)
    if token_weight is not None:
        shape = (token.shape[0],)
        check_tensor(op, "token_weight", token_weight, (torch.float32,), shape, weight.device)
    _check_bags(op, token, offset, weight.shape[0])
    rest = {"grad": grad, "token": token, "offset": offset, "token_weight": token_weight}
    check_updated_table(op, "weight", weight, hyper, counter, **given, rest=rest)


def _check_bags(op: str, token: Tensor, offset: Tensor, n: int) -> None:
    if token.device.type != "cpu":
        return
    low, high = int(offset[0]), int(offset[-1])
    ascending = bool((offset[1:] >= offset[:-1]).all())
    expect(
        low >= 0 and high <= token.shape[0] and ascending,
        f"{op}: argument offset",
        f"ascending numbers from 0 to at most {token.shape[0]}, the occurrences",
        f"{low} to {high}" + ("" if ascending else ", not ascending"),
        "let bag b begin at offset[b] and end at offset[b + 1]",
    )
    if token.numel():
        low, high = (int(v) for v in torch.aminmax(token))
        expect(
            low >= -1 and high < n,
            f"{op}: argument token",
            f"rows from 0 to {n - 1}, or -1 as fill",
            f"{low} to {high}",
            "number tokens within weight",
        )


def _fake(*_: object, **__: object) -> None:
    return None


define(
    reference,
    _fake,
    _check,
    writes=("weight", "momentum", "second", "kahan", "row_step", "row_decay"),
)
