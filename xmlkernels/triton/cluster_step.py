"""`cluster_step_` on the GPU: one program per tile of rows of each selected cluster.

Pairs (sample, cluster) are sorted by cluster on the device. A program scores its rows for all their
samples, keeps the gradient of the logits in a workspace, and then goes over the columns: the rows'
share of dx, the rows' own gradient, the update, the store. A row comes from memory once (the second
look finds it in the cache of the same multiprocessor) and has one owner. The shares of dx lie apart
for each (sample, cluster, tile) and are summed afterwards in the order of a sample's clusters, so
that every sum has the same order in every run, without atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton import common
from xmlkernels.triton.cluster_lists import find_tiles
from xmlkernels.triton.cluster_pairs import FEW, SCORED, columns_of, spans_of, step_pairs_
from xmlkernels.triton.hyper import BETA2, DECAY, DX_SCALE, LR, SCALE
from xmlkernels.triton.update import bias_corrections, update_tile

# Shares of dx held at a time; beyond that, columns and then tiles of rows are taken in turn.
PART_BYTES = 192 << 20
# Rows, pairs and columns of a tile, at most. Gradients of fp16 tables are multiplied in fp32, too:
# fp16 has no room for small ones.
MOST, MOST_FP32 = (64, 32, 64), (32, 16, 32)
# Registers of a thread, at most: said by name, it is reached without spilling. A third stage of
# loads has no room in them on every card.
REGISTERS, REGISTERS_FP32, STAGES_FP32 = 248, 168, 2
SUMMANDS = 8  # shares of dx that are loaded together


@triton.jit
def _score(
    weight,
    x,
    bias,
    unit,
    scores,
    gradient,
    order,
    samples,
    pos_row,
    pos_sample,
    pos_value,
    scale,
    row,
    is_row,
    place,
    first_pair,
    last_pair,
    first_pos,
    last_pos,
    cluster_rows,
    D: tl.constexpr,
    NEED_LOSS: tl.constexpr,
    EMULATED: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    """Score a tile of rows for all its pairs and form the gradient of the logits.

    Returns the sums of the gradient [BR] and of the loss. place: int32 [BR], number of each row in
    its cluster; unit: fp32 [BR], scales (e4m3 tables).
    """
    column = tl.arange(0, BD)
    total_g = tl.zeros((BR,), dtype=tl.float32)
    loss = tl.zeros((BR,), dtype=tl.float32)
    for first in range(first_pair, last_pair, BP):
        at = first + tl.arange(0, BP)
        is_pair = at < last_pair
        pair = tl.load(order + at, mask=is_pair, other=0)
        sample = tl.load(samples + at, mask=is_pair, other=0).to(tl.int64)
        z = tl.zeros((BR, BP), dtype=tl.float32)
        for start in range(0, D, BD):
            left = column < D - start
            w = tl.load(
                weight + row[:, None] * D + start + column[None, :],
                mask=is_row[:, None] & left[None, :],
                other=0,
            )
            x_at = x + sample[None, :] * D + start + column[:, None]
            e = tl.load(x_at, mask=is_pair[None, :] & left[:, None], other=0.0)
            w = common.operand(w, e.dtype, EMULATED)
            z = common.dot(w if w.dtype == e.dtype else common.widen(w), e, z, EMULATED)
        if unit is not None:
            z *= unit[:, None]
        if bias is not None:
            z += tl.load(bias + row, mask=is_row, other=0.0)[:, None]
        y = tl.zeros((BR, BP), dtype=tl.float32)
        for p in range(first_pos, last_pos):
            value = 1.0
            if pos_value is not None:
                value = tl.load(pos_value + p)
            hit = (row == tl.load(pos_row + p))[:, None] & (sample == tl.load(pos_sample + p))[
                None, :
            ]
            y = tl.where(hit, value, y)
        real = is_row[:, None] & is_pair[None, :]
        tl.store(scores + pair[None, :] * cluster_rows + place[:, None], z, mask=real)
        sigma, tail = common.sigmoid_and_tail(z)
        g = tl.where(real, scale * (sigma - y), 0.0)
        tl.store(gradient + at[None, :] * cluster_rows + place[:, None], g, mask=real)
        total_g += tl.sum(g, axis=1)
        if NEED_LOSS:
            loss += tl.sum(tl.where(real, common.softplus(z, tail) - y * z, 0.0), axis=1)
    return total_g, tl.sum(loss, axis=0)


@triton.jit
def _products(
    x,
    gradient,
    order,
    samples,
    parts,
    w,
    column,
    is_row,
    place,
    first_pair,
    last_pair,
    cluster_rows,
    part_at,
    part_stride,
    D: tl.constexpr,
    WRITE: tl.constexpr,
    LOW: tl.constexpr,
    EMULATED: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    """Return the gradient [BR, BD] of a tile; WRITE: store the tile's shares of dx, too."""
    grad = tl.zeros((BR, BD), dtype=tl.float32)
    left = column < D
    for first in range(first_pair, last_pair, BP):
        at = first + tl.arange(0, BP)
        is_pair = at < last_pair
        pair = tl.load(order + at, mask=is_pair, other=0)
        sample = tl.load(samples + at, mask=is_pair, other=0).to(tl.int64)
        real = is_row[:, None] & is_pair[None, :]
        g = tl.load(gradient + at[None, :] * cluster_rows + place[:, None], mask=real, other=0.0)
        e = tl.load(
            x + sample[:, None] * D + column[None, :],
            mask=is_pair[:, None] & left[None, :],
            other=0.0,
        )
        if LOW:
            g = common.round_nearest(g, e.dtype, EMULATED)
        else:
            e = common.widen(e)
        grad = common.dot(g, e, grad, EMULATED)
        if WRITE:
            share = common.dot(tl.trans(g), w, tl.zeros((BP, BD), dtype=tl.float32), EMULATED)
            share_at = parts + pair[:, None] * part_stride + (part_at + tl.arange(0, BD))[None, :]
            tl.store(share_at, share, mask=is_pair[:, None] & left[None, :])
    return grad


