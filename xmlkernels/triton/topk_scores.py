"""Scores of tiles for `matmul_topk`, and which of them enter the samples' lists.

A score and its row are one int64 key, so that one integer comparison is the whole order: higher
score first, then lower row.
"""

import triton
import triton.language as tl

from xmlkernels.triton import common
from xmlkernels.triton.topk_lists import BOUNDED, EMPTY, HIGHEST, OVERFLOWED


@triton.jit
def _scores(
    x,
    weight,
    bias,
    row_scale,
    first_label,
    first_sample,
    end,
    batch,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    EMULATED: tl.constexpr,
    BL: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    """Scores fp32 [BL labels, BB samples] of one tile.

    Those of labels from `end` on are -inf or NaN where there is a bias, else zero.

    x [batch, D] in the format of the product; weight [n, D]; row_scale fp32 [n, 2] of an e4m3
    table, or None. TMA: x and weight are descriptors, which give zeros beyond their ends.
    """
    label = first_label + tl.arange(0, BL)
    real_label = label < end
    column = tl.arange(0, BD)
    if not TMA:
        sample = first_sample + tl.arange(0, BB)
        real_sample = sample < batch
        w_at = weight + label.to(tl.int64)[:, None] * D + column[None, :]
        x_at = x + sample[None, :].to(tl.int64) * D + column[:, None]
    z = tl.zeros((BL, BB), dtype=tl.float32)
    for start in range(0, D, BD):
        if TMA:
            w = weight.load([first_label, start])
            e = x.load([first_sample, start]).T
        else:
            left = column < D - start
            w = tl.load(w_at + start, mask=real_label[:, None] & left[None, :], other=0)
            e = tl.load(x_at + start, mask=real_sample[None, :] & left[:, None], other=0.0)
        w = common.operand(w, e.dtype, EMULATED)
        z = common.dot(w if w.dtype == e.dtype else common.widen(w), e, z, EMULATED)
    if row_scale is not None:
        z *= tl.load(row_scale + 2 * label.to(tl.int64), mask=real_label, other=1.0)[:, None]
    if HAS_BIAS:
        z += tl.load(bias + label, mask=real_label, other=-float("inf"))[:, None]
    return z


@triton.jit
def score_labels(
    x,
    weight,
    bias,
    row_scale,
    threshold,
    used,
    keys,
    begin,
    end,
    batch,
    capacity,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FIRST: tl.constexpr,
    TMA: tl.constexpr,
    EMULATED: tl.constexpr,
    BL: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    """Scores of labels [begin, end); keys above their sample's threshold go to its list.

    threshold fp32 [batch]; used int32 [batch], keys that passed for each list; keys int64 [batch,
    capacity]. FIRST: begin is 0, and every label has the place of its row, empty where its score is
    NaN or -inf. A program takes every n-th tile.
    """
    # Tiles of one block of labels run next to each other: the block comes from memory once, then
    # from the L2 cache.
    sample_tiles = tl.cdiv(batch, BB)
    tiles = tl.cdiv(end - begin, BL) * sample_tiles
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_label = begin + (tile // sample_tiles) * BL
        first_sample = ((tile % sample_tiles) * BB).to(tl.int32)
        z = _scores(
            x,
            weight,
            bias,
            row_scale,
            first_label,
            first_sample,
            end,
            batch,
            D,
            HAS_BIAS,
            TMA,
            EMULATED,
            BL,
            BB,
            BD,
        )
        label = first_label.to(tl.int64) + tl.arange(0, BL)
        if FIRST:
            _place_all(z, keys, label, first_sample, end, batch, capacity, BL, BB)
        else:
            _append_passing(
                z, threshold, used, keys, label, first_sample, end, batch, capacity, BL, BB
            )


@triton.jit
def _place_all(
    z, keys, label, first_sample, end, batch, capacity, BL: tl.constexpr, BB: tl.constexpr
):
    """Store the keys of all labels [BL] and samples at the labels' places in the lists."""
    pieces = tl.reshape(z, (BL, BB // 8, 8))
    row_part = (0xFFFFFFFF - label)[:, None]
    for piece in range(0, BB // 8):  # unrolled, it would spill
        # Columns c, c + 8, c + 16.. of a product lie in one thread: the selection moves nothing.
        mine = tl.arange(0, BB // 8)[None, :, None] == piece
        part = tl.max(tl.where(mine, pieces, -float("inf")), axis=1)
        sample = (first_sample + piece * 8 + tl.arange(0, 8))[None, :]
        key = tl.where(part > -float("inf"), make_key(part, row_part), EMPTY)
        to = keys + sample.to(tl.int64) * capacity + label[:, None]
        tl.store(to, key, mask=(label < end)[:, None] & (sample < batch))


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _append_passing(
    z,
    threshold,
    used,
    keys,
    label,
    first_sample,
    end,
    batch,
    capacity,
    BL: tl.constexpr,
    BB: tl.constexpr,
):
    """Add the keys of scores [BL, BB] above their samples' thresholds to the lists.

    A thread holds the columns 2q, 2q + 1, 2q + 8, 2q + 9.. of some rows of a product, for a q of 4.
    Those that pass are bits of a word for each row and q; then one of each word is taken at a time.
    """
    J: tl.constexpr = BB // 8
    sample = first_sample + tl.arange(0, BB)
    best = tl.load(threshold + sample, mask=sample < batch, other=float("inf"))
    place = tl.arange(0, BB)
    bit = (1 << (place // 8 * 2 + place % 2)).to(tl.uint32)
    # NaN passes nowhere.
    word = tl.reshape(tl.where(z > best[None, :], bit[None, :], 0), (BL, J, 4, 2))
    left = tl.reduce(tl.reduce(word, 3, _either), 1, _either)
    left = tl.where((label < end)[:, None], left, 0)
    row_part = (0xFFFFFFFF - label)[:, None]
    quarter = 2 * tl.arange(0, 4)[None, :]
    while tl.max(tl.reshape(left, (4 * BL,)), axis=0) > 0:
        one = left & ((left ^ 0xFFFFFFFF) + 1)
        score, column = _pick(z, one, BL, J)
        key = make_key(score, row_part)
        append(used, keys, key, first_sample + column + quarter, left > 0, capacity)
        left ^= one


@triton.jit
def _pick(z, one, BL: tl.constexpr, J: tl.constexpr):
    """Return the score that a word's only bit [BL, 4] stands for, and its column without 2q."""
    odd = (one & 0xAAAAAAAA) > 0
    even_part, odd_part = tl.split(tl.reshape(z, (BL, J, 4, 2)))
    left = tl.permute(tl.where(odd[:, None, :], odd_part, even_part), (0, 2, 1))
    column = odd.to(tl.int32)
    if J > 1:
        upper = (one & 0xCCCCCCCC) > 0
        left, column = _halve(left, column, upper, 8, BL, J)
    if J > 2:
        upper = (one & 0xF0F0F0F0) > 0
        left, column = _halve(left, column, upper, 16, BL, J // 2)
    if J > 4:
        upper = (one & 0xFF00FF00) > 0
        left, column = _halve(left, column, upper, 32, BL, J // 4)
    if J > 8:
        upper = (one & 0xFFFF0000) > 0
        left, column = _halve(left, column, upper, 64, BL, J // 8)
    return tl.reshape(left, (BL, 4)), column


@triton.jit
def _halve(left, column, upper, STEP: tl.constexpr, BL: tl.constexpr, J: tl.constexpr):
    low, high = tl.split(tl.reshape(left, (BL, 4, J // 2, 2)))
    return tl.where(upper[:, :, None], high, low), column + tl.where(upper, STEP, 0)


@triton.jit
def make_key(score, row_part):
    """Make int64 keys of scores [rows, samples] and row_part = 2^32 - 1 - row [rows, 1]."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # zeros of both signs tie
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (order << 32) | row_part


@triton.jit
def append(used, keys, key, sample, keep, capacity):
    """Add the kept keys to the lists of their samples, as far as there is room.

    All are tensors of two axes; samples may be the same in each row.
    """
    one = keep.to(tl.int32)
    place = tl.atomic_add(used + (one * 0 + sample), one, mask=keep, sem="relaxed")
    to = keys + sample.to(tl.int64) * capacity + place
    tl.store(to, key, mask=keep & (place < capacity))


@triton.jit
def recount_labels(
    x,
    weight,
    bias,
    row_scale,
    flag,
    state,
    low,
    used,
    keys,
    bins,
    end,
    batch,
    capacity,
    shift,
    span,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    EMULATED: tl.constexpr,
    BL: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    """Count the keys of samples whose lists overflowed, by their distance from `low` >> shift.

    bins int32 [batch, 2 capacity], the memory of the lists; distances from `span` on are left out.
    A negative shift collects keys from `low` on into the lists. flag int32 [1]: whether any
    list overflowed.
    """
    sample_tiles = tl.cdiv(batch, BB)
    tiles = tl.cdiv(end, BL) * sample_tiles
    tiles = tl.where(tl.load(flag) > 0, tiles, 0)
    least = tl.where(shift < 0, BOUNDED, OVERFLOWED)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_label = (tile // sample_tiles) * BL
        first_sample = ((tile % sample_tiles) * BB).to(tl.int32)
        sample = first_sample + tl.arange(0, BB)
        its_state = tl.load(state + sample, mask=sample < batch, other=0)
        if tl.max(((its_state > 0) & (its_state <= least)).to(tl.int32), axis=0) > 0:
            z = _scores(
                x,
                weight,
                bias,
                row_scale,
                first_label,
                first_sample,
                end,
                batch,
                D,
                HAS_BIAS,
                TMA,
                EMULATED,
                BL,
                BB,
                BD,
            )
            label = first_label.to(tl.int64) + tl.arange(0, BL)
            if not HAS_BIAS:
                z = tl.where((label < end)[:, None], z, -float("inf"))
            pieces = tl.reshape(z, (BL, BB // 8, 8))
            row_part = (0xFFFFFFFF - label)[:, None]
            for piece in range(0, BB // 8):
                mine = tl.arange(0, BB // 8)[None, :, None] == piece
                part = tl.max(tl.where(mine, pieces, -float("inf")), axis=1)
                its_sample = first_sample + piece * 8 + tl.arange(0, 8)
                real = its_sample < batch
                piece_state = tl.load(state + its_sample, mask=real, other=0)
                wanted = (piece_state > 0) & (piece_state <= least)
                bound = tl.load(low + its_sample, mask=real, other=HIGHEST)[None, :]
                key = make_key(part, row_part)
                keep = (part > -float("inf")) & (key >= bound) & wanted[None, :]
                if shift < 0:
                    append(used, keys, key, its_sample[None, :], keep, capacity)
                else:
                    distance = (key - bound).to(tl.uint64) >> shift.to(tl.uint64)
                    keep &= distance < span.to(tl.uint64)
                    bin_at = its_sample[None, :].to(tl.int64) * (2 * capacity)
                    bin_at += tl.where(keep, distance.to(tl.int64), 0)
                    tl.atomic_add(bins + bin_at, 1, mask=keep, sem="relaxed")
