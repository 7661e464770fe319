"""`bce_loss` on the GPU, and its backward: the tiles of `bce_step_` without the update."""

import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton import common
from xmlkernels.triton.bce_tile import Plan, Tiles, bias_gradient, row_gradient


@triton.jit
def store_gradient(
    x,
    gradient,
    column_sum,
    row_scale,
    dweight,
    dbias,
    flag,
    batch,
    rows,
    first,
    tile,
    D,
    b_blocks,
    G_SCALE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Store dweight = Gᵀ x and dbias of a block of rows and columns.

    NaN where the batch is not finite.
    """
    d_blocks = tl.cdiv(D, BLOCK_D)
    d_block = tl.program_id(0) % d_blocks
    l_block = tl.program_id(0) // d_blocks
    begin = tl.cast(first, tl.int64) + l_block * BLOCK_L
    lane = tl.arange(0, BLOCK_L)
    local = l_block * BLOCK_L + lane
    column = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    real, good = begin + lane < rows, tl.load(flag) == 0
    if dbias is not None:
        mask = real & (d_block == 0)
        total = bias_gradient(column_sum, local, mask, tile, b_blocks, BLOCK_L)
        tl.store(dbias + begin + lane, tl.where(good, total, float("nan")), mask=mask)
    if dweight is not None:
        grad = row_gradient(
            x, gradient, local, column, real, batch, tile, D, BLOCK_L, BLOCK_D, STEP, EMULATED
        )
        at = dweight + begin * D + (lane[:, None] * D + column[None, :])
        grad *= 1.0 / G_SCALE
        if row_scale is not None:
            unit = tl.load(row_scale + 2 * (begin + lane), mask=real, other=1.0)
            # Taken into G for the sake of dX.
            grad *= tl.div_rn(tl.full([BLOCK_L], 1.0, tl.float32), unit)[:, None]
        value = tl.where(good, grad, float("nan"))
        tl.store(at, value, mask=real[:, None] & (column < D)[None, :])


def bce_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_row: Tensor,
    pos_sample: Tensor,
    pos_value: Tensor | None = None,
    row_scale: Tensor | None = None,
    *,
    rows: int = -1,
    plan: Plan | None = None,
) -> Tensor:
    """See `xmlkernels.ops.bce_loss`. plan: other block sizes than `make_plan` chooses."""
    tiles = Tiles(x, weight, bias, pos_row, pos_sample, pos_value, row_scale, rows, plan)
    tiles.buffers(gradient=False, dx=False, column_sum=False, loss=True)
    for first in tiles:
        tiles.make_gradient(first)
    return tiles.loss_result(None)


def bce_loss_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_row: Tensor,
    pos_sample: Tensor,
    pos_value: Tensor | None = None,
    row_scale: Tensor | None = None,
    *,
    rows: int = -1,
    need_dweight: bool = False,
    need_dbias: bool = False,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `xmlkernels.reference.bce_loss`.

    Returns:
        fp32 dx [B, D], dweight [L, D] and dbias [L]; [0] where not asked.
    """
    tiles = Tiles(x, weight, bias, pos_row, pos_sample, pos_value, row_scale, rows, plan)
    tiles.buffers(gradient=True, dx=True, column_sum=need_dbias, loss=False)
    dweight = tiles.empty(*weight.shape) if need_dweight else None
    dbias = tiles.empty(weight.shape[0]) if need_dbias else None
    for result in (dweight, dbias):
        if result is not None:
            result[tiles.rows :].zero_()  # padding has no gradient
    p = tiles.plan
    for first in tiles:
        tiles.make_gradient(first)
        tiles.add_dx(first)
        if need_dweight or need_dbias:
            store_gradient[(tiles.tile_blocks(first) * tiles.d_blocks,)](
                tiles.x,
                tiles.gradient,
                tiles.column_sum,
                row_scale,
                dweight,
                dbias,
                tiles.flag,
                tiles.batch,
                tiles.rows,
                first,
                p.tile,
                tiles.width,
                tiles.b_blocks,
                tiles.g_scale,
                p.block_l,
                p.block_d,
                p.step,
                tiles.emulated,
                num_warps=p.warps,
                num_stages=p.stages,
                **common.LAUNCH,
            )
    dx = tiles.dx_result(None)
    return (
        dx,
        dx.new_empty(0) if dweight is None else dweight,
        dx.new_empty(0) if dbias is None else dbias,
    )
