"""`matmul_topk` on the GPU: scores beyond each sample's running k-th best are kept in a list.

A score and its row are one int64 key, so that one integer comparison is the whole order: higher
score first, then lower row. Labels are taken in chunks, in ascending order of row. A chunk's tiles
append to the list of each sample the keys above its threshold (the k-th best of all chunks before;
an equal score comes from a higher row and loses). Between chunks, lists that have grown are cut
back to their best k. The set of keys in a list never depends on the order in which tiles finish,
and a list has room for a whole chunk, so that nothing is lost whatever the scores are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton import common

# All lists together; with the final sort's copies the workspace stays within 256 MB.
LIST_BYTES = 200 << 20
FIRST_CHUNK = 4096  # labels before there is a threshold: all of them enter the lists
# samples at a time; from a few hundred on the product is bound by arithmetic, not by reading the
# table
BATCH = 1024
# Labels, samples and columns of a tile, and its warps; products of fp32 hold twice the bytes and
# run on no tensor core.
TILE, TILE_FP32 = (128, 128, 64, 8), (64, 64, 32, 4)
CUT_BLOCK = 1024
EMPTY = tl.constexpr(-(2**63))  # below the key of every score, -inf included
HIGHEST = tl.constexpr(2**63 - 1)


@triton.jit
def _score_tiles(
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
    EMULATED: tl.constexpr,
    BL: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    """Scores [BL labels, BB samples] of one tile; keys above the sample's threshold go to its list.

    x [batch, D] in the format of the product; weight [n, D]; row_scale fp32 [n, 2] of an e4m3
    table, or None; threshold fp32 [batch]; used int32 [batch], entries in each list; keys int64
    [batch, capacity].
    """
    # Tiles of one block of labels run next to each other: the block comes from memory once, then
    # from the L2 cache.
    sample_tiles = tl.cdiv(batch, BB)
    pid = tl.program_id(0)
    label = begin + (pid // sample_tiles).to(tl.int64) * BL + tl.arange(0, BL)
    sample = (pid % sample_tiles) * BB + tl.arange(0, BB)
    real_label, real_sample = label < end, sample < batch
    column = tl.arange(0, BD)
    w_at = weight + label[:, None] * D + column[None, :]
    x_at = x + sample[None, :].to(tl.int64) * D + column[:, None]
    z = tl.zeros((BL, BB), dtype=tl.float32)
    for start in range(0, D, BD):
        left = column < D - start
        w = tl.load(w_at + start, mask=real_label[:, None] & left[None, :], other=0)
        e = tl.load(x_at + start, mask=real_sample[None, :] & left[:, None], other=0.0)
        w = common.operand(w, e.dtype, EMULATED)
        z = common.dot(w if w.dtype == e.dtype else common.widen(w), e, z, EMULATED)
    if row_scale is not None:
        z *= tl.load(row_scale + 2 * label, mask=real_label, other=1.0)[:, None]
    if HAS_BIAS:
        z += tl.load(bias + label, mask=real_label, other=0.0)[:, None]
    best = tl.load(threshold + sample, mask=real_sample, other=float("inf"))
    keep = (z > best[None, :]) & real_label[:, None]  # false for NaN, and for -inf always
    if tl.max(tl.max(keep.to(tl.int32), axis=0), axis=0) > 0:
        # 16 columns at a time, or keys and addresses spill registers. The columns c, c + 8, c +
        # 16.. of a product lie in one thread, so that this selection moves nothing.
        pieces = tl.reshape(tl.where(keep, z, -float("inf")), (BL, BB // 16, 16))
        row_part = (0xFFFFFFFF - label)[:, None]
        for piece in range(0, BB // 16):
            mine = tl.arange(0, BB // 16)[None, :, None] == piece
            part = tl.max(tl.where(mine, pieces, -float("inf")), axis=1)
            passed = part > -float("inf")
            if tl.max(tl.max(passed.to(tl.int32), axis=0), axis=0) > 0:
                its_sample = (pid % sample_tiles) * BB + piece * 16 + tl.arange(0, 16)
                _append(used, keys, part, row_part, its_sample, passed, capacity)


@triton.jit
def _append(used, keys, score, row_part, sample, keep, capacity):
    """Add the kept scores [rows, samples] to the lists of their samples."""
    one = keep.to(tl.int32)
    place = tl.atomic_add(used + (one * 0 + sample[None, :]), one, mask=keep, sem="relaxed")
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # zeros of both signs tie
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    tl.store(
        keys + sample[None, :].to(tl.int64) * capacity + place, (order << 32) | row_part, mask=keep
    )


@triton.jit
def _count_from(keys, used, bound, BLOCK: tl.constexpr):
    """How many of the first `used` keys are >= bound."""
    found = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, used, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = tl.load(keys + at, mask=at < used, other=EMPTY)
        found += ((key >= bound) & (at < used)).to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit
def _cut_lists(
    exclude,
    threshold,
    used,
    keys,
    k,
    excluded,
    row_offset,
    capacity,
    slack,
    LAST: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cuts one sample's list to its best k keys, without excluded rows, and moves its threshold up.

    A list of at most k + slack keys is left for later: its threshold is then a little lower than it
    could be, which is safe. LAST (the caller gives slack = -k - 1): the places up to k that are
    left are filled with EMPTY.
    """
    sample = tl.program_id(0).to(tl.int64)
    keys += sample * capacity
    count = tl.load(used + sample)
    if count > k + slack:
        if HAS_EXCLUDE:
            for start in range(0, count, BLOCK):
                at = start + tl.arange(0, BLOCK)
                key = tl.load(keys + at, mask=at < count, other=EMPTY)
                row = 0xFFFFFFFF - (key & 0xFFFFFFFF) + row_offset
                drop = at < 0
                for e in range(0, excluded):
                    drop |= row == tl.load(exclude + sample * excluded + e)
                tl.store(keys + at, tl.full((BLOCK,), EMPTY, tl.int64), mask=drop & (at < count))
            tl.debug_barrier()
        # The largest bound that at least k keys reach, bit by bit from the top; done early where
        # exactly k reach it.
        bound = tl.full((), EMPTY + 1, tl.int64)
        reach = _count_from(keys, count, bound, BLOCK)
        full = reach >= k
        if reach > k:
            bound -= 1
            bit = tl.full((), 63, tl.int64)
            while (bit >= 0) & (reach != k):
                trial = bound ^ (tl.full((), 1, tl.int64) << bit)
                number = _count_from(keys, count, trial, BLOCK)
                bound = tl.where(number >= k, trial, bound)
                reach = tl.where(number >= k, number, reach)
                bit -= 1
        # In place: a block's survivors go to places at or before it, after the whole block has been
        # read (the scan and the barrier wait for all threads).
        kept = tl.zeros((), tl.int32)
        least = tl.full((), HIGHEST, tl.int64)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            key = tl.load(keys + at, mask=at < count, other=EMPTY)
            keep = (key >= bound) & (at < count)
            place = kept + tl.cumsum(keep.to(tl.int32), axis=0) - 1
            least = tl.minimum(least, tl.min(tl.where(keep, key, HIGHEST), axis=0))
            tl.debug_barrier()
            tl.store(keys + place, key, mask=keep)
            kept += tl.sum(keep.to(tl.int32), axis=0)
            tl.debug_barrier()
        tl.store(used + sample, kept)
        if full:
            order = (least >> 32).to(tl.int32)
            tl.store(
                threshold + sample,
                (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True),
            )
        if LAST:
            for start in range(0, k, BLOCK):
                at = start + tl.arange(0, BLOCK)
                tl.store(
                    keys + at, tl.full((BLOCK,), EMPTY, tl.int64), mask=(at >= kept) & (at < k)
                )


