"""What the full-label ops share: a chunk of labels from logits to gradient, and its share of dX.

The gradient of a chunk is stored unscaled in the table's format, one row per label: sigma - y is
formed in fp32 first, so that a fitted positive is not rounded to 0. Labels are never the contiguous
axis of a matrix, so that all accesses are wide for any number of them.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton import common
from xmlkernels.triton.bce_plan import (
    GROUP,
    Plan,
    dx_options,
    make_plan,
    score_options,
)
from xmlkernels.triton.descriptors import box, serve_descriptors
from xmlkernels.triton.hyper import DX_SCALE, SCALE
from xmlkernels.triton.positives import find_starts, subtract_targets
from xmlkernels.triton.skip import Groups

# fp16 has no small numbers: what it stores of sigma - y is 2^8 times as large, and saturates at |y|
# = 255.
GRADIENT_SCALE = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 256.0}


@triton.jit
def load_tile(
    source,
    row,
    column,
    rows,
    columns,
    pitch,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Load [ROWS, COLUMNS] of a matrix from (row, column) on; zeros beyond its edges.

    source: a pointer, or with TMA a descriptor with that box and the same edges. An edge that is
    None is never passed.
    """
    if TMA:
        out = source.load([row.to(tl.int32), column])
    else:
        r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        # A 64-bit base and 32-bit offsets: offsets are kept per element, and registers are few.
        at = source + (row.to(tl.int64) * pitch + column) + (r[:, None] * pitch + c[None, :])
        if rows is not None and columns is not None:
            mask = (row + r < rows)[:, None] & (column + c < columns)[None, :]
            out = tl.load(at, mask=mask, other=0)
        elif rows is not None:
            out = tl.load(at, mask=(row + r < rows)[:, None], other=0)
        else:
            out = tl.load(at)
    return out


