"""The lists of keys that `matmul_topk` keeps for each sample: cuts, and bounds after overflow."""

import triton
import triton.language as tl

EMPTY = tl.constexpr(-(2**63))  # below the key of every score, -inf included
HIGHEST = tl.constexpr(2**63 - 1)
OVERFLOWED, BOUNDED = tl.constexpr(1), tl.constexpr(2)  # states of a sample that starts again


@triton.jit
def raise_bounds(state, low, above, bins, capacity, rank, shift, BINS: tl.constexpr):
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
def _count_from(keys, held, used, bound, HELD: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the first `used` keys are >= bound, which is above EMPTY; HELD: of all held."""
    if HELD:
        found = (held >= bound).to(tl.int32)
    else:
        found = tl.zeros((BLOCK,), dtype=tl.int32)
        for start in range(0, used, BLOCK):
            at = start + tl.arange(0, BLOCK)
            key = tl.load(keys + at, mask=at < used, other=EMPTY)
            found += (key >= bound).to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit
def _find_bound(keys, held, used, k, HELD: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest bound that at least k keys reach, and how many do.

    Bit by bit from the top; done early where exactly k reach it. Where fewer than k keys are real,
    it is below all of these.
    """
    bound = tl.full((), EMPTY + 1, tl.int64)
    reach = _count_from(keys, held, used, bound, HELD, BLOCK)
    if reach > k:
        bound -= 1
        bit = tl.full((), 63, tl.int64)
        while (bit >= 0) & (reach != k):
            trial = bound ^ (tl.full((), 1, tl.int64) << bit)
            number = _count_from(keys, held, used, trial, HELD, BLOCK)
            bound = tl.where(number >= k, trial, bound)
            reach = tl.where(number >= k, number, reach)
            bit -= 1
    return bound, reach


@triton.jit
def cut_lists(
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
    ALWAYS: tl.constexpr,
    LAST: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cuts one sample's list to its best k keys, without excluded rows, and moves its threshold up.

    A list that overflowed becomes empty bins, and its sample starts again. AGAIN: only lists of
    such samples are cut. ALWAYS: lists have empty places, and short ones are cut, too. LAST: so are
    they, and the places up to k that are left are filled with EMPTY. A list of no more than HELD
    keys is held in registers while the bound is sought.
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
    if wanted & (LAST | ALWAYS | (count > k)):
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
        if count <= HELD:
            at = tl.arange(0, HELD)
            held = tl.load(keys + at, mask=at < count, other=EMPTY)
            bound, reach = _find_bound(keys, held, count, k, True, BLOCK)
        else:
            bound, reach = _find_bound(keys, None, count, k, False, BLOCK)
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
        if reach >= k:
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
