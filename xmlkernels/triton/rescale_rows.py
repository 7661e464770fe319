"""`rescale_rows_` on the GPU: reads all scales, and of the table only rows that outgrow theirs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton import common

ROWS, COLUMNS = 32, 64  # of a tile
HALF = tl.constexpr(224.0)  # of the largest value of e4m3
LARGEST = tl.constexpr(127 + 100)  # the exponent of the largest scale, as fp32 stores it


@triton.jit
def _grown(scale, largest):
    """Double scales [R] until largest <= 224 scale, at most to 2^100; not where largest is NaN."""
    bits = tl.div_rn(largest, tl.full(largest.shape, HALF, tl.float32)).to(tl.int32, bitcast=True)
    # The least power of two at or above the quotient, by its exponent. Rounding hides no excess:
    # between two neighbouring numbers above 224 2^i lies less than a unit of the quotient, but more
    # than half of one.
    exponent = tl.minimum((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32), LARGEST)
    least = (exponent << 23).to(tl.float32, bitcast=True)
    return tl.where(largest > scale * HALF, tl.maximum(least, scale), scale)


@triton.jit
def _rescale(
    weight, row_scale, counter, changed, rows, D, row_offset, BR: tl.constexpr, BD: tl.constexpr
):
    """Rescale BR rows of weight uint8 [rows, D] (bits of e4m3) and row_scale fp32 [rows, 2].

    Adds their number to changed, int64 [1].
    """
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    scale_at = row_scale + 2 * row
    old = tl.load(scale_at, mask=row < rows, other=1.0)
    new = _grown(old, tl.load(scale_at + 1, mask=row < rows, other=0.0))
    change = (new != old) & (row < rows)
    count = tl.sum(change.to(tl.int64), 0)
    if count > 0:
        seed, step = tl.load(counter), tl.load(counter + 1)
        # Powers of two: the inverse and every product are exact. Not old / new at once, which may
        # be too small for fp32.
        inverse = tl.div_rn(tl.full((BR,), 1.0, tl.float32), new)[:, None]
        top = tl.zeros((BR,), dtype=tl.float32)
        for start in range(0, D, BD):
            column = start + tl.arange(0, BD)
            at = weight + row[:, None] * D + column[None, :]
            mask = change[:, None] & (column < D)[None, :]
            value = common.decode_e4m3(tl.load(at, mask=mask, other=0), False) * old[:, None]
            code, _ = common.encode_e4m3(
                value * inverse,
                common.random32(seed, step, row + row_offset, start, BD, common.RESCALE),
            )
            tl.store(at, code, mask=mask)
            top = tl.maximum(
                top, tl.max(tl.where(mask, tl.abs(common.decode_e4m3(code, False)), 0.0), 1)
            )
        tl.store(scale_at, new, mask=change)
        tl.store(scale_at + 1, top * new, mask=change)
        tl.atomic_add(changed, count, sem="relaxed")


def rescale_rows_(
    weight: Tensor, row_scale: Tensor, counter: Tensor, row_offset: int = 0
) -> Tensor:
    """See `xmlkernels.ops.rescale_rows_`; a CUDA graph can capture it.

    Integer operations alone touch the codes, so that every card has it.
    """
    rows, width = weight.shape
    changed = torch.zeros(1, dtype=torch.int64, device=weight.device)
    if rows:
        _rescale[(triton.cdiv(rows, ROWS),)](
            weight.view(torch.uint8),
            row_scale,
            counter,
            changed,
            rows,
            width,
            row_offset,
            BR=ROWS,
            BD=COLUMNS,
            num_warps=4,
            **common.LAUNCH,
        )
    return changed
