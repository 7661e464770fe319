"""What the cases of the full-label ops are given: a table, a batch and its positives."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.case import DTYPES
from benchmarks.shapes import Shape

POSITIVES = 5


@dataclass
class Head:
    """A table and a batch.

    Attributes:
        weight: [L, D].
        x: [B, D] fp32.
        pos_row, pos_sample: int64 [P] and int32 [P], the positives sorted by (row, sample).
    """

    weight: Tensor
    x: Tensor
    pos_row: Tensor
    pos_sample: Tensor


def positives(shape: Shape) -> int:
    """Count the positives of a batch."""
    return min(POSITIVES, shape.L) * shape.B


def make_table(shape: Shape, dtype: str, device: str) -> Tensor:
    """Draw [L, D] numbers from N(0, 0.02²), the same in every process."""
    table = torch.empty(shape.L, shape.D, dtype=DTYPES[dtype], device=device)
    return table.normal_(0, 0.02, generator=torch.Generator(device).manual_seed(0))


def make_head(shape: Shape, dtype: str, device: str) -> Head:
    """Make a table and a batch of unit-scale embeddings with 5 labels per sample.

    The numbers are the same in every format and process.
    """
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape.B, shape.D, generator=g)
    pos_row, pos_sample = make_positives(shape, g)
    batch = (t.contiguous().to(device) for t in (x, pos_row, pos_sample))
    return Head(make_table(shape, dtype, device), *batch)


def make_positives(shape: Shape, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the positives of a batch: int64 [P] rows and int32 [P] samples, sorted by both."""
    count = min(POSITIVES, shape.L)
    start = torch.randint(shape.L, (shape.B, 1), generator=g)
    # Steps of one stride from a random start: distinct within a sample without drawing L numbers.
    rows = (start + torch.arange(count) * max(1, shape.L // count)) % shape.L
    samples = torch.arange(shape.B)[:, None].expand_as(rows)
    order = torch.argsort(rows.reshape(-1) * shape.B + samples.reshape(-1))
    return rows.reshape(-1)[order], samples.reshape(-1)[order].to(torch.int32)
