"""`bce_step_` on the GPU: two passes over a chunk of labels.

The first keeps the gradient of the logits. The second forms dX += Gᵀ W and the rows' gradient G x,
and updates the rows: in one kernel that reads each row once more and keeps dX in registers (TMA
descriptors, one block of samples), else in two.
"""

import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton import bce_pass, common
from xmlkernels.triton.bce_plan import GROUP, Plan, step_options, update_options
from xmlkernels.triton.bce_tile import (
    Tiles,
    busy_tiles,
    partial_at,
    place_of,
)
from xmlkernels.triton.bce_update import apply_gradient, update_rows
from xmlkernels.triton.hyper import DECAY, SCALE
from xmlkernels.triton.update import bias_corrections, load_numbers


@triton.jit
def step_tiles(
    x,
    gradient,
    partial,
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
    order,
    batch,
    rows,
    first,
    chunk,
    D,
    row_offset,
    B_BLOCKS: tl.constexpr,
    G_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DECOUPLED: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Add Gᵀ W and update the rows from G x, for some columns and every n-th tile of a chunk.

    The samples are one block. x, gradient and weight are descriptors. partial fp32 [splits, batch,
    D]. Nothing but it is written if flag is set. order: None, or the groups of `choose_groups`;
    those that are skipped keep their weights, but for what decay and momentum do to them.
    """
    d_blocks = tl.cdiv(D, BLOCK_D)
    split, splits = tl.program_id(0) // d_blocks, tl.num_programs(0) // d_blocks
    column = (tl.program_id(0) % d_blocks) * BLOCK_D
    if tl.load(flag) != 0:
        return
    at, inside = partial_at(partial, split, 0, column, batch, D, BLOCK_B, BLOCK_D)
    total = tl.load(at, mask=inside & (first > 0), other=0.0)
    samples = x.load([0, column])
    numbers, scale = load_numbers(hyper, counter, correction), tl.load(hyper + SCALE)
    tiles = busy_tiles(order, rows, first, chunk, GROUP, BLOCK_R)
    for i in range(split, tiles, splits):
        local = place_of(order, i, GROUP, BLOCK_R)
        left = gradient.load([local, 0])
        loaded = weight.load([first + local, column])
        right = common.operand(loaded, left.dtype, EMULATED)
        total = common.dot(left.T, right, total, EMULATED)
        grad = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
        grad = common.dot(left, samples, grad, EMULATED)
        apply_gradient(
            grad,
            loaded,
            True,
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
            B_BLOCKS,
            column,
            G_SCALE,
            BLOCK_R,
            BLOCK_D,
            DECOUPLED,
            True,
            EMULATED,
            True,
            numbers,
            scale,
        )
    # The flag is not set; asked again, so that the place is found again: kept, it would take
    # registers through the loop.
    base = tl.where(tl.load(flag) == 0, tl.program_id(0), 0)
    at, inside = partial_at(
        partial, base // d_blocks, 0, base % d_blocks * BLOCK_D, batch, D, BLOCK_B, BLOCK_D
    )
    tl.store(at, total, mask=inside)
    if order is not None:
        all_tiles = tl.cdiv(tl.minimum(chunk, rows - first), GROUP).to(tl.int32)
        all_tiles *= GROUP // BLOCK_R
        if momentum is None and kahan is None and tl.load(hyper + DECAY) == 0.0:
            all_tiles = tiles  # nothing would change
        for i in range(tiles + split, all_tiles, splits):
            local = place_of(order, i, GROUP, BLOCK_R)
            loaded = weight.load([first + local, column])
            apply_gradient(
                tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32),
                loaded,
                False,
                weight,
                column_sum,
                None,
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
                B_BLOCKS,
                column,
                G_SCALE,
                BLOCK_R,
                BLOCK_D,
                DECOUPLED,
                True,
                EMULATED,
                numbers=numbers,
                scale=scale,
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
    tiles = Tiles(x, weight, bias, pos_row, pos_sample, pos_value, row_scale, rows, plan)
    if skip_below > 0:
        tiles.skip(hyper, skip_below, skipped)
    tiles.buffers(gradient=True, dx=True, column_sum=bias is not None, loss=need_loss)
    p, groups = tiles.plan, tiles.groups
    state = (bias, momentum, second, kahan, row_scale, hyper, counter)
    correction = bias_corrections(hyper, counter) if second is not None else None
    # An e4m3 table's states would take more registers than there are.
    fused = tiles.tma and tiles.b_blocks == 1 and (row_scale is None or momentum is None)
    for first in tiles:
        tiles.make_gradient(first)
        if bce_pass.is_chosen():
            plain = bias is None and momentum is None and kahan is None and groups is None
            bce_pass.step_rows(
                tiles,
                first,
                hyper,
                counter,
                plain=plain and row_scale is None,
                row_offset=row_offset,
                decoupled=decoupled,
            )
            continue
        if not fused:
            tiles.add_dx(first)
        sizes = (tiles.batch, tiles.rows, first, p.chunk, tiles.width, row_offset)
        gradient = tiles.gradient
        if fused:
            step_tiles[(tiles.d_blocks * p.splits,)](
                tiles.box(tiles.x, tiles.batch, p.block_b, p.block_d),
                tiles.box(gradient, p.chunk, p.block_r, p.block_b),
                tiles.partial,
                tiles.column_sum,
                tiles.box(tiles.weight, tiles.rows, p.block_r, p.block_d),
                *state,
                correction,
                tiles.flag,
                None if groups is None else groups.order,
                *sizes,
                tiles.score_blocks,
                tiles.g_scale,
                GROUP,
                p.block_b,
                p.block_r,
                p.block_d,
                decoupled,
                tiles.emulated,
                **step_options(plain=momentum is None and kahan is None and groups is None),
            )
        else:
            step, stateless = min(p.step, p.block_b), momentum is None and kahan is None
            large = stateless and tiles.tma and groups is None and p.wide > 1
            block_r, block_d, parts = p.block_r, p.block_d, 1
            if large:
                block_r, block_d, parts = p.wide * block_r, p.wide * block_d, 4
            count = tiles.tiles_of(first, block_r) * triton.cdiv(tiles.width, block_d)
            if large:
                count = min(count, common.resident(x.device, 1))
            update_rows[(count,)](
                tiles.box(tiles.x, tiles.batch, step, block_d),
                tiles.box(gradient, p.chunk, block_r, step),
                tiles.column_sum,
                tiles.box(tiles.weight, tiles.rows, block_r, block_d // parts),
                *state,
                correction,
                tiles.flag,
                None if groups is None else groups.quiet,
                *sizes,
                tiles.score_blocks,
                tiles.g_scale,
                GROUP,
                p.block_b,
                block_r,
                block_d,
                p.step,
                decoupled,
                tiles.tma,
                tiles.emulated,
                parts,
                **update_options(tiles.tma, plain=stateless and not large, large=large),
            )
    dx = tiles.dx_result(hyper)
    return dx, tiles.loss_result(hyper) if need_loss else dx.new_empty(0)
