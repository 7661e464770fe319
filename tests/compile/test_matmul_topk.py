"""The kernels of `matmul_topk` compile for cards that are not here, without spilling, on the tensor
cores.
"""

from typing import Any

import pytest
import torch

from compiled import ARCHES, E4M3_ARCHES, LARGE, SMALL, Compiled, compile_kernel
from xmlkernels.triton import matmul_topk as kernel

pytestmark = pytest.mark.compile
F32, I32, I64, E4M3 = torch.float32, torch.int32, torch.int64, torch.uint8
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", E4M3: "u8"}


def compiled(
    kind: Any,
    arch: str,
    dtype: torch.dtype,
    *,
    samples: int = 128,
    descriptors: bool = False,
    bias: bool = True,
    first: bool = False,
    width: int = 768,
) -> Compiled:
    """Compile one kernel of tiles; an e4m3 table is uint8, and its products run in bf16."""
    labels, most, step, warps = (
        kernel.TILE_TMA
        if descriptors
        else kernel.TILE_SMALL
        if dtype == F32 or width % 16
        else kernel.TILE
    )
    block, format_x = min(samples, most), torch.bfloat16 if dtype == E4M3 else dtype
    kinds = {
        "x": format_x,
        "weight": dtype,
        "bias": F32 if bias else None,
        "row_scale": F32 if dtype == E4M3 else None,
        "threshold": F32,
        "begin": "i32",
        "flag": I32,
        "state": I32,
        "low": I64,
        "used": I32,
        "keys": I64,
        "bins": I32,
        "end": "i32",
        "batch": "i32",
        "capacity": "i32",
        "shift": "i32",
        "span": "i32",
    }
    if descriptors:
        kinds["x"] = f"tensordesc<{NAMES[format_x]}[{block}, {step}]>"
        kinds["weight"] = f"tensordesc<{NAMES[dtype]}[{labels}, {step}]>"
    constants = {
        "D": width,
        "HAS_BIAS": bias,
        "TMA": descriptors,
        "EMULATED": False,
        "BL": labels,
        "BB": block,
        "BD": step,
    }
    if kind is kernel.score_labels:
        constants["FIRST"] = first
    return compile_kernel(
        kind,
        arch,
        {name: kinds[name] for name in kind.arg_names if name in kinds},
        constants,
        divisible=("begin",) if "begin" in kind.arg_names else (),
        num_warps=warps,
        num_stages=kernel.STAGES_TMA if descriptors else kernel.STAGES,
    )


CASES = [
    *((arch, dtype) for arch in ARCHES for dtype in (F32, torch.bfloat16, torch.float16)),
    *((arch, E4M3) for arch in E4M3_ARCHES),
]


@pytest.mark.parametrize("samples, first", [(16, False), (128, False), (128, True)])
@pytest.mark.parametrize("arch, dtype", CASES, ids=str)
def test_pointers(arch: str, dtype: torch.dtype, samples: int, first: bool) -> None:
    got = compiled(kernel.score_labels, arch, dtype, samples=samples, first=first)
    assert (got.stack, got.local) == (0, 0) and got.shared <= SMALL
    assert got.mma == (dtype != F32) and got.wgmma == (dtype != F32 and arch == "sm_90a")


