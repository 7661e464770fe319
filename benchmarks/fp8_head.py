"""A table of 8-bit numbers, and the batch of `benchmarks/head.py`."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.head import Head, make_head
from benchmarks.shapes import Shape

FP8, SCALE = torch.float8_e4m3fn, 2.0**-8
_ROWS = 1 << 19


@dataclass
class Fp8Head(Head):
    """As `Head`, with a table in e4m3.

    Attributes:
        row_scale: fp32 [L, 2], the power-of-two scale and the largest magnitude so far.
    """

    row_scale: Tensor


def make_fp8_head(shape: Shape, device: str) -> Fp8Head:
    """Make N(0, 0.02²) rows in e4m3 at the initial scale of 2⁻⁸.

    x is that of every other format, the positives are of the same kind. The table is made a part at
    a time: in bf16 it might not fit the card.
    """
    weight = torch.empty(shape.L, shape.D, dtype=FP8, device=device)
    row_scale = torch.full((shape.L, 2), SCALE, device=device)
    g = torch.Generator(device).manual_seed(0)
    for start in range(0, shape.L, _ROWS):
        rows = min(_ROWS, shape.L - start)
        part = torch.empty(rows, shape.D, device=device).normal_(0, 0.02, generator=g)
        stored = (part / SCALE).to(FP8)
        weight[start : start + rows] = stored
        row_scale[start : start + rows, 1] = stored.float().abs().amax(1) * SCALE
    batch = make_head(replace(shape, D=1), "fp32", device)
    x = torch.randn(shape.B, shape.D, generator=torch.Generator().manual_seed(1)).to(device)
    return Fp8Head(weight, x, batch.pos_row, batch.pos_sample, row_scale)
