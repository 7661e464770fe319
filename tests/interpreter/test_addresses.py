"""The last tile of a table with more than 2^31 elements: addresses are 64-bit from the first multiplication."""

import pytest
import torch

from common import assert_same_bits, dyadic_step, huge_table
from tiny import step_op
from xmlkernels.triton import bce_tile

# 4,096 labels are one block: the interpreter's time goes by programs, not by their size.
WIDE = bce_tile.Plan(tile=4096, block_b=16, block_l=4096, block_d=16, step=128, segments=1)


def test_rows_beyond_2_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    d, edge = 16, 1 << 21
    n = (1 << 31) // d + (edge // (2 * d))  # the last piece of memory, of its own, begins at element 2^31
    table = huge_table(n, d, edge)
    last = n - 4096
    small = dyadic_step(5, 4096, d, torch.bfloat16, row_offset=last)
    table[last:] = small.tensors["weight"]
    # The tiles before the last hold zeros and would take hours.
    monkeypatch.setattr(bce_tile.Tiles, "__iter__", lambda self: iter([self.rows - 4096]))
    t = small.replace(pos_row=small.tensors["pos_row"] + last).tensors
    dx, _ = step_op(
        table, t["x"], t["pos_row"], t["pos_sample"], t["hyper"], t["counter"], plan=WIDE, need_loss=False
    )  # fmt: skip
    wide = small.reference()
    assert last % WIDE.tile == 0 and last * d >= 1 << 31
    assert_same_bits({"weight": table[last:], "dx": dx}, wide)
    assert (table[: edge // (2 * d)] == 0).all() and (table[last - 8192 : last] == 0).all()  # nothing went elsewhere
