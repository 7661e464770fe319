"""Counter-based random words and unbiased rounding, for all ops that update in place.

Generator: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
with key (seed, step) and counter (row low, row high, column group, stream). One 128-bit draw serves
eight neighbouring columns, or four where the store is e4m3.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
WEIGHT, MOMENTUM, SECOND, RESCALE = 0, 1, 2, 3  # streams
E4M3 = torch.float8_e4m3fn
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(
    key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Return four 32-bit words (in int64 tensors) for each counter; operands broadcast."""
    k0, k1 = (k & MASK for k in key)
    c0, c1, c2, c3 = (c & MASK for c in counter)
    for _ in range(10):
        # The int64 product wraps, but its 64 bits are those of the unsigned one.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((p1 >> 32) & MASK) ^ c1 ^ k0
        c1 = p1 & MASK
        c2 = ((p0 >> 32) & MASK) ^ c3 ^ k1
        c3 = p0 & MASK
        k0, k1 = (k0 + _WEYL[0]) & MASK, (k1 + _WEYL[1]) & MASK
    return c0, c1, c2, c3


def _draws(counter: Tensor, rows: Tensor, groups: int, stream: int) -> tuple[Tensor, ...]:
    group = torch.arange(groups, device=rows.device)[None, :]
    row = rows[:, None]
    return philox((counter[0], counter[1]), (row, row >> 32, group, torch.full_like(group, stream)))


def random16(counter: Tensor, rows: Tensor, columns: int, stream: int) -> Tensor:
    """Return 16 random bits for each weight of some rows.

    Args:
        counter: int64 [2], seed and step.
        rows: int64 [N], global rows.
        columns: D.
        stream: WEIGHT, MOMENTUM or SECOND.

    Returns:
        int64 [N, D], values in [0, 65536): column c takes half c % 2 of word (c % 8) // 2 of draw
        c // 8.
    """
    words = _draws(counter, rows, (columns + 7) // 8, stream)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).flatten(1)[:, :columns]


def random32(counter: Tensor, rows: Tensor, columns: int, stream: int) -> Tensor:
    """Return 32 random bits for each weight, int64 [N, D] below 2^32.

    Column c takes word c % 4 of draw c // 4.
    """
    return torch.stack(_draws(counter, rows, (columns + 3) // 4, stream), dim=-1).flatten(1)[
        :, :columns
    ]


def round_e4m3(value: Tensor, r32: Tensor) -> Tensor:
    """Round finite fp32 values to e4m3, without bias.

    The mean over all 2^32 values of `r32` is the value itself (to 2^-32 of a unit, subnormals
    included). Saturates at 448.
    """
    bits = value.contiguous().view(torch.int32).to(torch.int64) & MASK
    exponent = (bits & 0x7FFFFFFF) >> 23
    normal = exponent >= 121  # from 2^-6; below, the unit stays 2^-9
    mantissa = torch.where(exponent > 0, (bits & 0x7FFFFF) | 0x800000, 0)
    drop = torch.where(normal, 20, (141 - exponent).clamp(max=60))
    units = (((mantissa << 32) >> drop) + r32) >> 32
    code = torch.where(normal, ((exponent - 121) << 3) + units, units).clamp(max=0x7E)
    return (code | ((bits >> 24) & 0x80)).to(torch.uint8).view(E4M3)


def decode(weight: Tensor, row_scale: Tensor | None = None) -> Tensor:
    """Return table rows [N, D] in the working precision.

    fp64 stays fp64, all else becomes fp32; e4m3 is multiplied by the row's scale, row_scale[:, 0].
    """
    if row_scale is None:
        return weight.to(torch.promote_types(weight.dtype, torch.float32))
    return weight.to(torch.float32) * row_scale[:, :1]


def encode(
    value: Tensor, row_scale: Tensor, counter: Tensor, rows: Tensor, stream: int
) -> tuple[Tensor, Tensor]:
    """Return fp32 values [N, D] as e4m3 in units of the row's scale, and each row's maximum."""
    scale = row_scale[:, :1]  # a power of two: the quotient is exact
    code = round_e4m3(value / scale, random32(counter, rows, value.shape[1], stream))
    return code, decode(code, row_scale).abs().amax(1)


def round_stochastic(value: Tensor, r16: Tensor, dtype: torch.dtype) -> Tensor:
    """Round finite fp32 values to bf16 or fp16, without bias.

    The mean over all 65,536 values of `r16` is the value itself (to 2^-16 of a unit, subnormals
    included). Saturates at the format's largest finite value.
    """
    bits = value.contiguous().view(torch.int32).to(torch.int64) & MASK
    sign, magnitude = bits & 0x80000000, bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        half = ((magnitude + r16) >> 16).clamp(max=0x7F7F)
    elif dtype == torch.float16:
        exponent = magnitude >> 23
        # Below 2^-14 the unit of fp16 stays 2^-24, so more bits of the fp32 mantissa fall away;
        # from 40 on, all count for less than 2^-16 of a unit.
        drop = torch.where(exponent >= 113, 13, (126 - exponent).clamp(max=40))
        mantissa = torch.where(exponent > 0, (magnitude & 0x7FFFFF) | 0x800000, 0)
        units = (mantissa + ((r16 << 24) >> (40 - drop))) >> drop
        half = torch.where(exponent >= 113, ((exponent - 113) << 10) + units, units).clamp(
            max=0x7BFF
        )
    else:
        raise ValueError(f"no stochastic rounding to {dtype}")
    signed = half | (sign >> 16)
    return torch.where(signed >= 0x8000, signed - 0x10000, signed).to(torch.int16).view(dtype)


def store(value: Tensor, dtype: torch.dtype, counter: Tensor, rows: Tensor, stream: int) -> Tensor:
    """Return `value` [N, D] in a table's format: below fp32 rounded without bias; saturated."""
    if dtype in (torch.bfloat16, torch.float16):
        return round_stochastic(value, random16(counter, rows, value.shape[1], stream), dtype)
    return saturate(value, dtype)


def saturate(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round `value` to nearest in `dtype`; infinities become the largest finite value."""
    limit = torch.finfo(dtype).max
    return value.clamp(-limit, limit).to(dtype)
