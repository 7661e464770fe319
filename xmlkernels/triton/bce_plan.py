"""Sizes of the two-pass schedule that the full-label ops share: constants of the shape.

Nothing here asks for the card, so that the bits of a result do not depend on it.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from xmlkernels.triton import common

GRADIENT_BYTES = 192 << 20  # of the gradient of a chunk of labels
SCRATCH_BYTES = 256_000_000  # of all that a call takes beyond the table and its results
SMALL_BYTES = 16 << 20  # of what is kept per label or per tile
CHUNK = 1 << 20  # labels of a chunk at most: what else is kept of one stays small
PROGRAMS = 264  # that share a chunk in the dX product: two per processor of the largest cards
GROUP = 128  # rows that are skipped together; the reference's number


@dataclass(frozen=True)
class Plan:
    """Block sizes, powers of two >= 16.

    The last place of dX depends on them, and that of rows through fp32 sums over D and B.
    """

    chunk: int  # labels whose gradient is kept at a time, a multiple of block_l
    block_b: int
    block_l: int  # labels of a tile of logits, a multiple of block_r
    block_r: int  # labels of a tile of the other two products
    block_d: int
    step: int  # how far one product of the tensor cores reaches along D or B
    splits: int  # programs that share the labels of a chunk, each with its own sum of dX
    # Where descriptors feed them, tiles are so many times as large, for fewer bytes from L2: one
    # side of logits, columns of dX, both sides of an update of its own. No sum depends on it.
    wide: int = 1

    def pitch(self, batch: int) -> int:
        """Return the samples of a row of the gradient: all accesses are 128 bits wide."""
        return triton.cdiv(max(batch, 1), self.block_b) * self.block_b

    def large_score(self, batch: int) -> tuple[int, int]:
        """Return the labels and samples of a tile of logits that descriptors feed.

        Samples where whole tiles take them all: their operands are read from shared memory less.
        """
        blocks = triton.cdiv(batch, self.block_b)
        if blocks % self.wide:
            return self.wide * self.block_l, self.block_b
        return self.block_l, self.wide * self.block_b

    def with_rows(self, rows: int) -> "Plan":
        """Return the same plan for a table smaller than a chunk."""
        chunk = triton.cdiv(max(rows, 1), self.block_l) * self.block_l
        return replace(self, chunk=min(self.chunk, chunk))


def make_plan(batch: int, width: int, dtype: torch.dtype) -> Plan:
    """Return block sizes for a table of a format.

    The gradient of a chunk takes `GRADIENT_BYTES` at most, and 256 labels at least; all scratch
    takes `SCRATCH_BYTES` at most, unless the batch alone fills them. All tiles fit the 99 KB of
    shared memory that the smallest cards have, but for those that descriptors feed.
    """
    wide = dtype == torch.float32
    side = 64 if wide else 128
    block_b = common.power_of_2(batch, 16, side)
    # dX and the rows' gradient share the registers where there is one block of samples.
    block_d = common.power_of_2(width, 16, 64 if batch <= block_b else side)
    blocks = triton.cdiv(max(batch, 1), block_b) * triton.cdiv(width, block_d)
    plan = Plan(
        chunk=GROUP,
        block_b=block_b,
        block_l=GROUP,
        block_r=64,
        block_d=block_d,
        # e4m3 is converted in registers: shorter steps.
        step=32 if wide else 64,
        splits=max(1, PROGRAMS // blocks),
        # e4m3 is converted in registers, which then do not suffice.
        wide=2 if dtype.itemsize == 2 and block_b == side else 1,
    )
    element = 4 if wide else 2
    # The batch in the table's format, and sums of dX: one alone stands where the result will.
    others = batch * width * (element + (4 * plan.splits if plan.splits > 1 else 0))
    kept = min(GRADIENT_BYTES, SCRATCH_BYTES - SMALL_BYTES - others)
    labels = max(0, kept) // (plan.pitch(batch) * element)
    return replace(plan, chunk=max(2 * GROUP, min(CHUNK, labels // 1024 * 1024)))


def score_options(dtype: torch.dtype, narrow: bool, large: bool = False) -> dict[str, Any]:
    """Return how `score_tiles` is compiled: two wide tiles a processor, a narrow or a large one."""
    options = {"num_warps": 16 if dtype == torch.float32 else 8, "num_stages": 2, **common.LAUNCH}
    if large:
        return options | {"num_stages": 3}
    return options if narrow else options | {"maxnreg": 128}


def dx_options(tma: bool, wide: bool = False) -> dict[str, Any]:
    """Return how `add_dx` is compiled; wide: one tile a processor, with room for more buffers."""
    return {"num_warps": 8, "num_stages": (4 if wide else 3) if tma else 2, **common.LAUNCH}


def update_options(tma: bool, plain: bool, large: bool = False) -> dict[str, Any]:
    """Return how `update_rows` and `store_gradient` are compiled.

    plain: no states, two programs a processor, or more. large: one, with room for more buffers.
    """
    stages = 4 if large else 3 if tma else 2
    return {"num_warps": 4 if plain else 8, "num_stages": stages, **common.LAUNCH}


def step_options(plain: bool) -> dict[str, Any]:
    """Return how `step_tiles` is compiled: without states, two programs a processor."""
    return {"num_warps": 4 if plain else 8, "num_stages": 3, **common.LAUNCH}