def plan(batch: int, n: int, k: int) -> tuple[int, int, int, list[tuple[int, int]]]:
    """Return samples at a time, slack and capacity of a list, and chunks of labels [begin, end).

    A list holds at most k + slack keys between chunks, so that a chunk of capacity - k - slack
    labels always fits.
    """
    slack = max(256, k)
    # The final sort takes a few copies of the first k places.
    samples = max(1, min(batch, BATCH, LIST_BYTES // (8 * (6 * k + slack + FIRST_CHUNK))))
    most = max(FIRST_CHUNK, LIST_BYTES // (8 * samples) - 6 * k - slack)
    chunks, begin = [], 0
    while begin < n:
        # Twice as many labels as before: about k keys of a sample pass then, whatever the chunk.
        size = min(most, max(begin, FIRST_CHUNK, min(2 * k, most)), n - begin)
        chunks.append((begin, begin + size))
        begin += size
    return samples, slack, k + slack + min(most, n), chunks


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
    """See `xmlkernels.ops.matmul_topk`; a CUDA graph can capture it."""
    batch, n = x.shape[0], weight.shape[0] if rows < 0 else rows
    if n > 2**32:
        raise ValueError(
            f"matmul_topk: {n} rows on one device, at most 2**32; shard the table and merge the "
            "results"
        )
    values = torch.empty(batch, k, dtype=torch.float32, device=x.device)
    found = torch.empty(batch, k, dtype=torch.int64, device=x.device)
    if batch == 0 or n == 0:
        return values.fill_(-torch.inf), found.fill_(-1)
    kind = torch.bfloat16 if row_scale is not None else weight.dtype  # e4m3 is exact in bf16
    low = kind == torch.bfloat16 or (kind == torch.float16 and x.dtype == torch.float16)
    x = x.to(kind if low else torch.float32)
    weight = common.table_bits(weight)
    samples, slack, capacity, chunks = plan(batch, n, k)
    keys = torch.empty(samples, capacity, dtype=torch.int64, device=x.device)
    for first in range(0, batch, samples):
        part = x[first : first + samples]
        left = (
            None if exclude is None or exclude.shape[1] == 0 else exclude[first : first + samples]
        )
        best = _best_keys(part, weight, bias, row_scale, k, left, row_offset, keys, slack, chunks)
        key = torch.sort(
            best, dim=1, descending=True
        ).values  # no two keys are equal, but for empty places
        order = (key >> 32).to(torch.int32)
        score = (order ^ ((order >> 31) & 0x7FFFFFFF)).view(torch.float32)
        empty = key == EMPTY.value
        values[first : first + samples] = torch.where(empty, -torch.inf, score)
        found[first : first + samples] = torch.where(
            empty, -1, 0xFFFFFFFF - (key & 0xFFFFFFFF) + row_offset
        )
    return values, found


def _best_keys(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    k: int,
    exclude: Tensor | None,
    row_offset: int,
    keys: Tensor,
    slack: int,
    chunks: list[tuple[int, int]],
) -> Tensor:
    """Return the best k keys of each sample, in any order; int64 [B, k], a view of `keys`."""
    batch, capacity = x.shape[0], keys.shape[1]
    threshold = torch.full((batch,), -torch.inf, device=x.device)
    used = torch.zeros(batch, dtype=torch.int32, device=x.device)
    labels, most, width, warps = TILE_FP32 if x.dtype == torch.float32 else TILE
    block = common.power_of_2(batch, 16, most)
    for begin, end in chunks:
        tiles = triton.cdiv(end - begin, labels) * triton.cdiv(batch, block)
        _score_tiles[(tiles,)](
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
            D=weight.shape[1],
            HAS_BIAS=bias is not None,
            EMULATED=common.emulated(),
            BL=labels,
            BB=block,
            BD=width,
            num_warps=warps,
            num_stages=3,
            **common.LAUNCH,
        )
        last = end == chunks[-1][1]
        _cut_lists[(batch,)](
            exclude,
            threshold,
            used,
            keys,
            k,
            0 if exclude is None else exclude.shape[1],
            row_offset,
            capacity,
            -k - 1 if last else slack,
            LAST=last,
            HAS_EXCLUDE=exclude is not None,
            BLOCK=CUT_BLOCK,
            num_warps=4,
            **common.LAUNCH,
        )
    return keys[:batch, :k]
