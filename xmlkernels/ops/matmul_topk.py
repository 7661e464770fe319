"""`matmul_topk`: the best labels of each sample, exactly, without the score matrix."""

from typing import Any

import torch
from torch import Tensor

from xmlkernels.ops.checks import check_row_offset, check_table, check_tensor, expect
from xmlkernels.ops.define import define, public
from xmlkernels.reference.matmul_topk import matmul_topk as reference

LARGEST_K = 65_536


@public
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
    """Return the exact top-k of x Wᵀ + bias over all labels; `B x L` is never held.

    Args:
        x: [B, D] fp32, bf16 or fp16. On bf16 and e4m3 tables the product takes x rounded to bf16.
        weight: [n, D] label table, fp32, bf16, fp16, or e4m3 with `row_scale`.
        bias: fp32 [n] or None.
        k: results per sample, 1 or more; may exceed the number of rows, up to 65,536.
        exclude: int64 [B, E], global rows never returned for that sample; -1 pads.
        row_scale: fp32 [n, 2] for an e4m3 table, as in `bce_step_`.
        row_offset: global row of weight[0].
        rows: number of real rows; those beyond are padding, never returned. -1: all.

    Returns:
        values: fp32 [B, k], descending.
        rows: int64 [B, k], global rows (row_offset added); equal scores come in ascending order of
            row. Places that no row can fill hold -inf and -1; a NaN score is never returned.

    Raises:
        InputError: an argument's type, dtype, shape, device or layout does not fit.
    """
    options: dict[str, Any] = {"exclude": exclude, "row_scale": row_scale}
    options |= {"row_offset": row_offset, "rows": rows}
    _check(x, weight, bias, k, **options)
    out: tuple[Tensor, Tensor] = torch.ops.xmlkernels.matmul_topk(x, weight, bias, k, **options)
    return out


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    exclude: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_offset: int = 0,
    rows: int = -1,
) -> None:
    op = "matmul_topk"
    check_table(op, x, weight, bias, rows, row_scale, scaled=True)
    expect(k >= 1, f"{op}: argument k", "1 or more", str(k), "ask for at least one label")
    most = max(weight.shape[0], LARGEST_K)
    mend = "ask for no more labels than there are"
    expect(k <= most, f"{op}: argument k", f"at most {most}", str(k), mend)
    check_row_offset(op, row_offset, weight.shape[0])
    if exclude is not None:
        check_tensor(op, "exclude", exclude, (torch.int64,), (x.shape[0], None), x.device)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, **_: object
) -> tuple[Tensor, Tensor]:
    values = x.new_empty((x.shape[0], k), dtype=torch.float32)
    return values, x.new_empty((x.shape[0], k), dtype=torch.int64)


define(reference, _fake, _check, cuda="xmlkernels.triton.matmul_topk")
