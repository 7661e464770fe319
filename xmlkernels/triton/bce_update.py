"""The update of rows from the gradient of their logits: what `bce_step_` does to a tile."""

import triton
import triton.language as tl

from xmlkernels.triton import common
from xmlkernels.triton.bce_tile import bias_gradient, load_tile, row_gradient
from xmlkernels.triton.hyper import DECAY, SCALE
from xmlkernels.triton.update import load_numbers, update_tile


@triton.jit
def apply_gradient(
    grad,
    loaded,
    trained,
    weight,
    column_sum,
    bias,
    momentum,
    second,
    kahan,
    row_scale,
    hyper,
    counter,
    correction,
    rows,
    first,
    local,
    chunk,
    D,
    row_offset,
    b_blocks,
    column,
    G_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DECOUPLED: tl.constexpr,
    TMA: tl.constexpr,
    EMULATED: tl.constexpr,
    UNROLL: tl.constexpr = False,
    numbers=None,
    scale=None,
):
    """Update some rows and columns from G x, and the rows' biases where trained is true.

    loaded: the weights as they were read. numbers, scale: None, or what a caller's loop has read of
    hyper before it began: what `load_numbers` returned, and the loss's scale.
    """
    if numbers is None:
        numbers, scale = load_numbers(hyper, counter, correction), tl.load(hyper + SCALE)
    lr = numbers[2]
    begin = tl.cast(first, tl.int64) + local
    lane, c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    real = begin + lane < rows
    if bias is not None:
        mask = real & trained & (column == 0)
        step = lr * (
            scale * bias_gradient(column_sum, local + lane, mask, chunk, b_blocks, BLOCK_R, UNROLL)
        )
        value = tl.load(bias + begin + lane, mask=mask, other=0.0) - step
        tl.store(bias + begin + lane, common.round_nearest(value, tl.float32, EMULATED), mask=mask)
    grad *= (1.0 / G_SCALE) * scale
    if row_scale is not None:
        scale_at = row_scale + 2 * (begin + lane)
        unit = tl.load(scale_at, mask=real, other=1.0)
        # Taken into G for the sake of dX.
        grad *= common.inverse(unit)[:, None]
    else:
        scale_at = None
    base = begin * D + column
    update_tile(
        weight if TMA else weight + base,
        momentum if momentum is None else momentum + base,
        second if second is None else second + base,
        kahan if kahan is None else kahan + base,
        scale_at,
        hyper,
        counter,
        correction,
        lane[:, None] * D + c[None, :],
        real[:, None] & (column + c < D)[None, :],
        real,
        grad,
        row_offset + begin + lane,
        column,
        BLOCK_D,
        DECOUPLED,
        EMULATED,
        loaded=loaded,
        place=begin.to(tl.int32) if TMA else None,
        numbers=numbers,
    )


@triton.jit
def update_rows(
    x,
    gradient,
    column_sum,
    weight,
    bias,
    momentum,
    second,
    kahan,
    row_scale,
    hyper,
    counter,
    correction,
    flag,
    quiet,
    batch,
    rows,
    first,
    chunk,
    D,
    row_offset,
    b_blocks,
    G_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    DECOUPLED: tl.constexpr,
    TMA: tl.constexpr,
    EMULATED: tl.constexpr,
    PARTS: tl.constexpr = 1,
):
    """Form the gradient G x of a tile of rows and columns, and update them in place.

    Nothing is written if flag is set. quiet: None, or int32 [groups of the chunk], 1 where the
    gradient is left out. PARTS: 1, a program for every tile; 4, each takes every n-th one, what
    descriptors load runs on from one to the next, and the quarters of its columns are updated one
    after the other, so that the registers suffice.
    """
    tl.static_assert(PARTS == 1 or (PARTS == 4 and TMA and quiet is None))
    d_blocks = tl.cdiv(D, BLOCK_D)
    begin, end, stride = tl.program_id(0), 0, tl.num_programs(0)
    if tl.load(flag) != 0:
        return
    trained = True
    if quiet is not None:
        idle = tl.load(quiet + begin // d_blocks * BLOCK_R // GROUP) != 0
        if momentum is None and kahan is None and tl.load(hyper + DECAY) == 0.0 and idle:
            return  # nothing would change
        batch = tl.where(idle, 0, batch)
        trained = idle == 0
    state = (weight, column_sum, bias, momentum, second, kahan, row_scale)
    numbers = (load_numbers(hyper, counter, correction), tl.load(hyper + SCALE))
    sizes = (batch, rows, first, chunk, D, row_offset, b_blocks)
    if PARTS > 1:
        tl.assume(batch > 0)
        end = tl.cdiv(tl.minimum(chunk, rows - first), BLOCK_R).to(tl.int32) * d_blocks
        for tile in tl.range(begin, end, stride, flatten=True):
            update_block(
                x,
                gradient,
                state,
                numbers,
                sizes,
                tile,
                trained,
                G_SCALE,
                BLOCK_B,
                BLOCK_R,
                BLOCK_D,
                STEP,
                DECOUPLED,
                TMA,
                EMULATED,
                PARTS,
            )
    else:
        update_block(
            x,
            gradient,
            state,
            numbers,
            sizes,
            begin,
            trained,
            G_SCALE,
            BLOCK_B,
            BLOCK_R,
            BLOCK_D,
            STEP,
            DECOUPLED,
            TMA,
            EMULATED,
            PARTS,
        )


@triton.jit
def halves_of(tile):
    """Return the left and the right half of a tile's columns."""
    width: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, width]), [0, 2, 1]))


@triton.jit
def update_block(
    x,
    gradient,
    state,
    numbers,
    sizes,
    tile,
    trained,
    G_SCALE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    DECOUPLED: tl.constexpr,
    TMA: tl.constexpr,
    EMULATED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Form the gradient of one tile, and update it; the arguments are those of `update_rows`.

    numbers: what is read of hyper and counter, and the loss's scale.
    """
    weight, column_sum, bias, momentum, second, kahan, row_scale = state
    read, scale = numbers
    batch, rows, first, chunk, D, row_offset, b_blocks = sizes
    d_blocks = tl.cdiv(D, BLOCK_D)
    width: tl.constexpr = BLOCK_D // PARTS
    column, local = (tile % d_blocks) * BLOCK_D, (tile // d_blocks) * BLOCK_R
    grad = row_gradient(
        x, gradient, local, column, batch, D, BLOCK_B, BLOCK_R, BLOCK_D, STEP, TMA, EMULATED
    )
    if PARTS == 4:
        left, right = halves_of(grad)
        grads = halves_of(left) + halves_of(right)
    else:
        grads = (grad,)
    for part in tl.static_range(0, PARTS):
        c = column + part * width
        loaded = load_tile(
            weight, tl.cast(first, tl.int64) + local, c, rows, D, D, BLOCK_R, width, TMA
        )
        apply_gradient(
            grads[part],
            loaded,
            trained,
            weight,
            column_sum,
            bias,
            momentum,
            second,
            kahan,
            row_scale,
            None,
            None,
            None,
            rows,
            first,
            local,
            chunk,
            D,
            row_offset,
            b_blocks,
            c,
            G_SCALE,
            BLOCK_R,
            width,
            DECOUPLED,
            TMA,
            EMULATED,
            numbers=read,
            scale=scale,
        )
