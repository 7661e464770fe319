"""Positives sorted by row: where each block of labels begins, and its dense targets."""

import triton
import triton.language as tl

from xmlkernels.triton import common


@triton.jit
def find_starts(pos_row, starts, count, rows, blocks, BLOCK_L: tl.constexpr, BLOCK: tl.constexpr):
    """First positive of each block of labels, by bisection; one more entry ends the last block."""
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    edge = tl.minimum(block.to(tl.int64) * BLOCK_L, rows)
    low = tl.zeros([BLOCK], dtype=tl.int64)
    high = low + count
    length = tl.cast(count, tl.int64)
    while length > 0:
        middle = (low + high) // 2
        search = (low < high) & (block <= blocks)
        less = tl.load(pos_row + middle, mask=search, other=0) < edge
        low = tl.where(search & less, middle + 1, low)
        high = tl.where(search & (less == 0), middle, high)
        length = length // 2
    tl.store(starts + block, low, mask=block <= blocks)


@triton.jit
def targets(
    pos_row,
    pos_sample,
    pos_value,
    begin,
    end,
    first,
    sample_block,
    BLOCK_B: tl.constexpr,
    BLOCK_L: tl.constexpr,
    KIND: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Return the targets [BLOCK_B, BLOCK_L] of a block from its positives.

    They are products of indicator matrices, 16 positives at a time.
    """
    y = tl.zeros([BLOCK_B, BLOCK_L], dtype=tl.float32)
    # The interpreter makes no bf16 of a truth value.
    kind: tl.constexpr = tl.float32 if EMULATED else KIND
    for p in range(begin, end, 16):
        at = p + tl.arange(0, 16)
        inside = at < end
        lane = (tl.load(pos_row + at, mask=inside, other=-1) - first).to(tl.int32)
        sample = tl.load(pos_sample + at, mask=inside, other=-1) - sample_block
        of_sample = tl.arange(0, BLOCK_B)[:, None] == sample[None, :]
        of_row = (lane[:, None] == tl.arange(0, BLOCK_L)[None, :]) & inside[:, None]
        if pos_value is not None:
            value = tl.load(pos_value + at, mask=inside, other=0.0)
            y = common.dot(
                of_sample.to(tl.float32), tl.where(of_row, value[:, None], 0.0), y, EMULATED
            )
        else:
            y = common.dot(of_sample.to(kind), of_row.to(kind), y, EMULATED)
    return y
