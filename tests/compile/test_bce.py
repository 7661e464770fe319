"""`bce_step_` and `bce_loss`: every kernel compiles for every architecture, within its registers
and shared memory, with accesses as wide as they can be.
"""

import re
from typing import Any

import pytest
import torch

from compiled import ARCHES, E4M3_ARCHES, LARGE, SMALL, Compiled, compile_kernel
from xmlkernels.triton import bce_loss, bce_plan, bce_step, bce_tile, bce_update, positives, skip
from xmlkernels.triton.bce_plan import make_plan
from xmlkernels.triton.bce_tile import GRADIENT_SCALE

pytestmark = pytest.mark.compile
F32, BF16, F16, I32, I64 = torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64
E4M3, BITS = torch.float8_e4m3fn, torch.uint8
SIZES = dict.fromkeys(("batch", "rows", "first", "chunk", "pitch", "D", "b_blocks"), "i32")
SIZES |= {"row_offset": "i64"}
# rows and batch are odd in every benchmark; D = 768 as in the figures to reach.
ALIGNED = ("D", "chunk", "pitch", "first")
NARROW = r"(LD|ST)G\.E\.[US](8|16)\b"  # accesses of one or two bytes per thread
ALL_STATES = {"momentum": BF16, "second": BF16, "kahan": BF16}
# What is compiled: (batch, format of the table, by descriptors, arch).
WAYS = [
    (128, BF16, True, "sm_90a"),
    (512, F16, True, "sm_90a"),
    (128, BF16, False, "sm_80"),
    (512, F16, False, "sm_80"),
    (128, E4M3, True, "sm_90a"),
    (512, E4M3, False, "sm_89"),
    (128, F32, False, "sm_80"),
    (128, F32, False, "sm_90a"),
]
Way = tuple[int, torch.dtype, bool, str]


def name_of(way: Way) -> str:
    batch, dtype, tma, arch = way
    return f"B{batch}-{str(dtype)[6:]}-{'tma' if tma else 'pointers'}-{arch}"


