"""`bce_loss` on the GPU, and its backward: the passes of `bce_step_` without the update."""

import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton.bce_plan import Plan, update_options
from xmlkernels.triton.bce_tile import Tiles, bias_gradient, row_gradient


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
    chunk,
    D,
    b_blocks,
    G_SCALE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    TMA: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Store dweight = G x and dbias of a tile of rows and columns.

    NaN where the batch is not finite.
    """
    d_blocks = tl.cdiv(D, BLOCK_D)
    column = (tl.program_id(0) % d_blocks) * BLOCK_D
    local = (tl.program_id(0) // d_blocks) * BLOCK_R
    begin = tl.cast(first, tl.int64) + local
    lane, c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    real, good = begin + lane < rows, tl.load(flag) == 0
    if dbias is not None:
        mask = real & (column == 0)
        total = bias_gradient(column_sum, local + lane, mask, chunk, b_blocks, BLOCK_R)
        tl.store(dbias + begin + lane, tl.where(good, total, float("nan")), mask=mask)
    if dweight is not None:
        grad = row_gradient(
            x, gradient, local, column, batch, D, BLOCK_B, BLOCK_R, BLOCK_D, STEP, TMA, EMULATED
        )
        at = dweight + (begin * D + column) + (lane[:, None] * D + c[None, :])
        grad *= 1.0 / G_SCALE
        if row_scale is not None:
            unit = tl.load(row_scale + 2 * (begin + lane), mask=real, other=1.0)
            # Taken into G for the sake of dX.
            grad *= tl.div_rn(tl.full([BLOCK_R], 1.0, tl.float32), unit)[:, None]
        value = tl.where(good, grad, float("nan"))
        tl.store(at, value, mask=real[:, None] & (column + c < D)[None, :])


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
            step = min(p.step, p.block_b)
            store_gradient[(tiles.tiles_of(first, p.block_r) * tiles.d_blocks,)](
                tiles.box(tiles.x, tiles.batch, step, p.block_d),
                tiles.box(tiles.gradient, p.chunk, p.block_r, step),
                tiles.column_sum,
                row_scale,
                dweight,
                dbias,
                tiles.flag,
                tiles.batch,
                tiles.rows,
                first,
                p.chunk,
                tiles.width,
                tiles.score_blocks,
                tiles.g_scale,
                p.block_b,
                p.block_r,
                p.block_d,
                p.step,
                tiles.tma,
                tiles.emulated,
                **update_options(tiles.tma, plain=True),
            )
    dx = tiles.dx_result(None)
    return (
        dx,
        dx.new_empty(0) if dweight is None else dweight,
        dx.new_empty(0) if dbias is None else dbias,
    )
