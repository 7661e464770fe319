"""What the cases of the full-label ops are given: a table, a batch and its positives."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.case import DTYPES
from benchmarks.shapes import Shape

POSITIVES = 5


@dataclass
class Head:
    """weight [L, D]; x [B, D] fp32; positives sorted by (row, sample): pos_row int64 [P],
    pos_sample int32 [P].
    """

    weight: Tensor
    x: Tensor
    pos_row: Tensor
    pos_sample: Tensor


def positives(shape: Shape) -> int:
    return min(POSITIVES, shape.L) * shape.B


def make_head(shape: Shape, dtype: str, device: str) -> Head:
    """The same numbers in every format and process: N(0, 0.02²) rows, unit-scale embeddings, 5
    labels per sample.
    """
    g = torch.Generator(device).manual_seed(0)
    weight = torch.empty(shape.L, shape.D, dtype=DTYPES[dtype], device=device).normal_(
        0, 0.02, generator=g
    )
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape.B, shape.D, generator=g)
    count = min(POSITIVES, shape.L)
    start = torch.randint(shape.L, (shape.B, 1), generator=g)
    # Steps of one stride from a random start: distinct within a sample without drawing L numbers.
    rows = (start + torch.arange(count) * max(1, shape.L // count)) % shape.L
    samples = torch.arange(shape.B)[:, None].expand_as(rows)
    order = torch.argsort(rows.reshape(-1) * shape.B + samples.reshape(-1))
    pos_row, pos_sample = rows.reshape(-1)[order], samples.reshape(-1)[order].to(torch.int32)
    return Head(weight, *(t.contiguous().to(device) for t in (x, pos_row, pos_sample)))