def kinds_of(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Return how kernels take the table, and the format of its products."""
    return (BITS, BF16) if dtype == E4M3 else (dtype, dtype)


def build(
    kernel: Any,
    way: Way,
    arguments: dict[str, Any],
    matrices: dict[str, tuple[int, int]],
    options: dict[str, Any],
    **constants: Any,
) -> Compiled:
    """Compile as the launcher does: `matrices` are the boxes of x, weight and gradient."""
    batch, dtype, tma, arch = way
    stored, kind = kinds_of(dtype)
    p = make_plan(batch, 768, dtype)
    for name, (r, c) in matrices.items():
        element = stored if name == "weight" else kind
        short = {F32: "fp32", BF16: "bf16", F16: "fp16", BITS: "u8"}[element]
        arguments[name] = f"tensordesc<{short}[{r}, {c}]>" if tma else element
    blocks = {
        "BLOCK_B": p.block_b,
        "BLOCK_L": p.block_l,
        "BLOCK_R": p.block_r,
        "BLOCK_D": p.block_d,
        "STEP": p.step,
        "TMA": tma,
        "EMULATED": False,
        "GROUP": bce_plan.GROUP,
        "B_BLOCKS": 2,
        "G_SCALE": GRADIENT_SCALE[kind],
        "DECOUPLED": True,
        "STARTS": 1,
        "PARTS": 1,
    } | constants
    blocks = {k: v for k, v in blocks.items() if k in kernel.arg_names}
    given = {k: v for k, v in (SIZES | arguments).items() if k in kernel.arg_names}
    given = {k: v for k, v in given.items() if k not in blocks}
    aligned = tuple(name for name in ALIGNED if name in given)
    return compile_kernel(kernel, arch, given, blocks, divisible=aligned, **options)


def check(got: Compiled, way: Way) -> None:
    _, dtype, tma, arch = way
    assert (got.stack, got.local) == (0, 0), got.registers
    assert got.shared <= (LARGE if tma else SMALL)
    if dtype != F32:
        assert got.wgmma if arch == "sm_90a" else got.mma
    code = "\n".join(i.text for i in got.code.instructions)
    assert ("UTMALDG" in code) == tma
    assert not re.search(NARROW, code), re.findall(NARROW + ".*", code)


def check_runs_on(got: Compiled, outer: str, inner: str) -> None:
    """One loop was made of both: what descriptors load runs on while a tile is finished."""
    (loop,) = (found for found in got.code.loops if found.statement in (outer, inner))
    loads = [i for i, c in enumerate(got.code.instructions) if "UTMALDG" in c.opcode]
    assert len(loop.always.intersection(loads)) == 2  # both operands, in every trip


def scores(way: Way, narrow: bool, large: bool = False, **more: Any) -> Compiled:
    p, scaled = make_plan(way[0], 768, way[1]), F32 if way[1] == E4M3 else None
    side = min(p.block_b, 64) if narrow else p.block_b
    labels, side = p.large_score(way[0]) if large else (p.block_l, side)
    tensors = dict.fromkeys(("bias", "pos_value", "column_sum", "loss", "peaks"))
    tensors |= {"row_scale": scaled, "starts": I64, "pos_row": I64, "pos_sample": I32} | more
    matrices = {
        "x": (side, p.step),
        "weight": (labels, p.step),
        "gradient": (labels, side),
    }
    options = bce_plan.score_options(way[1], narrow, large)
    constants = {"BLOCK_L": labels, "BLOCK_B": side, "STARTS": labels // p.block_l}
    constants["SINGLY"] = not narrow or way[1] == F32
    return build(bce_tile.score_tiles, way, tensors, matrices, options, **constants)


@pytest.mark.parametrize("way", [way for way in WAYS if way[2]], ids=name_of)
def test_wide_scores(way: Way) -> None:
    """Two programs a processor, so that one's epilogue overlaps the other's products."""
    got = scores(way, narrow=False, peaks=None if way[1] == E4M3 else F32)
    check(got, way)
    assert got.occupancy >= 2


LARGER = [(batch, dtype, True, "sm_90a") for batch in (128, 512) for dtype in (BF16, F16)]
"""Where tiles are larger than elsewhere."""


@pytest.mark.parametrize("way", LARGER, ids=name_of)
def test_large_scores(way: Way) -> None:
    """One program a processor, whose loads run on during its epilogue."""
    got = scores(way, narrow=False, large=True)
    check(got, way)
    check_runs_on(got, "score_tiles: for tile", "score_tiles: for d")
    assert {make_plan(*w[:1], 768, w[1]).wide for w in WAYS if w[1] in (E4M3, F32)} == {1}


@pytest.mark.parametrize("way", LARGER[2:], ids=name_of)
def test_update_rows_in_parts(way: Way) -> None:
    """The same, for the update of a table without states."""
    p = make_plan(way[0], 768, way[1])
    block_r, block_d = 2 * p.block_r, 2 * p.block_d
    boxes = {"x": (p.step, block_d), "weight": (block_r, block_d // 4)}
    boxes["gradient"] = (block_r, p.step)
    for bias in (None, F32):
        tensors = updates(way, {}, quiet=None, bias=bias, column_sum=bias)
        sizes = {"BLOCK_R": block_r, "BLOCK_D": block_d, "PARTS": 4}
        options = bce_plan.update_options(tma=True, plain=False, large=True)
        got = build(bce_update.update_rows, way, tensors, boxes, options, **sizes)
        check(got, way)
        check_runs_on(got, "update_rows: for tile", "row_gradient: for b")


@pytest.mark.parametrize("values", [None, F32], ids=["", "values"])
@pytest.mark.parametrize("way", WAYS, ids=name_of)
def test_narrow_scores(way: Way, values: torch.dtype | None) -> None:
    if values and way[1] == F16:
        pytest.skip("compiled for the other formats")
    sums = dict.fromkeys(("bias", "column_sum", "loss", "peaks"), F32)
    check(scores(way, narrow=True, pos_value=values, **sums), way)


@pytest.mark.parametrize("way", [*WAYS, LARGER[2]], ids=name_of)
def test_add_dx(way: Way) -> None:
    p = make_plan(way[0], 768, way[1])
    block_d = p.block_d * (p.wide if way[2] else 1)
    boxes = {"gradient": (p.block_r, p.block_b), "weight": (p.block_r, block_d)}
    options = bce_plan.dx_options(way[2], p.wide > 1)
    for order in (None, I32):
        tensors = {"partial": F32, "order": order}
        got = build(bce_tile.add_dx, way, tensors, boxes, options, BLOCK_D=block_d)
        check(got, way)


def updates(way: Way, states: dict[str, torch.dtype], **more: Any) -> dict[str, Any]:
    """Return the tensors of an update."""
    tensors = dict.fromkeys(("momentum", "second", "kahan")) | states
    tensors |= {"column_sum": F32, "bias": F32, "hyper": F32, "counter": I64, "flag": I32}
    tensors["correction"] = F32 if "second" in states else None
    return tensors | {"row_scale": F32 if way[1] == E4M3 else None} | more


def states_of(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return all states that a table of a format may have."""
    if dtype == F32:
        return {"momentum": F32, "second": F32}
    return {k: v for k, v in ALL_STATES.items() if dtype != E4M3 or k != "kahan"}


@pytest.mark.parametrize("states", [False, True], ids=["sgd", "all states"])
@pytest.mark.parametrize("way", WAYS, ids=name_of)
def test_update_rows(way: Way, states: bool) -> None:
    if not states and way[0] == 128 and way[2]:
        pytest.skip("one kernel forms dX and updates the rows")
    p = make_plan(way[0], 768, way[1])
    step = min(p.step, p.block_b)
    boxes = {
        "x": (step, p.block_d),
        "weight": (p.block_r, p.block_d),
        "gradient": (p.block_r, step),
    }
    options = bce_plan.update_options(way[2], plain=not states)
    given = states_of(way[1]) if states else {}
    tensors = updates(way, given, quiet=I32 if states else None)
    got = build(bce_update.update_rows, way, tensors, boxes, options)
    check(got, way)
    if not states and way[2]:
        assert got.occupancy >= 2


@pytest.mark.parametrize("states", [{}, {"momentum": BF16}, ALL_STATES], ids=len)
@pytest.mark.parametrize("skips", [False, True], ids=["", "skips"])
@pytest.mark.parametrize("dtype", [BF16, F16, E4M3], ids=lambda dtype: str(dtype)[6:])
def test_step_tiles(dtype: torch.dtype, skips: bool, states: dict[str, torch.dtype]) -> None:
    """DX and the update in one kernel: two programs a processor where there is no state."""
    if (dtype != BF16 or len(states) == 1) and (states or skips) and (dtype, skips) != (E4M3, True):
        pytest.skip("compiled for bf16")
    if dtype == E4M3 and states:
        pytest.skip("two kernels: the registers do not suffice")
    way = (128, dtype, True, "sm_90a")
    p = make_plan(128, 768, dtype)
    boxes = {
        "x": (p.block_b, p.block_d),
        "weight": (p.block_r, p.block_d),
        "gradient": (p.block_r, p.block_b),
    }
    tensors = updates(way, states, partial=F32, order=I32 if skips else None)
    plain = not states and not skips
    options = bce_plan.step_options(plain)
    got = build(bce_step.step_tiles, way, tensors, boxes, options)
    check(got, way)
    if plain:
        assert got.occupancy == 2
        tensors |= {"bias": None, "column_sum": None}
        got = build(bce_step.step_tiles, way, tensors, boxes, options)
        check(got, way)
        assert got.occupancy == 2


@pytest.mark.parametrize("way", [WAYS[0], WAYS[2], WAYS[4], WAYS[6]], ids=name_of)
def test_store_gradient(way: Way) -> None:
    p = make_plan(way[0], 768, way[1])
    step = min(p.step, p.block_b)
    boxes = {"x": (step, p.block_d), "gradient": (p.block_r, step)}
    tensors = {"column_sum": F32, "dweight": F32, "dbias": F32, "flag": I32}
    tensors["row_scale"] = F32 if way[1] == E4M3 else None
    options = bce_plan.update_options(way[2], plain=True)
    check(build(bce_loss.store_gradient, way, tensors, boxes, options), way)


@pytest.mark.parametrize("arch", ARCHES)
def test_the_small_kernels(arch: str) -> None:
    sums = {"partial": F32, "dx": F32, "hyper": F32, "flag": I32, "count": "i32", "segments": "i32"}
    losses = {"part": F32, "loss": F32, "hyper": F32, "flag": I32, "count": "i32"}
    starts = {"pos_row": I64, "starts": I64, "count": "i32", "rows": "i32", "blocks": "i32"}
    groups = {"peaks": F32, "starts": I64, "hyper": F32, "reach": F32, "flag": I32}
    groups |= {"quiet": I32, "order": I32, "skipped": I64, "skip_below": "fp32"}
    groups |= dict.fromkeys(("rows", "first", "chunk", "b_blocks"), "i32")
    most = bce_plan.CHUNK // bce_plan.GROUP
    for kernel, arguments, constants, warps in (
        (bce_tile.sum_dx, sums, {"G_SCALE": 1.0, "BLOCK": 1024}, 4),
        (bce_tile.sum_loss, losses, {"BLOCK": 1024}, 4),
        (positives.find_starts, starts, {"BLOCK_L": 128, "BLOCK": 128}, 4),
        (skip.choose_groups, groups, {"GROUP": bce_plan.GROUP, "GROUPS": most}, 8),
    ):
        got = compile_kernel(kernel, arch, arguments, constants, num_warps=warps)
        assert (got.stack, got.local) == (0, 0) and got.shared <= SMALL


def test_architectures_are_those_of_the_other_kernels() -> None:
    assert {arch for *_, arch in WAYS} == {*ARCHES, *E4M3_ARCHES}