@pytest.mark.parametrize("samples, first", [(16, False), (128, False), (128, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3], ids=str)
def test_descriptors(dtype: torch.dtype, samples: int, first: bool) -> None:
    """Table and batch come by TMA alone: the loop holds no other load."""
    given = {"samples": samples, "descriptors": True, "first": first}
    got = compiled(kernel.score_labels, "sm_90a", dtype, **given)
    assert (got.stack, got.local) == (0, 0) and got.shared <= LARGE
    assert got.wgmma and "cp.async.ca" not in got.ptx and "cp.async.cg" not in got.ptx
    assert got.code.static("UTMALDG") and not got.code.static("LDGSTS|LDG.*[US](8|16)")


def test_a_tile_keeps_its_budget_of_instructions() -> None:
    """256 labels by 128 samples, D = 768, a table without bias. The product; the search for what
    passes, 1.5 instructions for each of 128 scores of a thread and what loads the thresholds; and
    one key of each word of a row.
    """
    got = compiled(kernel.score_labels, "sm_90a", torch.bfloat16, descriptors=True, bias=False)
    loops = {"score_labels: for tile": 1, "_scores: for start": 12}
    none, one = (got.count(loops | {TURN: turns}) for turns in (0, 1))
    none_at_all = got.count(loops | {TURN: 0, "score_labels: for tile": 0})
    assert none.issue - none_at_all.issue <= BUDGET["tile"]
    assert one.issue - none.issue <= BUDGET["turn"]
    assert one.matching("BAR") - none.matching("BAR") <= BUDGET["barriers"]


TURN = "_append_passing: while tl.max(tl.reshape(left, (4 * BL,)), axis=0) > 0"
BUDGET = {"tile": 2210, "turn": 310, "barriers": 11}


@pytest.mark.parametrize("kind", [kernel.score_labels, kernel.recount_labels], ids=str)
@pytest.mark.parametrize(
    "arch, dtype", [("sm_80", torch.bfloat16), ("sm_89", E4M3), ("sm_90a", torch.float16)], ids=str
)
def test_rows_of_any_width(kind: Any, arch: str, dtype: torch.dtype) -> None:
    """Read number by number, where rows begin anywhere: slow, but nothing spills."""
    got = compiled(kind, arch, dtype, width=767)
    assert (got.stack, got.local) == (0, 0) and got.shared <= SMALL and got.mma


@pytest.mark.parametrize(
    "arch, dtype, descriptors",
    [
        ("sm_80", torch.bfloat16, False),
        ("sm_80", F32, False),
        ("sm_89", E4M3, False),
        ("sm_90a", torch.bfloat16, True),
        ("sm_90a", E4M3, True),
    ],
    ids=str,
)
def test_lists_that_overflow(arch: str, dtype: torch.dtype, descriptors: bool) -> None:
    got = compiled(kernel.recount_labels, arch, dtype, descriptors=descriptors)
    assert (got.stack, got.local) == (0, 0) and got.shared <= (LARGE if descriptors else SMALL)


@pytest.mark.parametrize("arch", ARCHES)
def test_raise_bounds(arch: str) -> None:
    kinds = {
        "state": I32,
        "low": I64,
        "above": I64,
        "bins": I32,
        "capacity": "i32",
        "rank": "i32",
        "shift": "i32",
    }
    got = compile_kernel(
        kernel.raise_bounds, arch, kinds, {"BINS": 1 << kernel.BIN_BITS}, num_warps=8
    )
    assert (got.stack, got.local) == (0, 0) and got.shared <= SMALL


@pytest.mark.parametrize("arch", ARCHES)
def test_cut_lists(arch: str) -> None:
    kinds = {
        "exclude": I64,
        "threshold": F32,
        "used": I32,
        "keys": I64,
        "flag": I32,
        "state": I32,
        "low": I64,
        "k": "i32",
        "excluded": "i32",
        "row_offset": "i64",
        "capacity": "i32",
    }
    for again, last, exclude, block in (
        (False, False, False, kernel.CUT_BLOCK),
        (True, True, True, kernel.CUT_BLOCK),
        (False, True, True, kernel.CUT_MOST),
    ):
        constants = {"AGAIN": again, "ALWAYS": not last, "LAST": last, "HAS_EXCLUDE": exclude}
        constants |= {"HELD": block, "BLOCK": kernel.CUT_BLOCK}
        warps = min(max(block // 512, 4), 16)
        got = compile_kernel(kernel.cut_lists, arch, kinds, constants, num_warps=warps)
        assert (got.stack, got.local) == (0, 0) and got.shared <= SMALL
