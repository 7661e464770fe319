"""The table's gradient of `shortlist_matmul` on the GPU, reduced row by row.

A row's entries are summed in the order of a stable sort, the same in every run, without atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton import common

OCCURRENCES = 4  # of one row, taken at a time


@triton.jit
def _rows_lists(
    dlogits,
    x,
    order,
    samples,
    start,
    grad,
    dbias,
    D: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    BO: tl.constexpr,
    BD: tl.constexpr,
):
    """Write grad fp32 [U, D] and dbias fp32 [U] of unique rows.

    Row u has the occurrences order[start[u] : start[u + 1]] (int64), of samples int32.
    """
    tiles: tl.constexpr = (D + BD - 1) // BD if NEED_GRAD else 1
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    column = tile * BD + tl.arange(0, BD)
    left = column < D
    total = tl.zeros((BO, BD), dtype=tl.float32)
    total_g = tl.zeros((BO,), dtype=tl.float32)
    end = tl.load(start + row + 1)
    for first in range(tl.load(start + row), end, BO):
        at = first + tl.arange(0, BO)
        place = tl.load(order + at, mask=at < end, other=0)
        sample = tl.load(samples + at, mask=at < end, other=0).to(tl.int64)
        g = tl.load(dlogits + place, mask=at < end, other=0.0)
        total_g += g
        if NEED_GRAD:
            e = tl.load(
                x + sample[:, None] * D + column[None, :],
                mask=(at < end)[:, None] & left[None, :],
                other=0.0,
            )
            total += g[:, None] * common.widen(e)
    if NEED_GRAD:
        tl.store(grad + row * D + column, tl.sum(total, axis=0), mask=left)
    if NEED_DBIAS:
        tl.store(dbias + row, tl.sum(total_g, axis=0), mask=tile == 0)


@triton.jit
def _rows_shared(
    dlogits,
    x,
    order,
    start,
    grad,
    dbias,
    batch,
    size,
    unique,
    D: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    LOW: tl.constexpr,
    EMULATED: tl.constexpr,
    BS: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the same for a shared list, BS rows at a time.

    The batch is the inner dimension of a product.
    """
    tiles: tl.constexpr = (D + BD - 1) // BD if NEED_GRAD else 1
    row = ((tl.program_id(0) // tiles) * BS + tl.arange(0, BS)).to(tl.int64)
    tile = tl.program_id(0) % tiles
    column = tile * BD + tl.arange(0, BD)
    left, is_row = column < D, row < unique
    begin = tl.load(start + row, mask=is_row, other=0)
    count = tl.load(start + row + 1, mask=is_row, other=0) - begin
    most = tl.max(count, axis=0)
    total = tl.zeros((BS, BD), dtype=tl.float32)
    total_g = tl.zeros((BS, BB), dtype=tl.float32)
    for j in range(0, most):
        entry = tl.load(order + begin + j, mask=j < count, other=0)
        for first in range(0, batch, BB):
            sample = (first + tl.arange(0, BB)).to(tl.int64)
            is_sample = sample < batch
            g_at = dlogits + sample[None, :] * size + entry[:, None]
            g = tl.load(g_at, mask=is_sample[None, :] & (j < count)[:, None], other=0.0)
            total_g += g
            if NEED_GRAD:
                e = tl.load(
                    x + sample[:, None] * D + column[None, :],
                    mask=is_sample[:, None] & left[None, :],
                    other=0.0,
                )
                if LOW:
                    total = common.dot(
                        common.round_nearest(g, e.dtype, EMULATED), e, total, EMULATED
                    )
                else:
                    total = common.dot(g, common.widen(e), total, EMULATED)
    if NEED_GRAD:
        tl.store(
            grad + row[:, None] * D + column[None, :], total, mask=is_row[:, None] & left[None, :]
        )
    if NEED_DBIAS:
        tl.store(dbias + row, tl.sum(total_g, axis=1), mask=is_row & (tile == 0))


def occurrences(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return unique rows [U], their places by row and place [N], and where each begins [U + 1]."""
    ids, order = torch.sort(index.reshape(-1), stable=True)
    rows, counts = torch.unique_consecutive(ids, return_counts=True)
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    if rows.shape[0] and int(rows[0]) < 0:  # pads stand first
        return rows[1:].contiguous(), order, start[1:].contiguous()
    return rows, order, start


def row_gradients(
    dlogits: Tensor,
    x: Tensor,
    index: Tensor,
    order: Tensor,
    start: Tensor,
    grad: Tensor,
    dbias: Tensor,
    need_grad: bool,
    need_dbias: bool,
    low: bool,
    tile: tuple[int, int, int, int],
) -> None:
    """Fill grad and dbias.

    low: the products of a shared list take bf16 operands. tile: its entries, samples, columns and
    warps (of lists per sample the columns alone).
    """
    batch, size, width, unique = x.shape[0], index.shape[-1], x.shape[1], start.shape[0] - 1
    need = {"NEED_GRAD": need_grad, "NEED_DBIAS": need_dbias}
    entries, samples, columns, warps = tile
    tiles = triton.cdiv(width, columns) if need_grad else 1
    if index.dim() == 2:
        _rows_lists[(unique * tiles,)](
            dlogits,
            x,
            order,
            # Once: a division of 64-bit numbers is a routine on a card.
            (order // size).int(),
            start,
            grad,
            dbias,
            D=width,
            **need,
            BO=OCCURRENCES,
            BD=columns,
            **common.LAUNCH,
        )
        return
    x = x.to(torch.bfloat16) if low else x
    samples = common.power_of_2(batch, 16, samples)
    _rows_shared[(triton.cdiv(unique, entries) * tiles,)](
        dlogits,
        x,
        order,
        start,
        grad,
        dbias,
        batch,
        size,
        unique,
        D=width,
        **need,
        LOW=low,
        EMULATED=common.emulated(),
        BS=entries,
        BB=samples,
        BD=columns,
        num_warps=warps,
        **common.LAUNCH,
    )
