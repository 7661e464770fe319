"""Budgets of machine code: what a weight's update may cost, whatever kernel it stands in."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import sass_launch, sass_rows_bce, sass_rows_cluster_step, sass_rows_topk
from compiled import LARGE, SMALL, Compiled, compile_kernel
from xmlkernels.triton import bce_loss as triton_bce_loss
from xmlkernels.triton import shortlist_matmul as triton_shortlist
from xmlkernels.triton.rescale_rows import rescale_rows_
from xmlkernels.triton.update import update_tile

pytestmark = pytest.mark.compile
F32, BF16, F16, U8, I64 = torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64
ROWS, COLUMNS, WARPS = 64, 128, 8
AMAZON = sass_rows_cluster_step.BENCHMARK.gpu_shapes[0]
WEIGHTS = ROWS * COLUMNS / (32 * WARPS)  # of a thread
LOOP = "update_tiles: for begin"
# Tensors; instructions per weight for sm_90a.
BUDGETS: dict[str, tuple[dict[str, Any], float]] = {
    "bf16": ({"weight": BF16}, 13.0),
    "fp16": ({"weight": F16}, 18.5),
    "e4m3": ({"weight": U8, "row_scale": F32}, 26.6),
    "bf16 momentum": ({"weight": BF16, "momentum": BF16}, 22.6),
    "bf16 adam": ({"weight": BF16, "momentum": BF16, "second": BF16}, 48.0),
}


@triton.jit
def update_tiles(
    g,
    x,
    weight,
    momentum,
    second,
    row_scale,
    hyper,
    counter,
    correction,
    rows,
    D,
    UPDATE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
):
    """A product for each tile, and its update; or the tile written back as it was."""
    row, k = tl.arange(0, R), tl.arange(0, K)
    column = tl.program_id(1) * C + tl.arange(0, C)
    right = tl.load(x + k[:, None] * D + column[None, :])
    at = row[:, None] * D + column[None, :]
    grad = tl.zeros([R, C], dtype=tl.float32)
    for begin in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        first = begin.to(tl.int64)
        left = tl.load(g + (first * K + row[:, None] * K + k[None, :]))
        real = begin + row < rows
        mask = real[:, None] & (column < D)[None, :]
        if UPDATE:
            update_tile(
                weight + first * D,
                momentum if momentum is None else momentum + first * D,
                second if second is None else second + first * D,
                None,
                None if row_scale is None else row_scale + 2 * (first + row),
                hyper,
                counter,
                correction,
                at,
                mask,
                real,
                tl.dot(left, right),
                first + row,
                tl.program_id(1) * C,
                C,
                True,
                False,
            )
        else:
            grad = tl.dot(left, right, grad)
            tl.store(weight + first * D + at, tl.load(weight + first * D + at, mask=mask), mask)
    if not UPDATE:
        tl.store(hyper + at, grad)


def build(tensors: dict[str, Any], arch: str, *, update: bool) -> Compiled:
    kinds: dict[str, Any] = dict.fromkeys(("momentum", "second", "row_scale", "correction"))
    kinds |= {"g": BF16, "x": BF16, "hyper": F32, "counter": I64, "rows": "i32", "D": "i32"}
    kinds |= tensors | ({"correction": F32} if "second" in tensors else {})
    constants = {"UPDATE": update, "R": ROWS, "C": COLUMNS, "K": 16}
    options = {"divisible": ("rows", "D"), "num_warps": WARPS, "enable_fp_fusion": True}
    return compile_kernel(update_tiles, arch, kinds, constants, **options)


def of_a_tile(got: Compiled) -> float:
    """Instructions of a thread for one more tile."""
    return got.count({LOOP: 2}).issue - got.count({LOOP: 1}).issue


@pytest.mark.parametrize("name", BUDGETS)
def test_instructions_per_weight(name: str) -> None:
    """A product and the update of its tile, less the product and the tile written back unchanged:
    what is left is random words, conversions, the rule and the rounding.
    """
    tensors, budget = BUDGETS[name]
    with_update = build(tensors, "sm_90a", update=True)
    without = build({"weight": tensors["weight"]}, "sm_90a", update=False)
    assert (with_update.stack, with_update.local) == (0, 0)
    per_weight = (of_a_tile(with_update) - of_a_tile(without)) / WEIGHTS
    assert 0.9 * budget < per_weight <= budget


@pytest.mark.parametrize("name", ["bf16", "e4m3"])
def test_philox_multiplies_once_for_both_halves(name: str) -> None:
    got = build(BUDGETS[name][0], "sm_90a", update=True).count({LOOP: 1})
    draws = WEIGHTS / (4 if name == "e4m3" else 8)
    # Ten rounds of two products; in the first round some have one operand for all.
    assert 16 * draws <= got.matching(r"IMAD\.WIDE") <= 21 * draws + 8
    assert got.matching(r"IMAD\.HI") <= draws


@pytest.mark.parametrize("name", ["bf16", "e4m3"])
@pytest.mark.parametrize("arch", ["sm_89", "sm_90a", "sm_100a"])
def test_the_update_spills_nothing_and_moves_wide_words(name: str, arch: str) -> None:
    got = build(BUDGETS[name][0], arch, update=True)
    assert (got.stack, got.local) == (0, 0) and got.code.static("STL|LDL") == 0
    assert got.code.static(r"(LDG|STG)\.E\.[US](8|16)") == 0
    assert got.mma or "tcgen05" in got.ptx


def bce_loss() -> None:
    x, weight = torch.empty(128, 768), torch.empty(300_000, 768, dtype=BF16)
    row, sample = torch.empty(640, dtype=I64), torch.empty(640, dtype=torch.int32)
    triton_bce_loss.bce_loss(x, weight, None, row, sample)
    triton_bce_loss.bce_loss_backward(x, weight, None, row, sample)


def shortlist_matmul() -> None:
    x, weight = torch.empty(128, 768), torch.empty(300_000, 768, dtype=BF16)
    for index in (torch.empty(128, 512, dtype=I64), torch.empty(512, dtype=I64)):
        logits = triton_shortlist.shortlist_matmul(x, weight, None, index)
        triton_shortlist.shortlist_backward(logits, x, weight, index, need_dweight=False)


def rescale_rows() -> None:
    weight = torch.empty(300_000, 768, dtype=torch.float8_e4m3fn)
    rescale_rows_(weight, torch.empty(300_000, 2), torch.zeros(2, dtype=I64))


# By op: a call, and how many kernels it has at least.
CALLS: dict[str, tuple[Callable[[], object], int]] = {
    "bce_step bf16": (sass_rows_bce.bce_step(128, 300_000, BF16), 4),
    "bce_step bf16 512": (sass_rows_bce.bce_step(512, 300_000, BF16), 5),
    "bce_step fp8": (sass_rows_bce.bce_step(128, 300_000, torch.float8_e4m3fn), 4),
    "bce_loss": (bce_loss, 3),
    "matmul_topk": (sass_rows_topk.matmul_topk(128, 300_000, 100), 2),
    "cluster_step": (sass_rows_cluster_step.cluster_step(AMAZON, BF16), 5),
    "shortlist_matmul": (shortlist_matmul, 4),
    "rescale_rows": (rescale_rows, 1),
}


@pytest.mark.parametrize("op", CALLS)
def test_newer_cards_are_not_refused(op: str) -> None:
    """Every kernel that an op launches there compiles for sm_100a, and fits its shared memory."""
    call, least = CALLS[op]
    compiles(call, least, "sm_100a", LARGE)


@pytest.mark.parametrize("op", ["bce_step bf16", "matmul_topk", "cluster_step"])
def test_newer_cards_of_little_shared_memory_are_not_refused(op: str) -> None:
    """As those of sm_120, which have TMA, too, but less than half of the room."""
    call, least = CALLS[op]
    compiles(call, least, "sm_120a", SMALL)


def compiles(call: Callable[[], object], least: int, arch: str, shared: int) -> None:
    with sass_launch.recorded(arch) as launches:
        call()
    kernels = {launch.kernel.__name__: launch for launch in launches}
    assert len(kernels) >= least
    for name, launch in kernels.items():
        got = sass_launch.build(launch, arch).metadata.shared
        assert got <= shared, f"{name}: {got}"
