"""`cluster_step_` on the GPU where a cluster has few samples: no tensor cores.

On the lowest level of a cascade most selected clusters belong to one sample of the batch. A product
of tensor cores would multiply padding there. Two kernels do without: the first scores a sample's
candidates and sums their shares of dx, the second updates the selected rows, which stand in one
list without gaps. In both a tile has rows of several clusters. The weights change only when all
shares of dx are formed. Every sum has an order that the shapes fix; there are no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton import common
from xmlkernels.triton.cluster_lists import find_rows, list_rows
from xmlkernels.triton.hyper import BETA2, DECAY, DX_SCALE, LR, SCALE
from xmlkernels.triton.update import load_numbers, update_tile

FEW = 4  # pairs that a cluster has on average, at most
SPAN = 4  # tiles of a sample's candidates that one program scores
ROWS = 16  # rows of a tile
APART = tl.constexpr(4)  # sums of a tile's rows in turn, one per warp
HELD, HELD_BYTES = 768, 1536  # columns of a row, and its bytes, that registers hold, at most
SCORED, UPDATED = 256, 64  # columns of a tile, at most
# Registers of a thread of the update, at most, of tables below fp32 and in it. Said by name, they
# are reached without spilling; left to itself, the compiler spills to have fewer.
REGISTERS, REGISTERS_FP32 = 96, 128


@triton.jit
def _number(w):
    """Return loaded numbers of a table in fp32; e4m3 (uint8 bits) without its row's scale."""
    return common.decode_e4m3(w) if w.dtype == tl.uint8 else common.widen(w)


@triton.jit
def _targets(row, sample, first, count, is_row, pos_row, pos_sample, pos_value, S: tl.constexpr):
    """Return the targets [S] of some rows and one sample; their pairs' positives begin at first."""
    y = tl.zeros((S,), dtype=tl.float32)
    for p in range(tl.max(count)):
        real = is_row & (p < count)
        value = 1.0
        if pos_value is not None:
            value = tl.load(pos_value + first + p, mask=real, other=0.0)
        hit = tl.load(pos_row + first + p, mask=real, other=-1) == row
        hit = hit & (tl.load(pos_sample + first + p, mask=real, other=-1) == sample)
        y = tl.where(hit, value, y)
    return y


