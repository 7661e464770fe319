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
from torch import Tensor

from xmlkernels.triton import common
from xmlkernels.triton.descriptors import are_aligned, box, serve_descriptors
from xmlkernels.triton.topk_lists import EMPTY, HIGHEST, cut_lists, raise_bounds
from xmlkernels.triton.topk_scores import recount_labels, score_labels

# All lists together; with the final sort's copies the workspace stays within 256 MB.
LIST_BYTES = 200 << 20
# Labels before there is a threshold, at least: all of them enter the lists. Up to four times as
# many do where more keys than this would pass in a later chunk.
FIRST_CHUNK = 4096
# One cut for so many labels at most, and no more than MOST_CUTS where lists have room: a cut takes
# about as long as the tiles of a chunk need for the keys that pass.
LABELS_OF_CUT, MOST_CUTS = 500_000, 4
# Lists have room for so many times the keys that are expected to pass.
MARGIN = 3
# samples at a time; from a few hundred on the product is bound by arithmetic, not by reading the
# table
BATCH = 1024
# Labels, samples and columns of a tile, and its warps. TILE_TMA needs the shared memory of sm_90.
# Small tiles are for products of fp32, which hold twice the bytes and run on no tensor core, and
# for rows that are no multiples of 16 bytes: read number by number, they take many registers.
TILE_TMA, TILE, TILE_SMALL = (256, 128, 64, 8), (128, 128, 64, 8), (64, 64, 32, 8)
STAGES_TMA, STAGES = 4, 3
CUT_BLOCK, CUT_MOST = 1024, 16384  # keys that a cut holds in registers
BIN_BITS = 13  # of a key that one pass over the table finds, where a list's memory holds the bins


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
    # So many times k keys of a sample pass in a chunk that multiplies the labels seen by this, if
    # its best rows lie anywhere. All chunks but the first do so by one factor, so that the last is
    # not a small rest.
    most = 1 + min(CUT_MOST, room / MARGIN) / k
    steps = min(max(n // LABELS_OF_CUT, 2), MOST_CUTS) - 1
    for size in (FIRST_CHUNK, 2 * FIRST_CHUNK, 4 * FIRST_CHUNK):
        first = min(n, room, max(size, 2 * k))
        if k * (n / first) ** (1 / steps) <= FIRST_CHUNK:
            break
    steps = max(steps, math.ceil(math.log(n / first) / math.log(most) - 1e-9))
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
    # Every label of the first chunk has a place.
    used = torch.full((batch,), how.chunks[0][1], dtype=torch.int32, device=x.device)
    state = torch.zeros(batch, dtype=torch.int32, device=x.device)
    flag = torch.zeros(1, dtype=torch.int32, device=x.device)
    low = torch.full((batch,), HIGHEST.value, dtype=torch.int64, device=x.device)
    above = torch.zeros(batch, dtype=torch.int64, device=x.device)
    bins = keys.view(torch.int32)
    descriptors = serve_descriptors(x, weight, n)
    small = x.dtype == torch.float32 or not are_aligned(x, weight)
    labels, most, width, warps = TILE_TMA if descriptors else TILE_SMALL if small else TILE
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

    def cut(expected: float, **kind: bool) -> None:
        held = common.power_of_2(math.ceil(expected), CUT_BLOCK, CUT_MOST)
        cut_lists[(batch,)](
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
            **kind,
            HAS_EXCLUDE=exclude is not None,
            HELD=held,
            BLOCK=CUT_BLOCK,
            num_warps=min(max(held // 512, 4), 16),
            **common.LAUNCH,
        )

    for begin, end in how.chunks:
        score_labels[grid(end - begin)](
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
            FIRST=begin == 0,
            **tiles,
        )
        expected = end if begin == 0 else 2 * k * end / begin
        cut(expected, AGAIN=False, ALWAYS=begin == 0, LAST=end == n)
    if any(end - begin > capacity - k for begin, end in how.chunks):
        _start_again(
            lambda shift, span: recount_labels[grid(n)](
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
            lambda shift: raise_bounds[(batch,)](
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
        cut(CUT_BLOCK, AGAIN=True, ALWAYS=False, LAST=True)
    return keys[:batch, :k]


def _start_again(
    recount: Callable[[int, int], object], raise_bounds: Callable[[int], object], shifts: list[int]
) -> None:
    """Find the bounds of samples whose lists overflowed, and collect the keys from there on."""
    for known, shift in pairwise(shifts):
        recount(shift, 1 << (known - shift))
        raise_bounds(shift)
    recount(-1, 0)
