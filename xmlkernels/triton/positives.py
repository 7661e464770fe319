"""Positives sorted by row: where each block of labels begins, and one at a time."""

import triton
import triton.language as tl


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
def target(pos_row, pos_sample, pos_value, p, first, lane, sample):
    """Return where the p-th positive is in a tile of labels and samples, and its value."""
    row = (tl.load(pos_row + p) - first).to(tl.int32)
    hit = (lane == row)[:, None] & (sample == tl.load(pos_sample + p))[None, :]
    value = tl.load(pos_value + p) if pos_value is not None else 1.0
    return hit, value
