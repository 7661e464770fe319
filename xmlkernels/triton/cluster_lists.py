"""What `cluster_step_` looks up on the GPU before its products: rows, positives and samples.

Pairs (sample, cluster) are sorted by cluster; all else are three small launches, however many pairs
there are. Nothing here depends on what the host would have to wait for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton import common

BLOCK = 128  # numbers of a program
PIECE = 16  # rows of a cluster that are listed together


@triton.jit
def find(values, length, wanted, STEPS: tl.constexpr):
    """Return where in sorted values the first stands that is not below each of wanted [N].

    STEPS: bits of the length.
    """
    low = tl.zeros_like(wanted)
    high = low + length
    for _ in range(STEPS):
        middle = (low + high) // 2
        open_ = low < high
        below = tl.load(values + middle, mask=open_, other=0) < wanted
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & ~below, middle, high)
    return low


@triton.jit
def _rows_of(cluster, is_cluster, row_ptr, n, cluster_rows):
    """Return where the rows of some clusters begin and end; 0 and 0 where is_cluster is false."""
    begin = tl.minimum(tl.load(row_ptr + cluster, mask=is_cluster, other=0), n)
    end = tl.minimum(tl.load(row_ptr + cluster + 1, mask=is_cluster, other=0), n)
    # A larger cluster, unchecked here, must not be written past its place.
    return begin, tl.minimum(end, begin + cluster_rows)


@triton.jit
def _find_rows(
    clusters,
    row_ptr,
    pos_row,
    edge,
    pos_edge,
    pairs,
    positives,
    n,
    cluster_rows,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write where the rows and the positives of each pair begin and end, int64 [pairs, 2]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < pairs
    cluster = tl.load(clusters + at, mask=real, other=-1)
    begin, end = _rows_of(cluster, cluster >= 0, row_ptr, n, cluster_rows)
    tl.store(edge + 2 * at, begin, mask=real)
    tl.store(edge + 2 * at + 1, end, mask=real)
    tl.store(pos_edge + 2 * at, find(pos_row, positives, begin, STEPS), mask=real)
    tl.store(pos_edge + 2 * at + 1, find(pos_row, positives, end, STEPS), mask=real)


@triton.jit
def _count_rows(ids, order, edge, sizes, pairs, BLOCK: tl.constexpr):
    """Write the rows of each cluster at the first of its pairs, and 0 at the others.

    ids int64 [pairs]: the clusters, sorted; order: the pairs that they belong to.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < pairs
    first = tl.load(ids + at, mask=real, other=0) != tl.load(
        ids + at - 1, mask=real & (at > 0), other=-2
    )
    pair = tl.load(order + at, mask=real & first, other=0)
    begin = tl.load(edge + 2 * pair, mask=real & first, other=0)
    end = tl.load(edge + 2 * pair + 1, mask=real & first, other=0)
    tl.store(sizes + at, end - begin, mask=real)


