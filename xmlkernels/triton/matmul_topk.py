"""`matmul_topk` on the GPU: scores beyond each sample's running k-th best are kept in a list.

A score and its row are one int64 key, so that one integer comparison is the whole order: higher
score first, then lower row. Labels are taken in a few chunks, in ascending order of row, each many
times as large as all before it. A chunk's tiles append to the list of each sample the keys above
its threshold (the k-th best of all chunks before; an equal score comes from a higher row and
loses). Between chunks the lists are cut back to their best k. The set of keys in a list never
depends on the order in which tiles finish.

A chunk may hold more labels than a list has room for, since few of them pass. Where more pass than
there is room for (scores that rise with the row), the list's count says so: it counts what passes,
not what is stored. Such a sample starts again after the last chunk. Passes over the table count
its keys by their leading bits, until a bound is known that at least the best k keys reach, and no
more than the list holds; one more pass collects these. Keys are distinct, so that all their bits
bound them exactly: the list holds them whatever the scores are. The launches of these passes are
always made, and return at once where no list overflowed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton import common
from xmlkernels.triton.descriptors import box, serve_descriptors

# All lists together; with the final sort's copies the workspace stays within 256 MB.
LIST_BYTES = 200 << 20
FIRST_CHUNK = 4096  # labels before there is a threshold: all of them enter the lists
# A chunk has at most so many times the labels of all chunks before: so many times k keys of a
# sample pass then, if its best rows lie anywhere. Each that passes costs its tile time, each chunk
# a cut: 5 cuts at 2.8M labels.
GROWTH = 4.2
# Lists have room for so many times the keys that are expected to pass.
MARGIN = 4
# samples at a time; from a few hundred on the product is bound by arithmetic, not by reading the
# table
BATCH = 1024
# Labels, samples and columns of a tile, and its warps. TILE_TMA needs the shared memory of sm_90;
# products of fp32 hold twice the bytes and run on no tensor core.
TILE_TMA, TILE, TILE_FP32 = (256, 128, 64, 8), (128, 128, 64, 8), (64, 64, 32, 4)
STAGES_TMA, STAGES = 4, 3
CUT_BLOCK = 1024
BIN_BITS = 13  # of a key that one pass over the table finds, where a list's memory holds the bins
EMPTY = tl.constexpr(-(2**63))  # below the key of every score, -inf included
HIGHEST = tl.constexpr(2**63 - 1)
OVERFLOWED, BOUNDED = tl.constexpr(1), tl.constexpr(2)  # states of a sample that starts again


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
    """Scores fp32 [BL labels, BB samples] of one tile; -inf or NaN for labels from `end` on.

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
    # One addition is bias and mask: no sum with -inf is above a threshold.
    if HAS_BIAS:
        z += tl.load(bias + label, mask=real_label, other=-float("inf"))[:, None]
    else:
        z += tl.where(real_label, 0.0, -float("inf"))[:, None]
    return z


