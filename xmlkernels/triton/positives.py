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
def subtract_targets(
    tile,
    factor,
    pos_row,
    pos_sample,
    pos_value,
    begin,
    end,
    first,
    first_sample,
    BLOCK_L: tl.constexpr,
    BLOCK_B: tl.constexpr,
    SINGLY: tl.constexpr,
):
    """Return tile [BLOCK_L, BLOCK_B] - factor y for the targets y of its positives, begin to end.

    factor: such a tile, or None for 1. The positives are taken one at a time, which needs no second
    tile of registers, or (not SINGLY, and without values) 16 at a time, as products of indicator
    matrices in fp16: exact, and half the registers.
    """
    lane, sample = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_B)
    if SINGLY or pos_value is not None:
        p = begin
        while p < end:  # no `for`, so that the loops around it can be joined
            row = (tl.load(pos_row + p) - first).to(tl.int32)
            at = tl.load(pos_sample + p) - first_sample
            y = tl.load(pos_value + p) if pos_value is not None else 1.0
            hit = (lane == row)[:, None] & (sample == at)[None, :]
            tile = tl.where(hit, tile - (y if factor is None else y * factor), tile)
            p += 1
    else:
        for p in range(begin, end, 16):
            at = p + tl.arange(0, 16)
            inside = at < end
            row = (tl.load(pos_row + at, mask=inside, other=-1) - first).to(tl.int32)
            some = tl.load(pos_sample + at, mask=inside, other=-1) - first_sample
            of_row = (lane[:, None] == row[None, :]) & inside[None, :]
            of_sample = some[:, None] == sample[None, :]
            y = tl.dot(of_row.to(tl.float16), of_sample.to(tl.float16), out_dtype=tl.float16)
            tile -= y if factor is None else y * factor
    return tile