@triton.jit
def _list_rows(
    ids,
    order,
    edge,
    ends,
    samples,
    counts,
    begins,
    places,
    owner,
    pairs,
    chosen,
    cluster_rows,
    STEPS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the list of selected rows, each once, and for the first pair of a cluster what it has.

    ends int64 [pairs]: where in the list the rows of a pair end. owner int32: of each row of the
    list the first pair of its cluster, as a place in the sorted ones. For these: counts int32, the
    pairs of the cluster; begins int64, its first row; places int64, where the list has it.
    samples int32 [pairs], for all: the samples of the sorted pairs.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < pairs
    pair = tl.load(order + at, mask=real, other=0)
    tl.store(samples + at, (pair // chosen).to(tl.int32), mask=real)
    cluster = tl.load(ids + at, mask=real, other=0)
    first = real & (cluster != tl.load(ids + at - 1, mask=real & (at > 0), other=-2))
    begin = tl.load(edge + 2 * pair, mask=first, other=0)
    size = tl.load(edge + 2 * pair + 1, mask=first, other=0) - begin
    place = tl.load(ends + at, mask=first, other=0) - size
    tl.store(counts + at, (find(ids, pairs, cluster + 1, STEPS) - at).to(tl.int32), mask=first)
    tl.store(begins + at, begin, mask=first)
    tl.store(places + at, place, mask=first)
    for start in range(0, cluster_rows, PIECE):
        row = start + tl.arange(0, PIECE)
        listed = place[:, None] + row[None, :]
        of = at[:, None] + tl.zeros((1, PIECE), dtype=tl.int32)
        tl.store(owner + listed, of, mask=row[None, :] < size[:, None])


@triton.jit
def _find_tiles(
    ids,
    order,
    row_ptr,
    pos_row,
    samples,
    group,
    edge,
    pos_edge,
    pairs,
    positives,
    count,
    n,
    cluster_rows,
    tiles,
    chosen,
    BR: tl.constexpr,
    PAIR_STEPS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what the programs of a step by tiles look up; see `_step_tiles`.

    ids and order as in `_count_rows`; count: of clusters.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(order + at, mask=at < pairs, other=0)
    tl.store(samples + at, (pair // chosen).to(tl.int32), mask=at < pairs)
    cluster, tile = at // (tiles + 1), at % (tiles + 1)
    first = find(ids, pairs, cluster, PAIR_STEPS)
    tl.store(group + cluster, first, mask=(cluster <= count) & (tile == 0))
    chosen_by_some = first < find(ids, pairs, cluster + 1, PAIR_STEPS)
    real = cluster < count
    begin, end = _rows_of(cluster, real & chosen_by_some, row_ptr, n, cluster_rows)
    row = tl.minimum(begin + BR * tile, end)
    tl.store(edge + at, row, mask=real)
    tl.store(pos_edge + at, find(pos_row, positives, row, STEPS), mask=real)


def find_rows(
    clusters: Tensor, row_ptr: Tensor, pos_row: Tensor, n: int, cluster_rows: int
) -> tuple[Tensor, Tensor]:
    """Return where the rows of each pair begin and end, and their positives: int64 [P, 2]."""
    pairs, positives = clusters.numel(), pos_row.shape[0]
    edge = torch.empty(pairs, 2, dtype=torch.int64, device=clusters.device)
    pos_edge = torch.empty_like(edge)
    _find_rows[(triton.cdiv(pairs, BLOCK),)](
        *(clusters, row_ptr, pos_row, edge, pos_edge, pairs, positives, n, cluster_rows),
        STEPS=positives.bit_length(),
        BLOCK=BLOCK,
        **common.LAUNCH,
    )
    return edge, pos_edge


def list_rows(
    clusters: Tensor, edge: Tensor, most: int, cluster_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """List the selected rows, each once; at most `most`.

    Returns:
        order, samples: of the pairs sorted by cluster, their numbers and samples.
        counts, begins, places, ends, owner: see `_list_rows`.
    """
    pairs, chosen = clusters.numel(), clusters.shape[1]
    ids, order = torch.sort(clusters.reshape(-1), stable=True)
    sizes, begins, places = (torch.empty_like(ids) for _ in range(3))
    samples, counts = (torch.empty_like(ids, dtype=torch.int32) for _ in range(2))
    owner = torch.empty(most, dtype=torch.int32, device=ids.device)
    grid = (triton.cdiv(pairs, BLOCK),)
    _count_rows[grid](ids, order, edge, sizes, pairs, BLOCK=BLOCK, **common.LAUNCH)
    ends = sizes.cumsum(0)
    _list_rows[grid](
        *(ids, order, edge, ends, samples, counts, begins, places, owner),
        *(pairs, chosen, cluster_rows),
        STEPS=pairs.bit_length(),
        PIECE=PIECE,
        BLOCK=BLOCK,
        **common.LAUNCH,
    )
    return order, samples, counts, begins, places, ends, owner


def find_tiles(
    clusters: Tensor,
    row_ptr: Tensor,
    pos_row: Tensor,
    n: int,
    cluster_rows: int,
    side: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sort the pairs by cluster, and divide the clusters that have any into tiles of `side` rows.

    Returns:
        order, samples: of the sorted pairs, their numbers and samples.
        group: int64 [C + 1], where the pairs of each cluster begin.
        edge, pos_edge: int64 [C, tiles + 1], where the rows of its tiles begin, and their
            positives; the rows of a cluster without pairs are none.
    """
    pairs, count, positives = clusters.numel(), row_ptr.shape[0] - 1, pos_row.shape[0]
    tiles = triton.cdiv(cluster_rows, side)
    ids, order = torch.sort(clusters.reshape(-1), stable=True)
    samples = torch.empty_like(ids, dtype=torch.int32)
    group = torch.empty(count + 1, dtype=torch.int64, device=ids.device)
    edge = torch.empty(count, tiles + 1, dtype=torch.int64, device=ids.device)
    pos_edge = torch.empty_like(edge)
    cells = max(pairs, count * (tiles + 1) + 1)
    _find_tiles[(triton.cdiv(cells, BLOCK),)](
        *(ids, order, row_ptr, pos_row, samples, group, edge, pos_edge),
        *(pairs, positives, count, n, cluster_rows, tiles, clusters.shape[1]),
        BR=side,
        PAIR_STEPS=pairs.bit_length(),
        STEPS=positives.bit_length(),
        BLOCK=BLOCK,
        **common.LAUNCH,
    )
    return order, samples, group, edge, pos_edge
