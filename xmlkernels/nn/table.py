"""What every table of rows has in common: number formats, first values, rows read and written as
fp32.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TABLE_DTYPES = DTYPES | {"fp8": torch.float8_e4m3fn}
_FIRST_SCALE = 2.0**-8  # of each row of an fp8 table: values up to 1.75
_BLOCK = 1 << 22  # values at a time: a table below fp32 never stands in memory as fp32

Draw = Callable[[int, int, torch.Generator], Tensor]


def normal(std: float) -> Draw | None:
    """N(0, std²); None for 0, a table that is filled from a checkpoint."""
    return (
        (lambda rows, width, generator: torch.randn(rows, width, generator=generator) * std)
        if std != 0
        else None
    )


def xavier(nodes: int) -> Draw:
    """U(-a, a) with a = sqrt(6 / (n + D)) for a table of n rows (Glorot & Bengio, 2010)."""

    def draw(rows: int, width: int, generator: torch.Generator) -> Tensor:
        bound = math.sqrt(6 / (nodes + width))
        return torch.empty(rows, width).uniform_(-bound, bound, generator=generator)

    return draw


def new_table(
    rows: int, width: int, dtype: torch.dtype, seed: int, draw: Draw | None
) -> tuple[Tensor, Tensor | None]:
    """A table [n, D] of first values, zeros without `draw`, and the row_scale fp32 [n, 2] of an fp8
    one.
    """
    table = torch.zeros(rows, width, dtype=dtype)
    row_scale = (
        torch.tensor([[_FIRST_SCALE, 0.0]]).repeat(rows, 1)
        if dtype == TABLE_DTYPES["fp8"]
        else None
    )
    if draw is not None:
        generator = torch.Generator().manual_seed(
            seed
        )  # its own: the table must not depend on what was drawn before it
        for start, end in blocks(table):
            fill_rows(table, row_scale, start, draw(end - start, width, generator))
    return table, row_scale


def blocks(table: Tensor) -> Iterator[tuple[int, int]]:
    """(first, end) of its rows in turn, few enough to be held in fp32."""
    rows = max(1, _BLOCK // max(1, table.shape[1]))
    for start in range(0, table.shape[0], rows):
        yield start, min(start + rows, table.shape[0])


def fill_rows(table: Tensor, row_scale: Tensor | None, start: int, values: Tensor) -> None:
    """Rows start … from fp32 values; an fp8 table gets them by its scale, and row_scale their
    largest.
    """
    end = start + values.shape[0]
    if row_scale is None:
        table[start:end].copy_(values)
        return
    table[start:end].copy_((values / row_scale[start:end, :1]).clamp(-448, 448))
    row_scale[start:end, 1] = rows_of(table, row_scale, start, end).abs().amax(1)


def rows_of(table: Tensor, row_scale: Tensor | None, start: int, end: int) -> Tensor:
    """Rows start:end in fp32 [end - start, D], a copy."""
    part = table[start:end].to(torch.float32, copy=True)
    return part if row_scale is None else part * row_scale[start:end, :1]