@triton.jit
def _score_slots(
    weight,
    x,
    bias,
    row_scale,
    scores,
    gradient,
    rows,
    shares,
    parts,
    losses,
    flag,
    edge,
    pos_edge,
    pos_row,
    pos_sample,
    pos_value,
    hyper,
    chosen,
    spans,
    first_column,
    last_column,
    M: tl.constexpr,
    D: tl.constexpr,
    SCORE: tl.constexpr,
    HOLD: tl.constexpr,
    NEED_LOSS: tl.constexpr,
    SPAN: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Score SPAN tiles of a sample's candidates (SCORE), and sum their shares of dx.

    HOLD: all columns are summed while the weights that were scored are in registers; else they are
    read again. edge int64 [pairs, 2]: a pair's rows; pos_edge the same: their positives. gradient
    fp32 [pairs, M], of the logits. rows int64 [B, spans, SPAN * BR]: the candidates' rows, -1 where
    there is none; shares fp32 alike: their targets, then their factors in dx. parts fp32 [B, spans,
    last_column - first_column]. losses fp32 [B, spans].
    """
    sample = (tl.program_id(0) // spans).to(tl.int64)
    span = tl.program_id(0) % spans
    column = tl.arange(0, BD)
    listed = tl.program_id(0).to(tl.int64) * (SPAN * BR)
    out = parts + tl.program_id(0).to(tl.int64) * (last_column - first_column) + column
    if tl.load(flag) == 0:
        if SCORE:
            # What belongs to a candidate alone, for all tiles at once: a thread has one or two, and
            # not those of its rows in a tile.
            slot = span * (SPAN * BR) + tl.arange(0, SPAN * BR)
            which = slot // M  # M is known to the compiler: no division is left
            pair = sample * chosen + which
            inside = slot < chosen * M
            row = tl.load(edge + 2 * pair, mask=inside, other=0) + (slot - which * M)
            is_row = inside & (row < tl.load(edge + 2 * pair + 1, mask=inside, other=0))
            first = tl.load(pos_edge + 2 * pair, mask=is_row, other=0)
            last = tl.load(pos_edge + 2 * pair + 1, mask=is_row, other=0)
            count = (last - first).to(tl.int32)
            y = _targets(
                row, sample, first, count, is_row, pos_row, pos_sample, pos_value, SPAN * BR
            )
            here = listed + tl.arange(0, SPAN * BR)
            tl.store(rows + here, tl.where(is_row, row, -1))
            tl.store(shares + here, y)
            tl.debug_barrier()  # what all threads wrote is read by all
            scale = tl.load(hyper + SCALE)
            loss = tl.zeros((BR,), dtype=tl.float32)
            sums = ()  # type: tuple[tl.tensor, ...]
            if HOLD:
                for _ in tl.static_range(0, D, BD):
                    sums += (tl.zeros((APART, BD), dtype=tl.float32),)
            for tile in range(SPAN):
                at = listed + tile * BR + tl.arange(0, BR)
                tile_row = tl.load(rows + at)
                target = tl.load(shares + at)
                there = tile_row >= 0
                w_at = weight + (tile_row * D)[:, None]
                total = tl.zeros((BR, BD), dtype=tl.float32)
                held = ()  # type: tuple[tl.tensor, ...]
                for start in tl.static_range(0, D, BD):
                    e_at = x + sample * D + start + column
                    if start + BD <= D:
                        e = tl.load(e_at)
                        mask = there[:, None]
                    else:
                        left = start + column < D
                        e = tl.load(e_at, mask=left, other=0.0)
                        mask = there[:, None] & left[None, :]
                    w = tl.load(w_at + start + column[None, :], mask=mask, other=0)
                    total += _number(w) * common.widen(e)[None, :]
                    if HOLD:
                        held += (w,)
                z = tl.sum(total, axis=1)
                unit = 1.0
                if row_scale is not None:
                    unit = tl.load(row_scale + 2 * tile_row, mask=there, other=1.0)
                    z *= unit
                if bias is not None:
                    z += tl.load(bias + tile_row, mask=there, other=0.0)
                sigma, tail = common.sigmoid_and_tail(z)
                g = tl.where(there, scale * (sigma - target), 0.0)
                place = (span * SPAN + tile) * BR + tl.arange(0, BR)
                of_pairs = sample * chosen * M + place
                scored = tl.where(there, z, float("-inf"))
                tl.store(scores + of_pairs, scored, mask=place < chosen * M)
                tl.store(gradient + of_pairs, g, mask=there)
                if NEED_LOSS:
                    loss += tl.where(there, common.softplus(z, tail) - target * z, 0.0)
                g *= unit
                if HOLD:
                    new = ()  # type: tuple[tl.tensor, ...]
                    for i in tl.static_range(0, (D + BD - 1) // BD):
                        product = tl.reshape(
                            g[:, None] * _number(held[i]), [BR // APART, APART, BD]
                        )
                        new += (sums[i] + tl.sum(product, axis=0),)
                    sums = new
                else:
                    tl.debug_barrier()  # all threads have the targets
                    tl.store(shares + at, g)
            if NEED_LOSS:
                tl.store(losses + tl.program_id(0), scale * tl.sum(loss, axis=0))
            if HOLD:
                for i in tl.static_range(0, (D + BD - 1) // BD):
                    tl.store(out + i * BD, tl.sum(sums[i], axis=0), mask=i * BD + column < D)
            else:
                tl.debug_barrier()  # and the shares
        if not HOLD:
            for start in range(first_column, last_column, BD):
                left = start + column < D
                total = tl.zeros((BR, BD), dtype=tl.float32)
                for tile in range(SPAN):
                    at = listed + tile * BR + tl.arange(0, BR)
                    tile_row = tl.load(rows + at)
                    mask = (tile_row >= 0)[:, None]
                    if D % BD != 0:
                        mask = mask & left[None, :]
                    w_at = weight + (tile_row * D + start)[:, None] + column[None, :]
                    w = _number(tl.load(w_at, mask=mask, other=0))
                    total += tl.load(shares + at)[:, None] * w
                tl.store(out + start - first_column, tl.sum(total, axis=0), mask=left)
    elif SCORE:
        slot = span * (SPAN * BR) + tl.arange(0, SPAN * BR)
        nothing = tl.full((SPAN * BR,), float("nan"), tl.float32)
        tl.store(scores + sample * chosen * M + slot, nothing, mask=slot < chosen * M)
        if NEED_LOSS:
            tl.store(losses + tl.program_id(0), float("nan"))


@triton.jit
def _sum_spans(
    parts,
    hyper,
    flag,
    dx,
    spans,
    first_column,
    last_column,
    D: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
):
    """Write BD columns of one sample's dx: the sum of its spans' shares, in order."""
    width = last_column - first_column
    blocks = tl.cdiv(width, BD)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    offset = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    left = first_column + offset < D
    total = tl.zeros((BS, BD), dtype=tl.float32)
    for first in range(0, spans, BS):
        at = first + tl.arange(0, BS)
        share_at = (sample * spans + at)[:, None] * width + offset[None, :]
        total += tl.load(parts + share_at, mask=(at < spans)[:, None] & left[None, :], other=0.0)
    out = tl.load(hyper + DX_SCALE) * tl.sum(total, axis=0)
    out = tl.where(tl.load(flag) == 0, out, float("nan"))
    tl.store(dx + sample * D + first_column + offset, out, mask=left)


@triton.jit
def _pair(
    x,
    gradient,
    order,
    samples,
    is_row,
    place,
    first_pair,
    count,
    p,
    cluster_rows,
    D: tl.constexpr,
):
    """Return where in x the sample of pair p of some rows stands, and its logit's gradient.

    Where a row has no such pair: its first sample, and 0.
    """
    real = is_row & (p < count)
    at = first_pair + tl.where(real, p, 0)
    pair = tl.load(order + at, mask=is_row, other=0)
    sample = tl.load(samples + at, mask=is_row, other=0)
    g = tl.load(gradient + pair * cluster_rows + place, mask=real, other=0.0)
    return x + sample.to(tl.int64) * D, g


@triton.jit
def _gradient(
    x,
    gradient,
    order,
    samples,
    is_row,
    place,
    first_pair,
    count,
    most,
    sample0,
    g0,
    sample1,
    g1,
    column,
    cluster_rows,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """Return the gradient of some rows [BR, BD], summed over the pairs of each.

    The first two pairs of each row, more than most have, are those of `_pair`.
    """
    at0, at1 = sample0[:, None] + column[None, :], sample1[:, None] + column[None, :]
    if D % BD == 0:
        e0, e1 = tl.load(at0), tl.load(at1)
    else:
        left = (column < D)[None, :]
        e0, e1 = tl.load(at0, mask=left, other=0.0), tl.load(at1, mask=left, other=0.0)
    grad = g0[:, None] * common.widen(e0) + g1[:, None] * common.widen(e1)
    if most > 2:
        for p in range(2, most):
            real = is_row & (p < count)
            pair = tl.load(order + first_pair + p, mask=real, other=0)
            sample = tl.load(samples + first_pair + p, mask=real, other=0)
            g = tl.load(gradient + pair * cluster_rows + place, mask=real, other=0.0)
            at = x + sample.to(tl.int64)[:, None] * D + column[None, :]
            if D % BD == 0:
                e = tl.load(at, mask=real[:, None], other=0.0)
            else:
                e = tl.load(at, mask=real[:, None] & left, other=0.0)
            grad += g[:, None] * common.widen(e)
    return grad


@triton.jit
def _update_list(
    weight,
    x,
    bias,
    momentum,
    second,
    kahan,
    row_scale,
    gradient,
    flag,
    order,
    samples,
    counts,
    begins,
    places,
    ends,
    owner,
    hyper,
    counter,
    correction,
    row_offset,
    cluster_rows,
    pairs,
    D: tl.constexpr,
    ROW_WISE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    EMULATED: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Update BR of the selected rows, all their columns.

    order to owner: see `cluster_lists.list_rows`.
    """
    at = tl.program_id(0) * BR + tl.arange(0, BR)
    size = tl.load(ends + pairs - 1)
    if (tl.program_id(0) * BR < size) & (tl.load(flag) == 0):
        is_row = at < size
        first_pair = tl.load(owner + at, mask=is_row, other=0)
        place = at - tl.load(places + first_pair, mask=is_row, other=0)
        row = tl.load(begins + first_pair, mask=is_row, other=0) + place
        count = tl.load(counts + first_pair, mask=is_row, other=0)
        most = tl.max(count)
        sample0, g0 = _pair(
            x, gradient, order, samples, is_row, place, first_pair, count, 0, cluster_rows, D
        )
        sample1, g1 = _pair(
            x, gradient, order, samples, is_row, place, first_pair, count, 1, cluster_rows, D
        )
        if bias is not None:
            total = g0 + g1
            for p in range(2, most):
                real = is_row & (p < count)
                pair = tl.load(order + first_pair + p, mask=real, other=0)
                total += tl.load(gradient + pair * cluster_rows + place, mask=real, other=0.0)
            moved = tl.load(bias + row, mask=is_row, other=0.0) - tl.load(hyper + LR) * total
            tl.store(bias + row, common.round_nearest(moved, tl.float32, EMULATED), mask=is_row)
        scale_at = None if row_scale is None else row_scale + 2 * row
        # Where each row begins: addresses in the loops are one addition.
        row_at = row[:, None] * D
        w_at = weight + row_at
        m_at = None if momentum is None else momentum + row_at
        v_at = second if ROW_WISE or second is None else second + row_at
        k_at = None if kahan is None else kahan + row_at
        numbers = load_numbers(hyper, counter, correction)
        row_moment = None
        if ROW_WISE:
            unit = None if row_scale is None else tl.load(scale_at, mask=is_row, other=1.0)
            decay = tl.load(hyper + DECAY)
            squares = tl.zeros((BR,), dtype=tl.float32)
            for start in range(0, D, BD):
                column = start + tl.arange(0, BD)
                here = column[None, :]
                mask = is_row[:, None] & (column < D)[None, :]
                grad = _gradient(
                    x,
                    gradient,
                    order,
                    samples,
                    is_row,
                    place,
                    first_pair,
                    count,
                    most,
                    sample0,
                    g0,
                    sample1,
                    g1,
                    column,
                    cluster_rows,
                    D,
                    BD,
                )
                if not DECOUPLED:
                    full = _number(tl.load(w_at + here, mask=mask, other=0))
                    if unit is not None:
                        full *= unit[:, None]
                    if kahan is not None:
                        full += common.widen(tl.load(k_at + here, mask=mask, other=0.0))
                    grad += decay * full
                squares += tl.sum(tl.where(mask, grad * grad, 0.0), axis=1)
            beta2 = tl.load(hyper + BETA2)
            old = common.widen(tl.load(second + row, mask=is_row, other=0.0))
            row_moment = beta2 * old + (1.0 - beta2) * (squares / D)
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
            tl.debug_barrier()  # every warp has read the old values, of rows and of moments
            eighth = tl.arange(0, 8)[None, :]
            one = is_row[:, None] & (eighth == 0)
            tl.store(second + row[:, None] + eighth, stored, mask=one)
        for start in range(0, D, BD):
            column = start + tl.arange(0, BD)
            mask = is_row[:, None] if D % BD == 0 else is_row[:, None] & (column < D)[None, :]
            grad = _gradient(
                x,
                gradient,
                order,
                samples,
                is_row,
                place,
                first_pair,
                count,
                most,
                sample0,
                g0,
                sample1,
                g1,
                column,
                cluster_rows,
                D,
                BD,
            )
            update_tile(
                w_at,
                m_at,
                v_at,
                k_at,
                scale_at,
                hyper,
                counter,
                correction,
                column[None, :],
                mask,
                is_row,
                grad,
                row + row_offset,
                start,
                BD,
                DECOUPLED,
                EMULATED,
                row_moment,
                numbers=numbers,
            )


def columns_of(width: int, most: int) -> int:
    """Return the columns of a tile: where it can be, a power of 2 that divides a row."""
    divisor = min(width & -width, most)
    return divisor if divisor >= min(64, most) else common.power_of_2(width, 16, most)


def holds(width: int, element: int) -> bool:
    """Return whether registers hold a tile of rows: of so many columns, so many bytes each."""
    return width <= HELD and width * element <= HELD_BYTES


def spans_of(chosen: int, cluster_rows: int) -> int:
    """Return into how many parts a sample's candidates are divided."""
    return triton.cdiv(chosen * cluster_rows, SPAN * ROWS)


def step_pairs_(
    weight: Tensor,
    x: Tensor,
    clusters: Tensor,
    row_ptr: Tensor,
    n: int,
    positives: tuple[Tensor, Tensor, Tensor | None],
    hyper: Tensor,
    counter: Tensor,
    states: dict[str, Tensor | None],
    *,
    flag: Tensor,
    scores: Tensor,
    dx: Tensor,
    correction: Tensor | None,
    pieces: list[tuple[int, int]],
    row_offset: int,
    decoupled: bool,
    need_loss: bool,
) -> Tensor:
    """Do the step; all of `scores` and `dx` is written, and the loss's summands are returned.

    weight: as kernels take it. x: checked, see flag. states: bias, momentum, second, kahan and
    row_scale. pieces: first column and end of columns whose shares of dx are held at a time.
    """
    batch, chosen, cluster_rows = scores.shape
    width, spans = x.shape[1], spans_of(chosen, cluster_rows)
    pos_row, pos_sample, pos_value = positives
    bias, row_scale, second = states["bias"], states["row_scale"], states["second"]
    gradient = torch.empty(batch * chosen, cluster_rows, dtype=torch.float32, device=x.device)
    shares = torch.empty(batch * spans * SPAN * ROWS, dtype=torch.float32, device=x.device)
    rows = torch.empty(shares.shape, dtype=torch.int64, device=x.device)
    losses = torch.empty(batch * spans if need_loss else 1, dtype=torch.float32, device=x.device)
    columns = max(last - first for first, last in pieces)
    parts = torch.empty(batch * spans * columns, dtype=torch.float32, device=x.device)
    edge, pos_edge = find_rows(clusters, row_ptr, pos_row, n, cluster_rows)
    block = columns_of(width, SCORED)
    for first, last in pieces:
        _score_slots[(batch * spans,)](
            *(weight, x, bias, row_scale, scores, gradient, rows, shares, parts, losses, flag),
            *(edge, pos_edge, pos_row, pos_sample, pos_value, hyper, chosen, spans, first, last),
            M=cluster_rows,
            D=width,
            SCORE=first == 0,
            HOLD=len(pieces) == 1 and holds(width, weight.element_size()),
            NEED_LOSS=need_loss,
            SPAN=SPAN,
            BR=ROWS,
            BD=block,
            **common.LAUNCH,
        )
        _sum_spans[(batch * triton.cdiv(last - first, 64),)](
            *(parts, hyper, flag, dx, spans, first, last), D=width, BS=16, BD=64, **common.LAUNCH
        )
    tiles = triton.cdiv(min(n, batch * chosen * cluster_rows), ROWS)
    lists = list_rows(clusters, edge, tiles * ROWS, cluster_rows)
    _update_list[(tiles,)](
        *(weight, x, bias, states["momentum"], second, states["kahan"], row_scale, gradient, flag),
        *lists,
        *(hyper, counter, correction, row_offset, cluster_rows, batch * chosen),
        D=width,
        ROW_WISE=second is not None and second.dim() == 1,
        DECOUPLED=decoupled,
        EMULATED=common.emulated(),
        BR=ROWS,
        BD=columns_of(width, UPDATED),
        maxnreg=REGISTERS_FP32 if weight.dtype == torch.float32 else REGISTERS,
        **common.LAUNCH,
    )
    return losses
