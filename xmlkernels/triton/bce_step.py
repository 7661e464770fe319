"""`bce_step_` on the GPU: three products per tile of labels, the last one updates the rows.

A row of the table comes from memory once (for the logits) and goes back once (after its update);
the dX product between them reads it, as it was before the step, from L2.
"""

import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton import common
from xmlkernels.triton.bce_tile import Plan, Tiles, bias_gradient, row_gradient
from xmlkernels.triton.hyper import DECAY, LR, SCALE
from xmlkernels.triton.skip import GROUP
from xmlkernels.triton.update import bias_corrections, update_tile


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
    tile,
    D,
    row_offset,
    b_blocks,
    G_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    DECOUPLED: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Form the gradient Gᵀ x of a block of rows and columns, and update them in place.

    Nothing is written if flag is set. quiet: None, or int32 [groups of the tile], 1 where the
    gradient is left out.
    """
    d_blocks = tl.cdiv(D, BLOCK_D)
    d_block = tl.program_id(0) % d_blocks
    l_block = tl.program_id(0) // d_blocks
    good = tl.load(flag) == 0
    if quiet is not None:
        idle = tl.load(quiet + l_block * BLOCK_L // GROUP) != 0
        if momentum is None and kahan is None:
            still = idle & (tl.load(hyper + DECAY) == 0.0)  # nothing would change
            if weight.dtype.element_ty == tl.float32:
                # A way out would cost a place on the stack here, and there is nothing to round.
                good = good & (still == 0)
            elif still:
                return
    begin = tl.cast(first, tl.int64) + l_block * BLOCK_L
    lane = tl.arange(0, BLOCK_L)
    local = l_block * BLOCK_L + lane
    column = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    real = begin + lane < rows
    trained = good
    if quiet is not None:
        batch = tl.where(idle, 0, batch)
        trained = good & (idle == 0)
    grad = row_gradient(
        x, gradient, local, column, real, batch, tile, D, BLOCK_L, BLOCK_D, STEP, EMULATED
    )
    scale = tl.load(hyper + SCALE)
    if bias is not None:
        mask = real & trained & (d_block == 0)
        step = tl.load(hyper + LR) * (
            scale * bias_gradient(column_sum, local, mask, tile, b_blocks, BLOCK_L)
        )
        value = tl.load(bias + begin + lane, mask=mask, other=0.0) - step
        tl.store(bias + begin + lane, common.round_nearest(value, tl.float32, EMULATED), mask=mask)
    grad *= (1.0 / G_SCALE) * scale
    if row_scale is not None:
        scale_at = row_scale + 2 * (begin + lane)
        unit = tl.load(scale_at, mask=real, other=1.0)
        # Taken into G for the sake of dX.
        grad *= tl.div_rn(tl.full([BLOCK_L], 1.0, tl.float32), unit)[:, None]
    else:
        scale_at = None
    base = begin * D
    mask = real[:, None] & (column < D)[None, :] & good
    update_tile(
        weight + base,
        momentum if momentum is None else momentum + base,
        second if second is None else second + base,
        kahan if kahan is None else kahan + base,
        scale_at,
        hyper,
        counter,
        correction,
        lane[:, None] * D + column[None, :],
        mask,
        real & good,
        grad,
        row_offset + begin + lane,
        d_block * BLOCK_D,
        BLOCK_D,
        DECOUPLED,
        EMULATED,
    )


def bce_step_(
    weight: Tensor,
    x: Tensor,
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
    skip_below: float = 0.0,
    skipped: Tensor | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """See `xmlkernels.ops.bce_step_`. plan: other block sizes than `make_plan` chooses."""
    tiles = Tiles(
        x, weight, bias, pos_row, pos_sample, pos_value, row_scale, rows, plan, skips=skip_below > 0
    )
    if skip_below > 0:
        tiles.skip(hyper, skip_below, skipped)
    tiles.buffers(gradient=True, dx=True, column_sum=bias is not None, loss=need_loss)
    correction = bias_corrections(hyper, counter) if second is not None else None
    p = tiles.plan
    for first in tiles:
        tiles.make_gradient(first)
        tiles.add_dx(first)
        update_rows[(tiles.tile_blocks(first) * tiles.d_blocks,)](
            tiles.x,
            tiles.gradient,
            tiles.column_sum,
            tiles.weight,
            bias,
            momentum,
            second,
            kahan,
            row_scale,
            hyper,
            counter,
            correction,
            tiles.flag,
            None if tiles.groups is None else tiles.groups.quiet,
            tiles.batch,
            tiles.rows,
            first,
            p.tile,
            tiles.width,
            row_offset,
            tiles.b_blocks,
            tiles.g_scale,
            GROUP,
            p.block_l,
            p.block_d,
            p.step,
            decoupled,
            tiles.emulated,
            num_warps=p.warps,
            num_stages=p.stages,
            **common.LAUNCH,
        )
    dx = tiles.dx_result(hyper)
    return dx, tiles.loss_result(hyper) if need_loss else dx.new_empty(0)
