"""`shortlist_matmul` and its backward on the GPU.

Lists per sample: each gathered row is read once, multiplied and summed in registers; there is no `B
x S x D`. One list for the whole batch is a dense product on gathered rows, so it runs on the tensor
cores. The table's gradient is in shortlist_rows.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton import common
from xmlkernels.triton.shortlist_rows import occurrences, row_gradients

LIST_TILE = (16, 128)  # entries of a list and columns, for lists per sample
# Entries, samples, columns and warps of a product with a shared list.
SHARED_TILE, SHARED_TILE_FP32 = (64, 64, 32, 8), (32, 16, 32, 4)
SPLITS = 16  # at most: parts of a shared list whose dx are summed apart, in an order of their own


@triton.jit
def _number(w):
    """Return loaded numbers of a table in fp32; e4m3 (uint8 bits) without its row's scale."""
    return common.decode_e4m3(w) if w.dtype == tl.uint8 else common.widen(w)


@triton.jit
def _score_lists(
    x,
    weight,
    bias,
    row_scale,
    index,
    logits,
    size,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
):
    """Write logits fp32 [B, size] for index int64 [B, size].

    One program scores BS entries of one sample.
    """
    tiles = tl.cdiv(size, BS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    entry = (tl.program_id(0) % tiles) * BS + tl.arange(0, BS)
    inside = entry < size
    row = tl.load(index + sample * size + entry, mask=inside, other=-1)
    real = row >= 0
    column = tl.arange(0, BD)
    z = tl.zeros((BS, BD), dtype=tl.float32)
    for start in range(0, D, BD):
        left = column < D - start
        # By each entry's threads, all but the first from L1: they hold what they need, 16 bytes at
        # a time; read once, it would be in words of 2 and change threads through shared memory.
        e_at = x + sample * D + start + column[None, :] + entry[:, None] * 0
        e = common.widen(tl.load(e_at, mask=left[None, :] & inside[:, None], other=0.0))
        w = tl.load(
            weight + row[:, None] * D + start + column[None, :],
            mask=real[:, None] & left[None, :],
            other=0,
        )
        z += e * _number(w)
    out = tl.sum(z, axis=1)
    if row_scale is not None:
        out *= tl.load(row_scale + 2 * row, mask=real, other=1.0)
    if HAS_BIAS:
        out += tl.load(bias + row, mask=real, other=0.0)
    tl.store(logits + sample * size + entry, tl.where(real, out, -float("inf")), mask=inside)


@triton.jit
def _score_shared(
    x,
    weight,
    bias,
    row_scale,
    index,
    logits,
    batch,
    size,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EMULATED: tl.constexpr,
    BS: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    """Write logits fp32 [batch, size] for index int64 [size].

    x [batch, D] has the format of the product.
    """
    tiles = tl.cdiv(batch, BB)
    # Tiles with the same rows run next to each other and share them in the L2 cache.
    entry = (tl.program_id(0) // tiles) * BS + tl.arange(0, BS)
    sample = (tl.program_id(0) % tiles) * BB + tl.arange(0, BB)
    row = tl.load(index + entry, mask=entry < size, other=-1)
    real, is_sample = row >= 0, sample < batch
    column = tl.arange(0, BD)
    z = tl.zeros((BS, BB), dtype=tl.float32)
    for start in range(0, D, BD):
        left = column < D - start
        w = tl.load(
            weight + row[:, None] * D + start + column[None, :],
            mask=real[:, None] & left[None, :],
            other=0,
        )
        x_at = x + sample[None, :].to(tl.int64) * D + start + column[:, None]
        e = tl.load(x_at, mask=is_sample[None, :] & left[:, None], other=0.0)
        w = common.operand(w, e.dtype, EMULATED)
        z = common.dot(w if w.dtype == e.dtype else common.widen(w), e, z, EMULATED)
    if row_scale is not None:
        z *= tl.load(row_scale + 2 * row, mask=real, other=1.0)[:, None]
    if HAS_BIAS:
        z += tl.load(bias + row, mask=real, other=0.0)[:, None]
    at = logits + sample[None, :].to(tl.int64) * size + entry[:, None]
    tl.store(
        at,
        tl.where(real[:, None], z, -float("inf")),
        mask=is_sample[None, :] & (entry < size)[:, None],
    )


@triton.jit
def _dx_lists(
    dlogits, weight, row_scale, index, dx, size, D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr
):
    """Write dx fp32 [B, D].

    One program sums BD columns of one sample over its list, in the order of the list.
    """
    tiles: tl.constexpr = (D + BD - 1) // BD
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    left = column < D
    total = tl.zeros((BS, BD), dtype=tl.float32)
    for start in range(0, size, BS):
        entry = start + tl.arange(0, BS)
        row = tl.load(index + sample * size + entry, mask=entry < size, other=-1)
        real = row >= 0
        # What stands at a pad is not even read.
        g = tl.load(dlogits + sample * size + entry, mask=real, other=0.0)
        if row_scale is not None:
            g *= tl.load(row_scale + 2 * row, mask=real, other=1.0)
        w = tl.load(
            weight + row[:, None] * D + column[None, :], mask=real[:, None] & left[None, :], other=0
        )
        total += g[:, None] * _number(w)
    tl.store(dx + sample * D + column, tl.sum(total, axis=0), mask=left)


@triton.jit
def _dx_shared(
    dlogits,
    weight,
    row_scale,
    index,
    parts,
    batch,
    size,
    part_size,
    D: tl.constexpr,
    LOW: tl.constexpr,
    EMULATED: tl.constexpr,
    BS: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    """Write parts fp32 [splits, batch, D]: dx over one part of the shared list each.

    LOW: the product takes bf16 operands.
    """
    column_tiles: tl.constexpr = (D + BD - 1) // BD
    column = (tl.program_id(0) % column_tiles) * BD + tl.arange(0, BD)
    sample_tiles = tl.cdiv(batch, BB)
    rest = tl.program_id(0) // column_tiles
    sample = ((rest % sample_tiles) * BB + tl.arange(0, BB)).to(tl.int64)
    part = rest // sample_tiles
    left, is_sample = column < D, sample < batch
    total = tl.zeros((BB, BD), dtype=tl.float32)
    for start in range(part * part_size, tl.minimum((part + 1) * part_size, size), BS):
        entry = start + tl.arange(0, BS)
        row = tl.load(index + entry, mask=entry < size, other=-1)
        real = row >= 0
        g = tl.load(
            dlogits + sample[:, None] * size + entry[None, :],
            mask=is_sample[:, None] & real[None, :],
            other=0.0,
        )
        if row_scale is not None:
            g *= tl.load(row_scale + 2 * row, mask=real, other=1.0)[None, :]
        w = tl.load(
            weight + row[:, None] * D + column[None, :], mask=real[:, None] & left[None, :], other=0
        )
        if LOW:
            w = common.operand(w, tl.bfloat16, EMULATED)
            total = common.dot(common.round_nearest(g, tl.bfloat16, EMULATED), w, total, EMULATED)
        else:
            total = common.dot(g, common.widen(w), total, EMULATED)
    at = parts + (part.to(tl.int64) * batch + sample[:, None]) * D + column[None, :]
    tl.store(at, total, mask=is_sample[:, None] & left[None, :])


def _in_bf16(weight: Tensor) -> bool:
    """Whether the products of a table run in bf16, in which e4m3 is exact."""
    return weight.dtype in (torch.bfloat16, torch.uint8)


def _product_format(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the format in which x meets the table on the tensor cores.

    fp32 where the two formats share none.
    """
    if _in_bf16(weight):
        return torch.bfloat16
    return weight.dtype if weight.dtype == x.dtype else torch.float32


def shortlist_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, row_scale: Tensor | None = None
) -> Tensor:
    """See `xmlkernels.ops.shortlist_matmul`; a CUDA graph can capture it."""
    batch, size, width = x.shape[0], index.shape[-1], x.shape[1]
    logits = torch.empty(batch, size, dtype=torch.float32, device=x.device)
    weight = common.table_bits(weight)
    if logits.numel() == 0:
        return logits
    if index.dim() == 2:
        entries, columns = LIST_TILE
        _score_lists[(batch * triton.cdiv(size, entries),)](
            x,
            weight,
            bias,
            row_scale,
            index,
            logits,
            size,
            D=width,
            HAS_BIAS=bias is not None,
            BS=entries,
            BD=columns,
            **common.LAUNCH,
        )
        return logits
    x = x.to(_product_format(x, weight))
    entries, samples, columns, warps = SHARED_TILE_FP32 if x.dtype == torch.float32 else SHARED_TILE
    samples = common.power_of_2(batch, 16, samples)
    _score_shared[(triton.cdiv(size, entries) * triton.cdiv(batch, samples),)](
        x,
        weight,
        bias,
        row_scale,
        index,
        logits,
        batch,
        size,
        D=width,
        HAS_BIAS=bias is not None,
        EMULATED=common.emulated(),
        BS=entries,
        BB=samples,
        BD=columns,
        num_warps=warps,
        **common.LAUNCH,
    )
    return logits


def shortlist_backward(
    dlogits: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    row_scale: Tensor | None = None,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `xmlkernels.ops.shortlist_matmul`.

    The number of rows is data: where they are asked for, the host waits for the device twice (for
    it, and for whether there are pads), and the call cannot be captured in a CUDA graph. dx alone
    waits for nothing.
    """
    empty = torch.empty(0, dtype=torch.float32, device=x.device)
    weight = common.table_bits(weight)
    dx = _input_gradient(dlogits, x, weight, row_scale, index) if need_dx else empty
    if not (need_dweight or need_dbias):
        return dx, index.new_empty(0), empty.view(0, 1).expand(0, x.shape[1]).contiguous(), empty
    rows, order, start = occurrences(index if x.shape[0] else index[..., :0])
    grad = torch.empty(
        rows.shape[0] if need_dweight else 0, x.shape[1], dtype=torch.float32, device=x.device
    )
    dbias = torch.empty(rows.shape[0] if need_dbias else 0, dtype=torch.float32, device=x.device)
    if rows.shape[0]:
        low = _in_bf16(weight)
        tile = (
            (1, 1, LIST_TILE[1], 4)
            if index.dim() == 2
            else SHARED_TILE
            if low
            else SHARED_TILE_FP32
        )
        row_gradients(
            dlogits, x, index, order, start, grad, dbias, need_dweight, need_dbias, low, tile
        )
    return dx, rows, grad, dbias


def _input_gradient(
    dlogits: Tensor, x: Tensor, weight: Tensor, row_scale: Tensor | None, index: Tensor
) -> Tensor:
    batch, size, width = x.shape[0], index.shape[-1], x.shape[1]
    dx = torch.empty(batch, width, dtype=torch.float32, device=x.device)
    if batch == 0 or size == 0:
        return dx.zero_()
    if index.dim() == 2:
        entries, columns = LIST_TILE
        _dx_lists[(batch * triton.cdiv(width, columns),)](
            dlogits,
            weight,
            row_scale,
            index,
            dx,
            size,
            D=width,
            BS=entries,
            BD=columns,
            **common.LAUNCH,
        )
        return dx
    low = _in_bf16(weight)
    entries, samples, columns, warps = SHARED_TILE if low else SHARED_TILE_FP32
    samples = common.power_of_2(batch, 16, samples)
    # From the shapes alone, so that the order of the sum is the same in every run and on every
    # card.
    part_size = triton.cdiv(triton.cdiv(size, SPLITS), entries) * entries
    splits = triton.cdiv(size, part_size)
    parts = torch.empty(splits, batch, width, dtype=torch.float32, device=x.device)
    _dx_shared[(splits * triton.cdiv(batch, samples) * triton.cdiv(width, columns),)](
        dlogits,
        weight,
        row_scale,
        index,
        parts,
        batch,
        size,
        part_size,
        D=width,
        LOW=low,
        EMULATED=common.emulated(),
        BS=entries,
        BB=samples,
        BD=columns,
        num_warps=warps,
        **common.LAUNCH,
    )
    return parts.sum(0)
