"""The last rows of a table with more than 2^31 elements: addresses are 64-bit from the first
multiplication.
"""

import dataclasses

import pytest
import torch

from common import assert_same_bits, dyadic_step, huge_table
from tiny import step_op
from xmlkernels.reference import cluster_step as reference_cluster
from xmlkernels.reference import matmul_topk as reference_topk
from xmlkernels.reference import shortlist_matmul as reference_shortlist
from xmlkernels.triton import bce_tile, cluster_step, matmul_topk, shortlist_matmul
from xmlkernels.triton.bce_plan import Plan

# 4,096 labels are one block: the interpreter's time goes by programs, not by their size.
WIDE = Plan(chunk=4096, block_b=16, block_l=4096, block_r=4096, block_d=16, step=128, splits=1)


def test_rows_beyond_2_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    d, edge = 16, 1 << 21
    # The last piece of memory, of its own, begins at element 2^31.
    n = (1 << 31) // d + (edge // (2 * d))
    table = huge_table(n, d, edge)
    last = n - 4096
    small = dyadic_step(5, 4096, d, torch.bfloat16, row_offset=last)
    table[last:] = small.tensors["weight"]
    # The chunks before the last hold zeros and would take hours; they leave sums that are zero.
    monkeypatch.setattr(bce_tile.Tiles, "__iter__", lambda self: iter([self.rows - 4096]))
    buffers = bce_tile.Tiles.buffers

    def zeroed(self: bce_tile.Tiles, **asked: bool) -> None:
        buffers(self, **asked)
        self.partial.zero_()

    monkeypatch.setattr(bce_tile.Tiles, "buffers", zeroed)
    t = small.replace(pos_row=small.tensors["pos_row"] + last).tensors
    dx, _ = step_op(
        table,
        t["x"],
        t["pos_row"],
        t["pos_sample"],
        t["hyper"],
        t["counter"],
        plan=WIDE,
        need_loss=False,
    )
    wide = small.reference()
    assert last % WIDE.chunk == 0 and last * d >= 1 << 31
    assert_same_bits({"weight": table[last:], "dx": dx}, wide)
    assert (table[: edge // (2 * d)] == 0).all() and (
        table[last - 8192 : last] == 0
    ).all()  # nothing went elsewhere


# The last FAR rows hold numbers; before them everything is zero.
WIDTH = 1024
FAR = 64
EDGE = 1 << 21
ROWS = (1 << 31) // WIDTH + EDGE // (2 * WIDTH)


def far_table(width_used: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """A table of more than 2^31 elements, and a copy of its last rows: small whole numbers in the
    first columns.
    """
    table = huge_table(ROWS, WIDTH, EDGE)
    g = torch.Generator().manual_seed(0)
    table[-FAR:, :width_used] = torch.randint(-3, 4, (FAR, width_used), generator=g).to(
        torch.bfloat16
    )
    assert (ROWS - FAR) * WIDTH >= 1 << 31
    return table, table[-FAR:].clone()


def whole(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def test_top_of_the_last_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    table, last = far_table()
    bias, x = torch.zeros(ROWS), whole(3, WIDTH).to(torch.bfloat16)
    bias[-FAR:] = whole(FAR)
    small = matmul_topk.plan(3, FAR, 7)
    # The chunks between the first and the last hold zeros and would take hours.
    far = dataclasses.replace(small, chunks=[(0, FAR), (ROWS - FAR, ROWS)])
    monkeypatch.setattr(matmul_topk, "plan", lambda *_: far)
    values, rows = matmul_topk.matmul_topk(x, table, bias, 7, row_offset=5)
    expected, expected_rows = reference_topk.matmul_topk(
        x, last, bias[-FAR:], 7, row_offset=5 + ROWS - FAR
    )
    assert (expected > 0).all()  # the first rows' scores are zero
    assert torch.equal(values, expected) and torch.equal(rows, expected_rows)


@pytest.mark.parametrize("shared", [False, True], ids=["lists", "shared"])
def test_lists_of_the_last_rows(shared: bool) -> None:
    table, last = far_table()
    bias, x = torch.zeros(ROWS), whole(3, WIDTH).to(torch.bfloat16)
    bias[-FAR:] = whole(FAR)
    near = (
        torch.tensor([0, 63, -1, 5, 63])
        if shared
        else torch.tensor([[0, 63, 5], [-1, 1, 1], [63, 62, 7]])
    )
    far, dlogits = torch.where(near < 0, -1, near + ROWS - FAR), whole(3, near.shape[-1], seed=2)
    logits = shortlist_matmul.shortlist_matmul(x, table, bias, far)
    assert torch.equal(logits, reference_shortlist.shortlist_matmul(x, last, bias[-FAR:], near))
    dx, rows, grad, dbias = shortlist_matmul.shortlist_backward(
        dlogits, x, table, far, need_dbias=True
    )
    expected = reference_shortlist.shortlist_backward(dlogits, x, last, near, need_dbias=True)
    for mine, theirs in zip((dx, rows - (ROWS - FAR), grad, dbias), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("few", [0, 4], ids=["tiles", "pairs"])
def test_clusters_of_the_last_rows(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    """Table, momentum and their updates; rows before the two clusters stay zero."""
    monkeypatch.setattr(cluster_step, "FEW", few)
    table, _last = far_table()
    momentum = huge_table(ROWS, WIDTH, EDGE)
    momentum[-FAR:, :16] = (whole(FAR, 16, seed=3) / 8).to(torch.bfloat16)
    small = dyadic_step(5, FAR, WIDTH, torch.bfloat16, share=0.0).tensors
    table[-FAR:] = small["weight"]
    near = {"weight": small["weight"].clone(), "momentum": momentum[-FAR:].clone()}
    clusters = torch.tensor([[1, 2], [2, -1], [1, -1], [-1, -1], [2, 1]])
    row = torch.tensor([0, 40, 63])
    sample, ptr = torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([0, 0, 40, FAR])
    steer = (small["hyper"], small["counter"])
    begin = ROWS - FAR
    far_ptr = torch.where(torch.arange(4) == 0, 0, ptr + begin)
    call = (clusters, far_ptr, 40, row + begin, sample, *steer)
    dx, scores, _ = cluster_step.cluster_step_(table, small["x"], *call, momentum=momentum)
    expected = reference_cluster.cluster_step_(
        near["weight"],
        small["x"],
        clusters,
        ptr,
        40,
        row,
        sample,
        *steer,
        momentum=near["momentum"],
        row_offset=begin,
    )
    assert_same_bits({"weight": table[-FAR:], "momentum": momentum[-FAR:]}, near)
    assert torch.equal(dx, expected[0]) and torch.equal(scores, expected[1])
    for whole_table in (table, momentum):
        assert (whole_table[: EDGE // (2 * WIDTH)] == 0).all()
        assert (whole_table[-2 * FAR : -FAR] == 0).all()