@triton.jit
def _either(a, b):
    return a | b


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
    TMA: tl.constexpr,
    EMULATED: tl.constexpr,
    BL: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    """Scores of labels [begin, end); keys above their sample's threshold go to its list.

    threshold fp32 [batch]; used int32 [batch], keys that passed for each list; keys int64 [batch,
    capacity]. A program takes every n-th tile.
    """
    # Tiles of one block of labels run next to each other: the block comes from memory once, then
    # from the L2 cache.
    PIECE: tl.constexpr = 2048 // BL if BL > 128 else 16
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
        sample = first_sample + tl.arange(0, BB)
        best = tl.load(threshold + sample, mask=sample < batch, other=float("inf"))
        # NaN, which passes nowhere, where both are infinite.
        over = z - best[None, :]
        if tl.max(over) > 0.0:
            # A few samples at a time, or keys and addresses spill registers. The columns c, c + 8,
            # c + 16.. of a product lie in one thread, so that the selection moves nothing.
            bit = (1 << (tl.arange(0, BB) // PIECE))[None, :]
            hit = tl.reduce(tl.where(over > 0.0, bit, 0), None, _either)
            pieces = tl.reshape(tl.where(over > 0.0, z, -float("inf")), (BL, BB // PIECE, PIECE))
            row_part = (0xFFFFFFFF - (first_label.to(tl.int64) + tl.arange(0, BL)))[:, None]
            for piece in tl.static_range(0, BB // PIECE):
                if hit & (1 << piece):
                    mine = tl.arange(0, BB // PIECE)[None, :, None] == piece
                    part = tl.max(tl.where(mine, pieces, -float("inf")), axis=1)
                    its_sample = first_sample + piece * PIECE + tl.arange(0, PIECE)
                    key = _key(part, row_part)
                    _append(used, keys, key, its_sample, part > -float("inf"), capacity)


@triton.jit
def _key(score, row_part):
    """Make int64 keys of scores [rows, samples] and row_part = 2^32 - 1 - row [rows, 1]."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # zeros of both signs tie
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (order << 32) | row_part


@triton.jit
def _append(used, keys, key, sample, keep, capacity):
    """Add the kept keys [rows, samples] to the lists of their samples, as far as there is room."""
    one = keep.to(tl.int32)
    place = tl.atomic_add(used + (one * 0 + sample[None, :]), one, mask=keep, sem="relaxed")
    to = keys + sample[None, :].to(tl.int64) * capacity + place
    tl.store(to, key, mask=keep & (place < capacity))


@triton.jit
def _recount_tiles(
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
            pieces = tl.reshape(z, (BL, BB // 8, 8))
            row_part = (0xFFFFFFFF - (first_label.to(tl.int64) + tl.arange(0, BL)))[:, None]
            for piece in range(0, BB // 8):
                mine = tl.arange(0, BB // 8)[None, :, None] == piece
                part = tl.max(tl.where(mine, pieces, -float("inf")), axis=1)
                its_sample = first_sample + piece * 8 + tl.arange(0, 8)
                real = its_sample < batch
                piece_state = tl.load(state + its_sample, mask=real, other=0)
                wanted = (piece_state > 0) & (piece_state <= least)
                bound = tl.load(low + its_sample, mask=real, other=HIGHEST)[None, :]
                key = _key(part, row_part)
                keep = (part > -float("inf")) & (key >= bound) & wanted[None, :]
                if shift < 0:
                    _append(used, keys, key, its_sample, keep, capacity)
                else:
                    distance = (key - bound).to(tl.uint64) >> shift.to(tl.uint64)
                    keep &= distance < span.to(tl.uint64)
                    bin_at = its_sample[None, :].to(tl.int64) * (2 * capacity)
                    bin_at += tl.where(keep, distance.to(tl.int64), 0)
                    tl.atomic_add(bins + bin_at, 1, mask=keep, sem="relaxed")


@triton.jit
def _raise_bounds(state, low, above, bins, capacity, rank, shift, BINS: tl.constexpr):
    """Move one sample's bound up to the last bin that `rank` keys reach, and empties the bins.

    above int64 [batch]: keys beyond the bins.
    """
    sample = tl.program_id(0).to(tl.int64)
    if tl.load(state + sample) == OVERFLOWED:
        at = tl.arange(0, BINS)
        number = tl.load(bins + sample * (2 * capacity) + at)
        tl.store(bins + sample * (2 * capacity) + at, tl.zeros((BINS,), tl.int32))
        number = number.to(tl.uint32, bitcast=True).to(tl.int64)
        beyond = tl.load(above + sample)
        reach = beyond + tl.cumsum(number, axis=0, reverse=True)
        # The first bin where fewer reach even that: then all of the bins are wanted.
        last = tl.max(tl.where(reach >= rank, at, 0), axis=0)
        beyond += tl.sum(tl.where(at > last, number, 0), axis=0)
        here = tl.sum(tl.where(at == last, number, 0), axis=0)
        tl.store(above + sample, beyond)
        bound = tl.load(low + sample)
        tl.store(low + sample, bound + (last.to(tl.int64) << shift.to(tl.int64)))
        if beyond + here <= capacity:
            tl.store(state + sample, BOUNDED)


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
    flag,
    state,
    low,
    k,
    excluded,
    row_offset,
    capacity,
    AGAIN: tl.constexpr,
    LAST: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cuts one sample's list to its best k keys, without excluded rows, and moves its threshold up.

    A list that overflowed becomes empty bins, and its sample starts again. AGAIN: only lists of
    such samples are cut. LAST: the places up to k that are left are filled with EMPTY.
    """
    sample = tl.program_id(0).to(tl.int64)
    keys += sample * capacity
    count = tl.load(used + sample)
    again = tl.load(state + sample) > 0
    if AGAIN:
        wanted = again
    else:
        wanted = (not again) & (count <= capacity)
        if (not again) & (count > capacity):
            tl.store(threshold + sample, float("inf"))  # nothing more enters
            tl.store(used + sample, 0)
            tl.store(state + sample, OVERFLOWED)
            tl.store(low + sample, EMPTY)
            tl.store(flag, 1)
            for start in range(0, capacity, BLOCK):
                at = start + tl.arange(0, BLOCK)
                tl.store(keys + at, tl.zeros((BLOCK,), tl.int64), mask=at < capacity)
    if wanted & (LAST | (count > k)):
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


@dataclass(frozen=True)
class Plan:
    """How one call goes through batch and table; a constant of the shape.

    Attributes:
        samples: of the batch, at a time.
        capacity: keys of one list.
        chunks: labels [begin, end). The first fits into a list; so does any that is not many times
            k keys' work.
        shifts: bits of a key below those that are known after each pass of those that start again,
            beginning with all 64.
    """

    samples: int
    capacity: int
    chunks: list[tuple[int, int]]
    shifts: list[int]


def plan(batch: int, n: int, k: int, excluded: int = 0) -> Plan:
    """Plan for `excluded` rows a sample that may have to be dropped from the best."""
    # The final sort takes a few copies of the first k places.
    kept = 6 * k + excluded
    samples = max(1, min(batch, BATCH, LIST_BYTES // (8 * (kept + FIRST_CHUNK))))
    room = max(FIRST_CHUNK, LIST_BYTES // (8 * samples) - kept)
    capacity = k + excluded + min(room, n)
    first = min(n, room, max(FIRST_CHUNK, 2 * k))
    # Chunks all grow by one factor, so that the last is not a small rest.
    growth = 1 + min(GROWTH, room / (MARGIN * k))
    steps = math.ceil(math.log(n / first) / math.log(growth) - 1e-9)
    ends = [first]
    for step in range(1, steps + 1):
        to = math.ceil(first * (n / first) ** (step / steps) / TILE_TMA[0]) * TILE_TMA[0]
        if ends[-1] < n:
            ends.append(min(to, n))
    bits = min(BIN_BITS, (2 * capacity).bit_length() - 1)
    return Plan(
        samples,
        capacity,
        list(pairwise([0, *ends])),
        [64, *range(64 - bits, 0, -bits), 0],
    )


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
    if n >= 2**32:
        raise ValueError(
            f"matmul_topk: {n} rows on one device, fewer than 2**32 are taken; shard the table "
            "and merge the results"
        )
    values = torch.empty(batch, k, dtype=torch.float32, device=x.device)
    found = torch.empty(batch, k, dtype=torch.int64, device=x.device)
    if batch == 0 or n == 0:
        return values.fill_(-torch.inf), found.fill_(-1)
    kind = torch.bfloat16 if row_scale is not None else weight.dtype  # e4m3 is exact in bf16
    low = kind == torch.bfloat16 or (kind == torch.float16 and x.dtype == torch.float16)
    x = x.to(kind if low else torch.float32)
    weight = common.table_bits(weight)
    if exclude is not None and exclude.shape[1] == 0:
        exclude = None
    how = plan(batch, n, k, 0 if exclude is None else exclude.shape[1])
    samples = how.samples
    keys = torch.empty(samples, how.capacity, dtype=torch.int64, device=x.device)
    for first in range(0, batch, samples):
        part = x[first : first + samples]
        left = None if exclude is None else exclude[first : first + samples]
        best = _best_keys(part, weight, bias, row_scale, k, left, row_offset, keys, how)
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
    how: Plan,
) -> Tensor:
    """Return the best k keys of each sample, in any order; int64 [B, k], a view of `keys`."""
    batch, capacity, n = x.shape[0], keys.shape[1], how.chunks[-1][1]
    threshold = torch.full((batch,), -torch.inf, device=x.device)
    used, state = torch.zeros(2, batch, dtype=torch.int32, device=x.device)
    flag = torch.zeros(1, dtype=torch.int32, device=x.device)
    low = torch.full((batch,), HIGHEST.value, dtype=torch.int64, device=x.device)
    above = torch.zeros(batch, dtype=torch.int64, device=x.device)
    bins = keys.view(torch.int32)
    descriptors = serve_descriptors(x, weight, n)
    labels, most, width, warps = (
        TILE_TMA if descriptors else TILE_FP32 if x.dtype == torch.float32 else TILE
    )
    block = common.power_of_2(batch, 16, most)
    programs = common.resident(x.device, 1 if descriptors else 2)
    x_in = box(x, batch, block, width, tma=descriptors)
    w_in = box(weight, n, labels, width, tma=descriptors)
    tiles = {
        "D": weight.shape[1],
        "HAS_BIAS": bias is not None,
        "TMA": descriptors,
        "EMULATED": common.emulated(),
        "BL": labels,
        "BB": block,
        "BD": width,
        "num_warps": warps,
        "num_stages": STAGES_TMA if descriptors else STAGES,
        **common.LAUNCH,
    }

    def grid(size: int) -> tuple[int]:
        return (min(programs, triton.cdiv(size, labels) * triton.cdiv(batch, block)),)

    def cut(*, again: bool, last: bool) -> None:
        _cut_lists[(batch,)](
            exclude,
            threshold,
            used,
            keys,
            flag,
            state,
            low,
            k,
            0 if exclude is None else exclude.shape[1],
            row_offset,
            capacity,
            AGAIN=again,
            LAST=last,
            HAS_EXCLUDE=exclude is not None,
            BLOCK=CUT_BLOCK,
            num_warps=4,
            **common.LAUNCH,
        )

    for begin, end in how.chunks:
        _score_tiles[grid(end - begin)](
            x_in,
            w_in,
            bias,
            row_scale,
            threshold,
            used,
            keys,
            begin,
            end,
            batch,
            capacity,
            **tiles,
        )
        cut(again=False, last=end == n)
    if any(end - begin > capacity - k for begin, end in how.chunks):
        _start_again(
            lambda shift, span: _recount_tiles[grid(n)](
                x_in,
                w_in,
                bias,
                row_scale,
                flag,
                state,
                low,
                used,
                keys,
                bins,
                n,
                batch,
                capacity,
                shift,
                span,
                **tiles,
            ),
            lambda shift: _raise_bounds[(batch,)](
                state,
                low,
                above,
                bins,
                capacity,
                k + (0 if exclude is None else exclude.shape[1]),
                shift,
                BINS=1 << (64 - how.shifts[1]),
                num_warps=8,
                **common.LAUNCH,
            ),
            how.shifts,
        )
        cut(again=True, last=True)
    return keys[:batch, :k]


def _start_again(
    recount: Callable[[int, int], object], raise_bounds: Callable[[int], object], shifts: list[int]
) -> None:
    """Find the bounds of samples whose lists overflowed, and collect the keys from there on."""
    for known, shift in pairwise(shifts):
        recount(shift, 1 << (known - shift))
        raise_bounds(shift)
    recount(-1, 0)
