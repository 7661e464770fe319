"""What the full-label ops share: one tile of labels from logits to gradient, and its share of dX.

A tile is 8 to 16 thousand labels whose rows and gradient stay in a card's L2 between three
products. Its gradient is stored unscaled in the table's format: sigma - y is formed in fp32 first,
so that a fitted positive is not rounded to 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton import common
from xmlkernels.triton.hyper import DX_SCALE, SCALE
from xmlkernels.triton.positives import find_starts, targets
from xmlkernels.triton.skip import GROUP, Groups

TILE_BYTES = 32 << 20  # rows and gradient of a tile together, of the 40 to 50 MB of L2
PROGRAMS = 128  # programs of the dX product; a constant, so that bits do not depend on the card
# fp16 has no small numbers: what it stores of sigma - y is 2^8 times as large, and saturates at |y|
# = 255.
GRADIENT_SCALE = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 256.0}


@dataclass(frozen=True)
class Plan:
    """Block sizes, powers of two >= 16.

    The last place of dX depends on them, and that of rows through fp32 sums over D and B.
    """

    tile: int  # labels of a tile, a multiple of block_l
    block_b: int
    block_l: int
    block_d: int
    step: int  # how far one product of the tensor cores reaches along the summed dimension
    segments: int  # parts of a tile whose shares of dX are kept apart
    warps: int = 8
    stages: int = 3

    def with_tile(self, rows: int, unit: int) -> "Plan":
        """Return the same plan for a table smaller than a tile, which is a multiple of unit."""
        return replace(self, tile=min(self.tile, triton.cdiv(max(rows, 1), unit) * unit))


def make_plan(batch: int, width: int, dtype: torch.dtype) -> Plan:
    """Return block sizes for a table of a format.

    All fit the 99 KB of shared memory that the smallest cards have.
    """
    # 128 x 64 logits: with 128 x 128, logits and targets together do not fit the registers of eight
    # warps.
    wide = dtype == torch.float32
    # e4m3 is converted in registers: shorter steps.
    side = 64 if wide else 128
    step = 64 if dtype.itemsize == 2 else 32
    block_b, block_d = common.power_of_2(batch, 16, side), common.power_of_2(width, 16, side)
    row_bytes = width * dtype.itemsize + batch * (4 if wide else 2)
    tile = 1 << max(10, min(16, (TILE_BYTES // row_bytes).bit_length() - 1))
    blocks = triton.cdiv(max(batch, 1), block_b) * triton.cdiv(width, block_d)
    segments = max(1, min(PROGRAMS // blocks, tile // (2 * step)))
    return Plan(tile, block_b, 64, block_d, step, segments, stages=2 if wide else 3)


@triton.jit
def gradient_tile(
    x,
    weight,
    bias,
    row_scale,
    starts,
    pos_row,
    pos_sample,
    pos_value,
    gradient,
    column_sum,
    loss,
    peaks,
    batch,
    rows,
    first,
    tile,
    D,
    G_SCALE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STEP: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """sigma(x W^T + bias) - y for a tile of labels; what is None is not asked for.

    gradient [batch, tile]; of an e4m3 table it holds the rows' scales too, so that dX needs none.
    column_sum fp32 [b-blocks, tile], sums over the samples of a block; loss fp32 [b-blocks,
    l-blocks of the table], sums over a block; peaks fp32 [b-blocks, l-blocks of a tile], largest
    sigmas.
    """
    b_blocks = tl.cdiv(batch, BLOCK_B)
    b_block = tl.program_id(0) % b_blocks  # neighbours in time share the rows
    l_block = tl.program_id(0) // b_blocks
    begin = tl.cast(first, tl.int64) + l_block * BLOCK_L
    sample = b_block * BLOCK_B + tl.arange(0, BLOCK_B)
    lane = tl.arange(0, BLOCK_L)
    real, k = begin + lane < rows, tl.arange(0, STEP)
    # 64-bit bases, 32-bit offsets within a block: offsets are kept per element, and registers are
    # few.
    x_at = (
        x
        + tl.cast(b_block * BLOCK_B, tl.int64) * D
        + (tl.arange(0, BLOCK_B)[:, None] * D + k[None, :])
    )
    w_at = weight + begin * D + (lane[None, :] * D + k[:, None])
    z = tl.zeros([BLOCK_B, BLOCK_L], dtype=tl.float32)
    for d in range(0, D, STEP):
        left = tl.load(x_at + d, mask=(sample < batch)[:, None] & (d + k < D)[None, :], other=0.0)
        right = tl.load(w_at + d, mask=real[None, :] & (d + k < D)[:, None], other=0)
        z = common.dot(left, common.operand(right, x.dtype.element_ty, EMULATED), z, EMULATED)
    if row_scale is not None:
        unit = tl.load(row_scale + 2 * (begin + lane), mask=real, other=1.0)
        z *= unit[None, :]
    if bias is not None:
        z += tl.load(bias + begin + lane, mask=real, other=0.0)[None, :]
    block = begin // BLOCK_L
    y = targets(
        pos_row,
        pos_sample,
        pos_value,
        tl.load(starts + block),
        tl.load(starts + block + 1),
        begin,
        b_block * BLOCK_B,
        BLOCK_B,
        BLOCK_L,
        x.dtype.element_ty,
        EMULATED,
    )
    inside = (sample < batch)[:, None] & real[None, :]
    sigma, tail = common.sigmoid_and_tail(z)
    if loss is not None:
        part = tl.where(inside, common.softplus(z, tail) - y * z, 0.0)
        at = b_block.to(tl.int64) * tl.cdiv(rows, BLOCK_L) + block
        tl.store(loss + at, tl.sum(tl.sum(part, 1), 0))
    if peaks is not None:
        # A maximum would lose a NaN, and its group be skipped.
        told = tl.where(sigma == sigma, sigma, float("inf"))
        peak = tl.max(tl.max(tl.where(inside, told, 0.0), 1), 0)
        tl.store(peaks + b_block * (tile // BLOCK_L) + l_block, peak)
    g = tl.where(inside, sigma - y, 0.0)
    if column_sum is not None:
        tl.store(column_sum + b_block * tile + l_block * BLOCK_L + lane, tl.sum(g, 0), mask=real)
    if gradient is not None:
        if row_scale is not None:
            g *= unit[None, :]
        base = gradient + tl.cast(b_block * BLOCK_B, tl.int64) * tile + l_block * BLOCK_L
        at = tl.arange(0, BLOCK_B)[:, None] * tile + lane[None, :]
        tl.store(
            base + at,
            common.round_nearest(g * G_SCALE, gradient.dtype.element_ty, EMULATED),
            mask=inside,
        )


@triton.jit
def add_dx(
    gradient,
    weight,
    partial,
    active,
    batch,
    rows,
    first,
    tile,
    D,
    segment_rows,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Add G W over the segment's labels of this tile: partial fp32 [segments, batch, D].

    active: None, or the groups of `choose_groups` that are not skipped; then the segments share
    those evenly.
    """
    b_blocks = tl.cdiv(batch, BLOCK_B)
    block, segment = tl.program_id(0), tl.program_id(1)
    sample = (block % b_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    column = (block // b_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, STEP)
    if active is not None:
        groups = tl.load(active)
        per = tl.cdiv(groups, tl.num_programs(1))
        begin = tl.minimum(segment * per, groups) * GROUP
        end = tl.minimum((segment + 1) * per, groups) * GROUP
        last = tl.minimum(tile, rows - first).to(tl.int32)
    else:
        begin = segment * segment_rows
        end = tl.minimum(tl.minimum(begin + segment_rows, tile), rows - first).to(tl.int32)
        last = end
    sample_block, lane = (block % b_blocks) * BLOCK_B, tl.arange(0, BLOCK_B)
    g_at = gradient + tl.cast(sample_block, tl.int64) * tile + (lane[:, None] * tile + k[None, :])
    w_at = weight + tl.cast(first, tl.int64) * D + (k[:, None] * D + column[None, :])
    at = (
        partial
        + (tl.cast(segment, tl.int64) * batch + sample_block) * D
        + (lane[:, None] * D + column[None, :])
    )
    inside = (sample < batch)[:, None] & (column < D)[None, :]
    total = tl.load(at, mask=inside, other=0.0)
    for i in range(begin, end, STEP):
        if active is not None:
            r = tl.load(active + 1 + i // GROUP) * GROUP + i % GROUP
        else:
            r = i
        left = tl.load(
            g_at + r, mask=(sample < batch)[:, None] & (r + k < last)[None, :], other=0.0
        )
        right = tl.load(
            w_at + tl.cast(r, tl.int64) * D,
            mask=(r + k < last)[:, None] & (column < D)[None, :],
            other=0,
        )
        total = common.dot(
            left, common.operand(right, gradient.dtype.element_ty, EMULATED), total, EMULATED
        )
    tl.store(at, total, mask=inside)


@triton.jit
def row_gradient(
    x,
    gradient,
    local,
    column,
    real,
    batch,
    tile,
    D,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Return Gᵀ x [BLOCK_L, BLOCK_D] for rows `local` of the tile and some columns."""
    k = tl.arange(0, STEP)
    g_at = gradient + (local[:, None] + k[None, :] * tile)
    x_at = x + (k[:, None] * D + column[None, :])
    grad = tl.zeros([BLOCK_L, BLOCK_D], dtype=tl.float32)
    for b in range(0, batch, STEP):
        here = b + k < batch
        left = tl.load(
            g_at + tl.cast(b, tl.int64) * tile, mask=real[:, None] & here[None, :], other=0.0
        )
        right = tl.load(
            x_at + tl.cast(b, tl.int64) * D, mask=here[:, None] & (column < D)[None, :], other=0.0
        )
        grad = common.dot(left, right, grad, EMULATED)
    return grad


@triton.jit
def bias_gradient(column_sum, local, mask, tile, b_blocks, BLOCK_L: tl.constexpr):
    """Column sums of the gradient over the whole batch, in the order of its blocks."""
    total = tl.zeros([BLOCK_L], dtype=tl.float32)
    for i in range(0, b_blocks):
        total += tl.load(column_sum + i * tile + local, mask=mask, other=0.0)
    return total


@triton.jit
def sum_dx(partial, dx, hyper, flag, count, segments, G_SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the segments in order: dx = dx_scale scale sum; NaN where the batch is not finite."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for s in range(0, segments):
        total += tl.load(partial + tl.cast(s, tl.int64) * count + at, mask=at < count, other=0.0)
    total *= 1.0 / G_SCALE
    if hyper is not None:
        total = tl.load(hyper + DX_SCALE) * (tl.load(hyper + SCALE) * total)
    tl.store(dx + at, tl.where(tl.load(flag) == 0, total, float("nan")), mask=at < count)


@triton.jit
def sum_loss(part, loss, hyper, flag, count, BLOCK: tl.constexpr):
    """Sum all blocks in order, in one program: loss = scale sum; NaN if the batch is not finite."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(0, count, BLOCK):
        at = i + tl.arange(0, BLOCK)
        total += tl.load(part + at, mask=at < count, other=0.0)
    value = tl.sum(total, 0)
    if hyper is not None:
        value *= tl.load(hyper + SCALE)
    tl.store(loss, tl.where(tl.load(flag) == 0, value, float("nan")))


class Tiles:
    """The work of one call over the tiles of a table: buffers, and the launches that the ops share.

    All launches of a call are fixed by shapes: nothing is read on the host, so a CUDA graph can
        hold them.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pos_row: Tensor,
        pos_sample: Tensor,
        pos_value: Tensor | None,
        row_scale: Tensor | None,
        rows: int,
        plan: Plan | None,
        *,
        skips: bool = False,
    ) -> None:
        self.batch, self.width = x.shape
        self.rows = weight.shape[0] if rows < 0 else rows
        plan = plan or make_plan(self.batch, self.width, weight.dtype)
        self.plan = plan.with_tile(self.rows, GROUP if skips else plan.block_l)
        self.groups: Groups | None = None
        # e4m3 is exact in bf16: there its products run, the rows' scales applied outside.
        self.kind = torch.bfloat16 if row_scale is not None else weight.dtype
        self.x, self.flag = common.prepare_batch(x, self.kind)
        self.weight, self.bias, self.row_scale = common.table_bits(weight), bias, row_scale
        self.positives = (pos_row, pos_sample, pos_value)
        self.g_scale = GRADIENT_SCALE[self.kind]
        self.emulated = common.emulated()
        self.b_blocks = triton.cdiv(self.batch, self.plan.block_b)
        self.d_blocks = triton.cdiv(self.width, self.plan.block_d)
        self.blocks = triton.cdiv(self.rows, self.plan.block_l)
        self.starts = self.empty(self.blocks + 1, dtype=torch.int64)
        grid = (triton.cdiv(self.blocks + 1, 128),)
        find_starts[grid](
            pos_row,
            self.starts,
            pos_row.shape[0],
            self.rows,
            self.blocks,
            self.plan.block_l,
            128,
            **common.LAUNCH,
        )

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialized fp32 tensor on the batch's device."""
        return torch.empty(shape, dtype=dtype, device=self.weight.device)

    def buffers(self, *, gradient: bool, dx: bool, column_sum: bool, loss: bool) -> None:
        """Allocates what the asked results need; zeros where sums begin."""
        p = self.plan
        self.gradient = self.empty(self.batch, p.tile, dtype=self.kind) if gradient else None
        self.column_sum = self.empty(self.b_blocks, p.tile) if column_sum else None
        self.peaks = (
            self.empty(self.b_blocks, p.tile // p.block_l) if self.groups is not None else None
        )
        self.loss = self.empty(self.b_blocks, self.blocks) if loss else None
        segments = p.segments if self.rows else 0
        self.partial = self.empty(segments, self.batch, self.width).zero_() if dx else None

    def __iter__(self) -> Iterator[int]:
        """First rows of the tiles."""
        return iter(range(0, self.rows, self.plan.tile))

    def tile_blocks(self, first: int) -> int:
        """Return the number of blocks of labels in the tile that begins at `first`."""
        return triton.cdiv(min(self.plan.tile, self.rows - first), self.plan.block_l)

    def skip(self, hyper: Tensor, skip_below: float, skipped: Tensor | None) -> None:
        """Let `make_gradient` choose groups of rows whose products are left out.

        To be called before `buffers`.
        """
        self.groups = Groups(
            self.x, self.bias is not None, hyper, self.plan.tile, skip_below, skipped
        )

    def make_gradient(self, first: int) -> None:
        """Score a tile and form the gradient of its logits."""
        p, blocks = self.plan, self.tile_blocks(first)
        if self.batch:
            self._gradient(first, blocks)
        if self.groups is not None:
            self.groups.choose(
                self.peaks, self.starts, self.flag, self.rows, first, p.tile, blocks, p.block_l
            )

    def _gradient(self, first: int, blocks: int) -> None:
        p = self.plan
        gradient_tile[(blocks * self.b_blocks,)](
            self.x,
            self.weight,
            self.bias,
            self.row_scale,
            self.starts,
            *self.positives,
            self.gradient,
            self.column_sum,
            self.loss,
            self.peaks,
            self.batch,
            self.rows,
            first,
            p.tile,
            self.width,
            self.g_scale,
            p.block_b,
            p.block_l,
            p.step,
            self.emulated,
            num_warps=p.warps,
            num_stages=p.stages,
            **common.LAUNCH,
        )

    def add_dx(self, first: int) -> None:
        """Add the tile's share of dX to the partial sums."""
        p = self.plan
        if not self.batch:
            return
        segment_rows = triton.cdiv(triton.cdiv(p.tile, p.segments), p.step) * p.step
        add_dx[(self.b_blocks * self.d_blocks, p.segments)](
            self.gradient,
            self.weight,
            self.partial,
            None if self.groups is None else self.groups.active,
            self.batch,
            self.rows,
            first,
            p.tile,
            self.width,
            segment_rows,
            GROUP,
            p.block_b,
            p.block_d,
            p.step,
            self.emulated,
            num_warps=p.warps,
            num_stages=p.stages,
            **common.LAUNCH,
        )

    def dx_result(self, hyper: Tensor | None) -> Tensor:
        """Return dx fp32 [B, D], the sum of all segments."""
        assert self.partial is not None
        dx = self.empty(self.batch, self.width)
        grid = (triton.cdiv(max(dx.numel(), 1), 1024),)
        sum_dx[grid](
            self.partial,
            dx,
            hyper,
            self.flag,
            dx.numel(),
            self.partial.shape[0],
            self.g_scale,
            1024,
            **common.LAUNCH,
        )
        return dx

    def loss_result(self, hyper: Tensor | None) -> Tensor:
        """Return the loss fp32 [1], the sum of all blocks."""
        assert self.loss is not None
        loss = self.empty(1)
        sum_loss[(1,)](self.loss, loss, hyper, self.flag, self.loss.numel(), 1024, **common.LAUNCH)
        return loss
