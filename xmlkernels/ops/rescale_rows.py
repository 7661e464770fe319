"""`rescale_rows_`: larger scales for rows of an 8-bit table that outgrow theirs, between steps."""

import torch
from torch import Tensor

from xmlkernels.ops.checks import (
    E4M3,
    check_memory,
    check_row_offset,
    check_row_scale,
    check_tensor,
    expect,
)
from xmlkernels.ops.define import define, mark_written, public
from xmlkernels.reference.rescale_rows import rescale_rows_ as reference


@public
def rescale_rows_(
    weight: Tensor, row_scale: Tensor, counter: Tensor, row_offset: int = 0
) -> Tensor:
    """Double the scale of each row that fills half its range, and code that row anew.

    A row with scale s holds values up to 448 s. Where row_scale[row, 1] > 224 s, s doubles as often
    as needed (at most to 2^100), the row is rounded stochastically to the coarser grid (random
    stream 3), so without bias, and column 1 becomes the true maximum of the new row. Other rows are
    not touched: of them the kernel reads row_scale alone, so a call after every step costs little.
    Half the range is left when a row is noticed, so a call now and then may do. Not differentiable.

    Args:
        weight: e4m3 [n, D] table, updated.
        row_scale: fp32 [n, 2], as in `bce_step_`; updated.
        counter: int64 [2]: seed and step; the random words depend on these, the global row and the
            column alone.
        row_offset: global row of weight[0].

    Returns:
        int64 [1]: how many rows were coded anew.

    Raises:
        InputError: an argument's type, dtype, shape, device or layout does not fit.
    """
    _check(weight, row_scale, counter, row_offset)
    mark_written(weight, row_scale)
    op = torch.ops.xmlkernels.rescale_rows_
    changed: Tensor = op(weight, row_scale, counter, row_offset)
    return changed


def _check(weight: Tensor, row_scale: Tensor, counter: Tensor, row_offset: int = 0) -> None:
    op = "rescale_rows_"
    check_tensor(op, "weight", weight, (E4M3,), (None, None), weight.device)
    expect(
        weight.shape[1] >= 1,
        f"{op}: argument weight",
        "a table with at least one column",
        "none",
        "give it a width",
    )
    check_row_scale(op, weight, row_scale)
    check_tensor(op, "counter", counter, (torch.int64,), (2,), weight.device)
    check_row_offset(op, row_offset, weight.shape[0])
    expect(
        not weight.requires_grad,
        f"{op}: argument weight",
        "a tensor that requires no gradient",
        "one that does",
        "keep the table out of autograd (a buffer, not an nn.Parameter)",
    )
    check_memory(op, {"weight": weight, "row_scale": row_scale}, {"counter": counter})


def _fake(weight: Tensor, *_: object) -> Tensor:
    return weight.new_empty(1, dtype=torch.int64)


define(
    reference,
    _fake,
    _check,
    writes=("weight", "row_scale"),
    cuda="xmlkernels.triton.rescale_rows",
)