@triton.jit
def score_tiles(
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
    chunk,
    pitch,
    D,
    G_SCALE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STEP: tl.constexpr,
    SINGLY: tl.constexpr,
    TMA: tl.constexpr,
    EMULATED: tl.constexpr,
    STARTS: tl.constexpr = 1,
):
    """sigma(W xᵀ + bias) - y for a chunk of labels; what is None is not asked for.

    Each program takes every n-th tile of labels and samples; tiles are independent, and what
    descriptors load runs on from one to the next. starts: of STARTS blocks a tile. gradient
    [chunk, pitch], zeros beyond samples and rows; of an e4m3 table it
    holds the rows' scales too, so that dX needs none. column_sum fp32 [b-blocks, chunk], sums over
    the samples of a block; loss fp32 [b-blocks, l-blocks of a chunk], sums over a tile and the
    chunks; peaks fp32 [b-blocks, l-blocks of a chunk], largest sigmas.
    """
    b_blocks, l_blocks = tl.cdiv(batch, BLOCK_B), tl.cdiv(tl.minimum(chunk, rows - first), BLOCK_L)
    blocks = chunk // BLOCK_L
    lane = tl.arange(0, BLOCK_L)
    tl.assume(D > 0)
    for tile in tl.range(tl.program_id(0), l_blocks * b_blocks, tl.num_programs(0), flatten=TMA):
        b_block, l_block = tile % b_blocks, tile // b_blocks  # neighbours in time share the rows
        # Descriptors take places of 32 bits.
        begin = tl.cast(first, tl.int32 if TMA else tl.int64) + l_block * BLOCK_L
        z = tl.zeros([BLOCK_L, BLOCK_B], dtype=tl.float32)
        for d in range(0, D, STEP):
            left = load_tile(weight, begin, d, rows, D, D, BLOCK_L, STEP, TMA)
            right = load_tile(x, b_block * BLOCK_B, d, batch, D, D, BLOCK_B, STEP, TMA)
            z = common.dot(common.operand(left, right.dtype, EMULATED), right.T, z, EMULATED)
        b = b_block * BLOCK_B
        sample, real = b + tl.arange(0, BLOCK_B), begin + lane < rows
        if row_scale is not None:
            unit = tl.load(row_scale + 2 * (begin + lane), mask=real, other=1.0)
            z *= unit[:, None]
        if bias is not None:
            z += tl.load(bias + begin + lane, mask=real, other=0.0)[:, None]
        block = begin // (BLOCK_L // STARTS)
        last = tl.minimum(block + STARTS, tl.cdiv(rows, BLOCK_L // STARTS))
        p, p_end = tl.load(starts + block), tl.load(starts + last)
        inside = real[:, None] & (sample < batch)[None, :]
        at = b_block * blocks + l_block
        if loss is not None:
            part = common.softplus(z, tl.exp(-tl.abs(z)))
            part = subtract_targets(
                part,
                z,
                pos_row,
                pos_sample,
                pos_value,
                p,
                p_end,
                begin,
                b,
                BLOCK_L,
                BLOCK_B,
                SINGLY,
            )
            before = tl.load(loss + at, mask=first > 0, other=0.0)
            part = tl.where(inside, part, 0.0)
            tl.store(loss + at, before + tl.sum(tl.sum(part, 1), 0))
        sigma = 1.0 / (1.0 + tl.exp(-z))
        if peaks is not None:
            # A maximum would lose a NaN, and its group be skipped.
            told = tl.where(sigma == sigma, sigma, float("inf"))
            tl.store(peaks + at, tl.max(tl.max(tl.where(inside, told, 0.0), 1), 0))
        g = tl.where(inside, sigma, 0.0)
        g = subtract_targets(
            g,
            None,
            pos_row,
            pos_sample,
            pos_value,
            p,
            p_end,
            begin,
            b,
            BLOCK_L,
            BLOCK_B,
            SINGLY,
        )
        if column_sum is not None:
            tl.store(column_sum + b_block * chunk + l_block * BLOCK_L + lane, tl.sum(g, 1))
        if gradient is not None:
            if row_scale is not None:
                g *= unit[:, None]
            if TMA:
                stored = common.round_nearest(g * G_SCALE, gradient.dtype, EMULATED)
                gradient.store([l_block * BLOCK_L, b_block * BLOCK_B], stored)
            else:
                base = gradient + (tl.cast(l_block * BLOCK_L, tl.int64) * pitch + b_block * BLOCK_B)
                tl.store(
                    base + (lane[:, None] * pitch + tl.arange(0, BLOCK_B)[None, :]),
                    common.round_nearest(g * G_SCALE, gradient.dtype.element_ty, EMULATED),
                )


@triton.jit
def add_dx(
    gradient,
    weight,
    partial,
    order,
    batch,
    rows,
    first,
    chunk,
    D,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Add Gᵀ W over every n-th tile of the chunk's labels: partial fp32 [splits, batch, D].

    order: None, or the groups of `choose_groups`: those that are skipped are not read.
    """
    b_blocks = tl.cdiv(batch, BLOCK_B)
    block, split = tl.program_id(0), tl.program_id(1)
    b, column = (block % b_blocks) * BLOCK_B, (block // b_blocks) * BLOCK_D
    at, inside = partial_at(partial, split, b, column, batch, D, BLOCK_B, BLOCK_D)
    total = tl.load(at, mask=inside & (first > 0), other=0.0)
    tiles = busy_tiles(order, rows, first, chunk, GROUP, BLOCK_R)
    for i in range(split, tiles, tl.num_programs(1)):
        local = place_of(order, i, GROUP, BLOCK_R)
        left = load_tile(gradient, local, b, None, None, b_blocks * BLOCK_B, BLOCK_R, BLOCK_B, TMA)
        right = load_tile(
            weight, tl.cast(first, tl.int64) + local, column, rows, D, D, BLOCK_R, BLOCK_D, TMA
        )
        total = common.dot(left.T, common.operand(right, left.dtype, EMULATED), total, EMULATED)
    tl.store(at, total, mask=inside)


@triton.jit
def partial_at(partial, split, b, column, batch, D, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return where one split's sum of dX stands, and what of it is inside."""
    sample, c = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_D)
    base = partial + ((tl.cast(split, tl.int64) * batch + b) * D + column)
    at = base + (sample[:, None] * D + c[None, :])
    return at, (b + sample < batch)[:, None] & (column + c < D)[None, :]


@triton.jit
def busy_tiles(order, rows, first, chunk, GROUP: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return how many tiles of a chunk have products."""
    if order is not None:
        count = tl.load(order) * (GROUP // BLOCK_R)
    else:
        count = tl.cdiv(tl.minimum(chunk, rows - first), BLOCK_R).to(tl.int32)
    return count


@triton.jit
def place_of(order, i, GROUP: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return where the i-th tile begins within its chunk."""
    if order is not None:
        of_group: tl.constexpr = GROUP // BLOCK_R
        place = tl.load(order + 1 + i // of_group) * GROUP + i % of_group * BLOCK_R
    else:
        place = i * BLOCK_R
    return place


@triton.jit
def row_gradient(
    x,
    gradient,
    local,
    column,
    batch,
    D,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    TMA: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Return G x [BLOCK_R, BLOCK_D] for a tile of the chunk's rows and some columns."""
    pitch = tl.cdiv(batch, BLOCK_B) * BLOCK_B
    step: tl.constexpr = min(STEP, BLOCK_B)
    grad = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for b in range(0, batch, step):
        left = load_tile(gradient, local, b, None, None, pitch, BLOCK_R, step, TMA)
        right = load_tile(x, tl.cast(b, tl.int32), column, batch, D, D, step, BLOCK_D, TMA)
        grad = common.dot(left, right, grad, EMULATED)
    return grad


@triton.jit
def bias_gradient(
    column_sum, local, mask, chunk, b_blocks, BLOCK_R: tl.constexpr, UNROLL: tl.constexpr = False
):
    """Column sums of the gradient over the whole batch, in the order of its blocks.

    UNROLL: b_blocks is known, and the sum no loop: a loop around it can be pipelined.
    """
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    if UNROLL:
        for i in tl.static_range(0, b_blocks):
            total += tl.load(column_sum + i * chunk + local, mask=mask, other=0.0)
    else:
        i = 0
        while i < b_blocks:  # no `for`, so that the loops around it can be joined
            total += tl.load(column_sum + i * chunk + local, mask=mask, other=0.0)
            i += 1
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
    """The work of one call over the chunks of a table: scratch, and the launches the ops share.

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
    ) -> None:
        self.batch, self.width = x.shape
        self.rows = weight.shape[0] if rows < 0 else rows
        self.plan = (plan or make_plan(self.batch, self.width, weight.dtype)).with_rows(self.rows)
        self.groups: Groups | None = None
        # e4m3 is exact in bf16: there its products run, the rows' scales applied outside.
        self.kind = torch.bfloat16 if row_scale is not None else weight.dtype
        self.x, self.flag = common.prepare_batch(x, self.kind)
        self.weight, self.bias, self.row_scale = common.table_bits(weight), bias, row_scale
        self.positives = (pos_row, pos_sample, pos_value)
        self.g_scale = GRADIENT_SCALE[self.kind]
        self.emulated = common.emulated()
        self.tma = serve_descriptors(self.x, self.weight, self.rows)
        p = self.plan
        self.pitch = p.pitch(self.batch)
        self.b_blocks = triton.cdiv(self.batch, p.block_b)
        self.d_blocks = triton.cdiv(self.width, p.block_d)
        self.blocks = triton.cdiv(self.rows, p.block_l)
        self.starts = self.empty(self.blocks + 1, dtype=torch.int64)
        find_starts[(triton.cdiv(self.blocks + 1, 128),)](
            pos_row,
            self.starts,
            pos_row.shape[0],
            self.rows,
            self.blocks,
            p.block_l,
            128,
            **common.LAUNCH,
        )

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialized fp32 tensor on the batch's device."""
        return torch.empty(shape, dtype=dtype, device=self.weight.device)

    def box(self, matrix: Tensor | None, rows: int, *block: int) -> Any:
        """Return a matrix as kernels take it: a descriptor of such blocks, or itself."""
        return None if matrix is None else box(matrix, rows, *block, tma=self.tma)

    def buffers(self, *, gradient: bool, dx: bool, column_sum: bool, loss: bool) -> None:
        """Take the scratch that the asked results need."""
        p = self.plan
        # The loss, many positives, and peaks of e4m3 rows need registers for a second tile; sums of
        # a bias are in the same order with and without them.
        second = loss or self.positives[0].shape[0] > 4 * self.blocks * self.b_blocks
        second |= self.groups is not None and self.row_scale is not None
        self.narrow = second or column_sum or self.positives[2] is not None or not self.tma
        self.score_l, self.score_b = p.block_l, min(p.block_b, 64) if self.narrow else p.block_b
        self.large = not self.narrow and self.groups is None and p.wide > 1
        if self.large:
            self.score_l, self.score_b = p.large_score(self.batch)
        self.score_blocks = triton.cdiv(self.batch, self.score_b)
        blocks = p.chunk // p.block_l
        self.gradient = self.empty(p.chunk, self.pitch, dtype=self.kind) if gradient else None
        self.column_sum = self.empty(self.score_blocks, p.chunk) if column_sum else None
        self.peaks = self.empty(self.score_blocks, blocks) if self.groups is not None else None
        self.loss = self.empty(self.score_blocks, blocks if self.rows else 0) if loss else None
        splits = p.splits if self.rows else 0
        self.partial = self.empty(splits, self.batch, self.width) if dx else None

    def __iter__(self) -> Iterator[int]:
        """First rows of the chunks."""
        return iter(range(0, self.rows, self.plan.chunk))

    def tiles_of(self, first: int, block: int) -> int:
        """Return the number of tiles of `block` labels in the chunk that begins at `first`."""
        return triton.cdiv(min(self.plan.chunk, self.rows - first), block)

    def skip(self, hyper: Tensor, skip_below: float, skipped: Tensor | None) -> None:
        """Let `make_gradient` choose groups of rows whose products are left out.

        To be called before `buffers`.
        """
        assert self.plan.block_l == GROUP
        self.groups = Groups(
            self.x, self.bias is not None, hyper, self.plan.chunk, skip_below, skipped
        )

    def make_gradient(self, first: int) -> None:
        """Score a chunk and form the gradient of its logits."""
        if self.batch:
            self._score(first)
        if self.groups is not None:
            self.groups.choose(self.peaks, self.starts, self.flag, self.rows, first)

    def _score(self, first: int) -> None:
        p = self.plan
        tiles = self.tiles_of(first, self.score_l) * self.score_blocks
        score_tiles[(min(tiles, common.resident(self.weight.device, 1 if self.large else 2)),)](
            self.box(self.x, self.batch, self.score_b, p.step),
            self.box(self.weight, self.rows, self.score_l, p.step),
            self.bias,
            self.row_scale,
            self.starts,
            *self.positives,
            self.box(self.gradient, p.chunk, self.score_l, self.score_b),
            self.column_sum,
            self.loss,
            self.peaks,
            self.batch,
            self.rows,
            first,
            p.chunk,
            self.pitch,
            self.width,
            self.g_scale,
            self.score_b,
            self.score_l,
            p.step,
            not self.narrow or self.kind == torch.float32,
            self.tma,
            self.emulated,
            self.score_l // p.block_l,
            **score_options(self.kind, self.narrow, self.large),
        )

    def add_dx(self, first: int) -> None:
        """Add the chunk's share of dX to the partial sums."""
        p, block_d = self.plan, self.plan.block_d * (self.plan.wide if self.tma else 1)
        if not self.batch:
            return
        add_dx[(self.b_blocks * triton.cdiv(self.width, block_d), p.splits)](
            self.box(self.gradient, p.chunk, p.block_r, p.block_b),
            self.box(self.weight, self.rows, p.block_r, block_d),
            self.partial,
            None if self.groups is None else self.groups.order,
            self.batch,
            self.rows,
            first,
            p.chunk,
            self.width,
            GROUP,
            p.block_b,
            p.block_r,
            block_d,
            self.tma,
            self.emulated,
            **dx_options(self.tma, p.wide > 1),
        )

    def dx_result(self, hyper: Tensor | None) -> Tensor:
        """Return dx fp32 [B, D], the sum of all splits."""
        assert self.partial is not None
        splits = self.partial.shape[0]
        # One split's sum stands where the result will.
        dx = self.partial[0] if splits == 1 else self.empty(self.batch, self.width)
        grid = (triton.cdiv(max(dx.numel(), 1), 1024),)
        sum_dx[grid](
            self.partial,
            dx,
            hyper,
            self.flag,
            dx.numel(),
            splits,
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