@triton.jit
def _step_tiles(
    weight,
    x,
    bias,
    momentum,
    second,
    kahan,
    row_scale,
    moment,
    scores,
    gradient,
    parts,
    losses,
    flag,
    order,
    samples,
    group,
    edge,
    pos_edge,
    pos_row,
    pos_sample,
    pos_value,
    hyper,
    counter,
    correction,
    row_offset,
    cluster_rows,
    tiles,
    first_tile,
    part_tiles,
    first_column,
    last_column,
    D: tl.constexpr,
    ROW_WISE: tl.constexpr,
    SCORE: tl.constexpr,
    NEED_LOSS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    LOW: tl.constexpr,
    EMULATED: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    """Score one tile of rows of one group of pairs (SCORE), then update columns first..last.

    A group is the pairs of one cluster. order, samples, group, edge and pos_edge: see
    `cluster_lists.find_tiles`. parts fp32 [pairs, part_tiles, last_column - first_column]. moment
    fp32 [C, tiles, BR].
    """
    g = (tl.program_id(0) // part_tiles).to(tl.int64)
    part = tl.program_id(0) % part_tiles
    tile = first_tile + part
    cell = g * (tiles + 1) + tile
    begin, end = tl.load(edge + cell), tl.load(edge + cell + 1)
    if (begin < end) & (tl.load(flag) == 0):
        row = begin + tl.arange(0, BR)
        is_row = row < end
        place = tile * BR + tl.arange(0, BR)
        first_pair, last_pair = tl.load(group + g), tl.load(group + g + 1)
        lr, decay = tl.load(hyper + LR), tl.load(hyper + DECAY)
        width = last_column - first_column
        scale_at = None if row_scale is None else row_scale + 2 * row
        unit = None if row_scale is None else tl.load(scale_at, mask=is_row, other=1.0)
        if SCORE:
            total_g, loss = _score(
                weight,
                x,
                bias,
                unit,
                scores,
                gradient,
                order,
                samples,
                pos_row,
                pos_sample,
                pos_value,
                tl.load(hyper + SCALE),
                row,
                is_row,
                place,
                first_pair,
                last_pair,
                tl.load(pos_edge + cell),
                tl.load(pos_edge + cell + 1),
                cluster_rows,
                D,
                NEED_LOSS,
                EMULATED,
                BR,
                BP,
                BD,
            )
            if NEED_LOSS:
                tl.store(losses + g * tiles + tile, loss)
            # The gradients that all threads wrote are read by all; all have read the bias.
            tl.debug_barrier()
            if bias is not None:
                moved = tl.load(bias + row, mask=is_row, other=0.0) - lr * total_g
                tl.store(bias + row, common.round_nearest(moved, tl.float32, EMULATED), mask=is_row)
        row_moment = tl.zeros((BR,), dtype=tl.float32)
        if ROW_WISE:
            moment_at = moment + (g * tiles + tile) * BR + tl.arange(0, BR)
            if SCORE:
                for start in range(0, D, BD):
                    column = start + tl.arange(0, BD)
                    at = row[:, None] * D + column[None, :]
                    mask = is_row[:, None] & (column < D)[None, :]
                    grad = _products(
                        x,
                        gradient,
                        order,
                        samples,
                        parts,
                        None,
                        column,
                        is_row,
                        place,
                        first_pair,
                        last_pair,
                        cluster_rows,
                        0,
                        0,
                        D,
                        False,
                        LOW,
                        EMULATED,
                        BR,
                        BP,
                        BD,
                    )
                    if not DECOUPLED:
                        full = tl.load(weight + at, mask=mask, other=0)
                        full = common.widen(common.scaled(full, unit, x.dtype.element_ty, EMULATED))
                        if kahan is not None:
                            full += common.widen(tl.load(kahan + at, mask=mask, other=0.0))
                        grad += decay * full
                    row_moment += tl.sum(tl.where(mask, grad * grad, 0.0), axis=1)
                beta2 = tl.load(hyper + BETA2)
                old = common.widen(tl.load(second + row, mask=is_row, other=0.0))
                row_moment = beta2 * old + (1.0 - beta2) * (row_moment / D)
                # A row has one value, in column 0 of the draw.
                wide = row_moment[:, None] + tl.zeros((BR, 8), dtype=tl.float32)
                stored = common.to_stored(
                    wide,
                    tl.load(counter),
                    tl.load(counter + 1),
                    row + row_offset,
                    0,
                    8,
                    common.SECOND,
                    second.dtype.element_ty,
                )
                tl.debug_barrier()  # every warp has read the old value
                eighth = tl.arange(0, 8)[None, :]
                tl.store(
                    second + row[:, None] + eighth, stored, mask=is_row[:, None] & (eighth == 0)
                )
                tl.store(moment_at, row_moment)
            else:
                row_moment = tl.load(moment_at)
        for start in range(first_column, last_column, BD):
            column = start + tl.arange(0, BD)
            at = row[:, None] * D + column[None, :]
            mask = is_row[:, None] & (column < D)[None, :]
            w = common.scaled(
                tl.load(weight + at, mask=mask, other=0), unit, x.dtype.element_ty, EMULATED
            )
            grad = _products(
                x,
                gradient,
                order,
                samples,
                parts,
                w if LOW else common.widen(w),
                column,
                is_row,
                place,
                first_pair,
                last_pair,
                cluster_rows,
                part * width + start - first_column,
                part_tiles * width,
                D,
                True,
                LOW,
                EMULATED,
                BR,
                BP,
                BD,
            )
            # The weights were read in the layout of a product's operand; the update reads them in
            # its own and stores them.
            tl.debug_barrier()
            update_tile(
                weight,
                momentum,
                second,
                kahan,
                scale_at,
                hyper,
                counter,
                correction,
                at,
                mask,
                is_row,
                grad,
                row + row_offset,
                start,
                BD,
                DECOUPLED,
                EMULATED,
                row_moment if ROW_WISE else None,
            )


@triton.jit
def _sum_parts(
    parts,
    clusters,
    row_ptr,
    hyper,
    flag,
    dx,
    chosen,
    rows,
    first_tile,
    part_tiles,
    first_column,
    last_column,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    BR: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
):
    """Add the shares of one sample and BD columns to dx, in order of clusters and tiles."""
    width = last_column - first_column
    blocks = tl.cdiv(width, BD)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    offset = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    left = first_column + offset < D
    total = tl.zeros((BS, BD), dtype=tl.float32)
    for first in range(0, chosen * part_tiles, BS):
        at = first + tl.arange(0, BS)
        inside = at < chosen * part_tiles
        pair = sample * chosen + at // part_tiles
        cluster = tl.load(clusters + pair, mask=inside, other=-1)
        begin = tl.load(row_ptr + cluster, mask=cluster >= 0, other=0)
        end = tl.minimum(tl.load(row_ptr + cluster + 1, mask=cluster >= 0, other=0), rows)
        # The last tiles of a small cluster are not.
        written = begin + (first_tile + at % part_tiles).to(tl.int64) * BR < end
        share_at = (pair * part_tiles + at % part_tiles)[:, None] * width + offset[None, :]
        total += tl.load(parts + share_at, mask=written[:, None] & left[None, :], other=0.0)
    out = tl.load(hyper + DX_SCALE) * tl.sum(total, axis=0)
    dx_at = dx + sample * D + first_column + offset
    if not FIRST:
        out += tl.load(dx_at, mask=left, other=0.0)
    tl.store(dx_at, tl.where(tl.load(flag) == 0, out, float("nan")), mask=left)


def _sides(
    batch: int, chosen: int, count: int, cluster_rows: int, low: bool
) -> tuple[int, int, int]:
    """Return rows, pairs and columns of a tile, from the shapes alone.

    As many pairs as a cluster has on average.
    """
    rows, pairs, columns = MOST if low else MOST_FP32
    average = min(batch, triton.cdiv(batch * chosen, max(count, 1)))
    return common.power_of_2(cluster_rows, 16, rows), common.power_of_2(average, 16, pairs), columns


def pieces(pairs: int, tiles: int, width: int, block: int) -> list[tuple[int, int, int, int]]:
    """Return the tiles and columns whose shares of dx are held at a time, in order.

    Each piece: first tile, number of tiles, first column, end of columns.
    """
    most = max(1, PART_BYTES // (4 * pairs * block))  # tiles times blocks of columns
    blocks = triton.cdiv(width, block)
    columns = block * min(blocks, most)
    number = max(1, min(tiles, most // blocks))
    return [
        (tile, min(number, tiles - tile), column, min(column + columns, blocks * block))
        for tile in range(0, tiles, number)
        for column in range(0, width, columns)
    ]


def takes_pairs(batch: int, chosen: int, count: int) -> bool:
    """Return whether a step goes pair by pair: clusters have few on average, by shapes alone."""
    return batch * chosen <= FEW * count


def cluster_step_(
    weight: Tensor,
    x: Tensor,
    clusters: Tensor,
    row_ptr: Tensor,
    cluster_rows: int,
    pos_row: Tensor,
    pos_sample: Tensor,
    hyper: Tensor,
    counter: Tensor,
    *,
    pos_value: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: Tensor | None = None,
    second: Tensor | None = None,
    kahan: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_offset: int = 0,
    rows: int = -1,
    decoupled: bool = False,
    need_loss: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `xmlkernels.ops.cluster_step_`; a CUDA graph can capture it.

    Beyond its results it holds the gradients of the logits, as large as the scores, where it goes
    pair by pair lists of candidates and rows, about five times as large, and at most 192 MB of
    shares of dx (more only where one block of columns of all pairs is more: beyond 750,000 of
    them).
    """
    batch, chosen, width, count = x.shape[0], clusters.shape[1], x.shape[1], row_ptr.shape[0] - 1
    n = weight.shape[0] if rows < 0 else rows
    # e4m3 is exact in bf16, scales included.
    kind = torch.bfloat16 if row_scale is not None else weight.dtype
    same = kind in (torch.bfloat16, x.dtype)
    x, flag = common.prepare_batch(x, kind if same else torch.float32)
    weight = common.table_bits(weight)
    dx = torch.empty(batch, width, dtype=torch.float32, device=x.device)
    if min(batch, chosen, cluster_rows, count) == 0:
        nan = torch.where(flag == 0, 0.0, torch.nan)
        scores = (nan - torch.inf).expand(batch, chosen, cluster_rows).contiguous()
        return dx.copy_(nan.expand_as(dx)), scores, nan if need_loss else nan.new_empty(0)
    low = kind == torch.bfloat16
    correction = bias_corrections(hyper, counter) if second is not None else None
    if takes_pairs(batch, chosen, count):
        held = {"bias": bias, "momentum": momentum, "second": second, "kahan": kahan}
        spans, block = spans_of(chosen, cluster_rows), columns_of(width, SCORED)
        scores = dx.new_empty(batch, chosen, cluster_rows)
        losses = step_pairs_(
            *(weight, x, clusters, row_ptr, n, (pos_row, pos_sample, pos_value), hyper, counter),
            {**held, "row_scale": row_scale},
            flag=flag,
            scores=scores,
            dx=dx,
            correction=correction,
            pieces=[piece[2:] for piece in pieces(batch * spans, 1, width, block)],
            row_offset=row_offset,
            decoupled=decoupled,
            need_loss=need_loss,
        )
        return dx, scores, losses.sum().reshape(1) if need_loss else losses.new_empty(0)
    nan = torch.where(flag == 0, 0.0, torch.nan)
    scores = (nan - torch.inf).expand(batch, chosen, cluster_rows).contiguous()
    row_side, pair_side, block = _sides(batch, chosen, count, cluster_rows, low)
    tiles = triton.cdiv(cluster_rows, row_side)
    order, samples, group, edge, pos_edge = find_tiles(
        clusters, row_ptr, pos_row, n, cluster_rows, row_side
    )
    gradient = torch.empty(batch * chosen, cluster_rows, dtype=torch.float32, device=x.device)
    losses = torch.zeros(count * tiles if need_loss else 1, dtype=torch.float32, device=x.device)
    row_wise = second is not None and second.dim() == 1
    moments = count * tiles * row_side if row_wise else 0
    moment = torch.empty(moments, dtype=torch.float32, device=x.device)
    todo = pieces(batch * chosen, tiles, width, block)
    _, number, _, columns = todo[0]
    parts = torch.empty(batch * chosen * number * columns, dtype=torch.float32, device=x.device)
    states = momentum, second, kahan, row_scale, moment
    buffers = scores, gradient, parts, losses, flag
    pairs = order, samples, group, edge, pos_edge, pos_row, pos_sample, pos_value
    numbers = hyper, counter, correction, row_offset, cluster_rows, tiles
    blocks = {"D": width, "BR": row_side, "BD": block}
    kinds = {"ROW_WISE": row_wise, "NEED_LOSS": need_loss, "DECOUPLED": decoupled, "LOW": low}
    for piece in todo:
        tile, number, first, last = piece
        _step_tiles[(count * number,)](
            *(weight, x, bias, *states, *buffers, *pairs, *numbers, *piece),
            SCORE=first == 0,
            EMULATED=common.emulated(),
            BP=pair_side,
            num_warps=8 if row_side == 64 else 4,
            maxnreg=REGISTERS if low else REGISTERS_FP32,
            num_stages=3 if low else STAGES_FP32,
            **blocks,
            **kinds,
            **common.LAUNCH,
        )
        _sum_parts[(batch * triton.cdiv(last - first, block),)](
            *(parts, clusters, row_ptr, hyper, flag, dx, chosen, n, *piece),
            FIRST=tile == 0,
            BS=SUMMANDS,
            **blocks,
            **common.LAUNCH,
        )
    if not need_loss:
        return dx, scores, losses.new_empty(0)
    return dx, scores, hyper[SCALE.value] * losses.sum().reshape(1) + nan
