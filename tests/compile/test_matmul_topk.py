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
    kind: Any, arch: str, dtype: torch.dtype, *, samples: int = 128, descriptors: bool = False
) -> Compiled:
    """Compile one kernel of tiles; an e4m3 table is uint8, and its products run in bf16."""
    labels, most, width, warps = (
        kernel.TILE_TMA if descriptors else kernel.TILE_FP32 if dtype == F32 else kernel.TILE
    )
    block, format_x = min(samples, most), torch.bfloat16 if dtype == E4M3 else dtype
    kinds = {
        "x": format_x,
        "weight": dtype,
        "bias": F32,
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
        kinds["x"] = f"tensordesc<{NAMES[format_x]}[{block}, {width}]>"
        kinds["weight"] = f"tensordesc<{NAMES[dtype]}[{labels}, {width}]>"
    constants = {
        "D": 768,
        "HAS_BIAS": True,
        "TMA": descriptors,
        "EMULATED": False,
        "BL": labels,
        "BB": block,
        "BD": width,
    }
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


@pytest.mark.parametrize("samples", [16, 128])
@pytest.mark.parametrize("arch, dtype", CASES, ids=str)
def test_pointers(arch: str, dtype: torch.dtype, samples: int) -> None:
    got = compiled(kernel._score_tiles, arch, dtype, samples=samples)
    assert (got.stack, got.local) == (0, 0) and got.shared <= SMALL
    assert got.mma == (dtype != F32) and got.wgmma == (dtype != F32 and arch == "sm_90a")


@pytest.mark.parametrize("samples", [16, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3], ids=str)
def test_descriptors(dtype: torch.dtype, samples: int) -> None:
    """Table and batch come by TMA alone: the loop holds no other load."""
    got = compiled(kernel._score_tiles, "sm_90a", dtype, samples=samples, descriptors=True)
    assert (got.stack, got.local) == (0, 0) and got.shared <= LARGE
    assert got.wgmma and "cp.async.ca" not in got.ptx and "cp.async.cg" not in got.ptx
    assert got.code.static("UTMALDG") and not got.code.static("LDGSTS|LDG.*[US](8|16)")


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
    got = compiled(kernel._recount_tiles, arch, dtype, descriptors=descriptors)
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
        kernel._raise_bounds, arch, kinds, {"BINS": 1 << kernel.BIN_BITS}, num_warps=8
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
    for again, last, exclude in ((False, False, False), (True, True, True)):
        constants = {"AGAIN": again, "LAST": last, "HAS_EXCLUDE": exclude}
        got = compile_kernel(
            kernel._cut_lists, arch, kinds, constants | {"BLOCK": kernel.CUT_BLOCK}
        )
        assert (got.stack, got.local) == (0, 0) and got.shared <= SMALL
