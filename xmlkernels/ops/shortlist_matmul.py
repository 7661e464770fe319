"""`shortlist_matmul`: logits of some labels for each sample, differentiable, no gathered rows."""

from typing import Any

import torch
from torch import Tensor, library

from xmlkernels.ops.checks import check_table, check_tensor, expect
from xmlkernels.ops.define import define, public
from xmlkernels.reference.shortlist_matmul import shortlist_backward as backward_reference
from xmlkernels.reference.shortlist_matmul import shortlist_matmul as reference


@public
def shortlist_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, row_scale: Tensor | None = None
) -> Tensor:
    """Score a shortlist of table rows for each sample.

    z[b, s] = x[b] · W[index[b, s]] + bias[index[b, s]].
    Each gathered row is read once and never stored: no `B x S x D` copy. Differentiable in x,
    weight and bias; the table's gradient is a coalesced sparse COO tensor that holds each row named
    by the shortlists once, as `torch.optim.SparseAdam` takes it. (Where `.backward()` stores it in
    `.grad`, torch drops the mark of being coalesced, but not the order; `torch.autograd.grad` keeps
    both.)

    The backward is an op of its own, for the row-sparse optimizers: `shortlist_backward`.

    Source: the shortlisted heads of XR-Transformer and CascadeXML (NeurIPS 2021, 2022); the kernel
    is ours.

    Args:
        x: [B, D] fp32, bf16 or fp16. On bf16 and e4m3 tables a product may take x, and in the
            backward the gradient of the logits, rounded to bf16; sums are fp32.
        weight: [n, D] label table, fp32, bf16, fp16, or e4m3 with `row_scale` (that one without a
            gradient).
        bias: fp32 [n] or None.
        index: int64 [B, S] table rows of each sample, or [S], one shortlist for the whole batch. -1
            pads. A row may be in a shortlist more than once.
        row_scale: fp32 [n, 2] for an e4m3 table, as in `bce_step_`.

    Returns:
        fp32 [B, S] logits; -inf at pads. Mask the pads before a loss: the backward ignores the
        gradient that they get, but -inf itself makes most losses infinite or NaN.

    Raises:
        InputError: an argument's type, dtype, shape, device or layout does not fit, or, on the CPU,
            an entry of index lies outside the table (elsewhere the collator's word is taken).
    """
    _check(x, weight, bias, index, row_scale)
    expect(
        row_scale is None or not weight.requires_grad,
        "shortlist_matmul: argument weight",
        "no gradient asked of an 8-bit table",
        "a tensor that requires one",
        "freeze it: 8 bits hold no gradient; cluster_step_ trains such tables",
    )
    logits: Tensor = torch.ops.xmlkernels.shortlist_matmul(x, weight, bias, index, row_scale)
    return logits


@public
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
    """Return the gradients of `shortlist_matmul`, in the form that row-sparse optimizers take.

    Not differentiable.

    Args:
        dlogits: fp32 [B, S], gradient of the logits; what it holds at pads is ignored, NaN
            included.
        x, weight, index, row_scale: as in `shortlist_matmul`.
        need_dx, need_dweight, need_dbias: which results are asked for.

    Returns:
        dx: fp32 [B, D]; [0] when not asked for.
        rows: int64 [U], the table rows that a sample names, each once, ascending; [0] when neither
            of the next is asked for.
        grad: fp32 [U, D], gradient of those rows; [0, D] when not asked for.
        dbias: fp32 [U], gradient of their bias; [0] when not asked for.

    Raises:
        InputError: as in `shortlist_matmul`.
    """
    _check_backward(dlogits, x, weight, index, row_scale)
    given = dlogits.detach(), x.detach(), weight.detach(), index, row_scale
    wanted = {"need_dx": need_dx, "need_dweight": need_dweight, "need_dbias": need_dbias}
    op = torch.ops.xmlkernels.shortlist_backward
    out: tuple[Tensor, Tensor, Tensor, Tensor] = op(*given, **wanted)
    return out


def _check_backward(
    dlogits: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    row_scale: Tensor | None = None,
    **_: object,
) -> None:
    op = "shortlist_backward"
    _check(x, weight, None, index, row_scale, op=op)
    shape = (x.shape[0], index.shape[-1])
    check_tensor(op, "dlogits", dlogits, (torch.float32,), shape, weight.device)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    row_scale: Tensor | None = None,
    *,
    op: str = "shortlist_matmul",
) -> None:
    check_table(op, x, weight, bias, -1, row_scale, scaled=True)
    sizes = (index.shape[0],) if index.dim() == 1 else (x.shape[0], None)
    check_tensor(op, "index", index, (torch.int64,), sizes, weight.device)
    if index.device.type == "cpu" and index.numel() > 0:
        low, high = (int(v) for v in torch.aminmax(index))
        expect(
            low >= -1 and high < weight.shape[0],
            f"{op}: argument index",
            f"rows from 0 to {weight.shape[0] - 1}, or -1 for a pad",
            f"entries from {low} to {high}",
            "number the rows within weight and pad with -1",
        )


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, row_scale: Tensor | None = None
) -> Tensor:
    return x.new_empty((x.shape[0], index.shape[-1]), dtype=torch.float32)


def _backward_fake(
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
    unique = library.get_ctx().new_dynamic_size() if need_dweight or need_dbias else 0
    return (
        x.new_empty(x.shape if need_dx else (0,), dtype=torch.float32),
        index.new_empty(unique),
        x.new_empty((unique if need_dweight else 0, x.shape[1]), dtype=torch.float32),
        x.new_empty(unique if need_dbias else 0, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, index, row_scale = inputs
    ctx.save_for_backward(x, weight, index, row_scale)
    ctx.bias_shape = None if bias is None else bias.shape


def _backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, index, row_scale = ctx.saved_tensors
    need_dx, need_dweight, need_dbias, *_ = ctx.needs_input_grad
    wanted = {"need_dx": need_dx, "need_dweight": need_dweight, "need_dbias": need_dbias}
    op = torch.ops.xmlkernels.shortlist_backward
    dx, rows, grad, dbias = op(dlogits.contiguous(), x, weight, index, row_scale, **wanted)

    def sparse(values: Tensor, like: Tensor, shape: torch.Size) -> Tensor:
        # The op's rows are unique and within the table: to check them again would read them all, or
        # wait for the device.
        return torch.sparse_coo_tensor(
            rows[None], values.to(like.dtype), shape, is_coalesced=True, check_invariants=False
        )

    return (
        dx.to(x.dtype) if need_dx else None,
        sparse(grad, weight, weight.shape) if need_dweight else None,
        sparse(dbias, dbias, ctx.bias_shape) if need_dbias else None,
        None,
        None,
    )


define(reference, _fake, _check, cuda="xmlkernels.triton.shortlist_matmul")
define(
    backward_reference,
    _backward_fake,
    _check_backward,
    cuda="xmlkernels.triton.shortlist_matmul",
)
library.register_autograd("xmlkernels::shortlist_matmul", _backward, setup_context=_setup_context)
