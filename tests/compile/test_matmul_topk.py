"""The kernels of `matmul_topk` compile for cards that are not here, without spilling, on the tensor
cores.
"""

import pytest
import torch

from compiled import ARCHES, E4M3_ARCHES, SMALL, compile_kernel
from xmlkernels.triton import matmul_topk as kernel

pytestmark = pytest.mark.compile
F32, I32, I64 = torch.float32, torch.int32, torch.int64


@pytest.mark.parametrize("samples", [16, 128])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("arch", ARCHES)
def test_score_tiles(arch: str, dtype: torch.dtype, samples: int) -> None:
    labels, most, width, warps = kernel.TILE_FP32 if dtype == F32 else kernel.TILE
    kinds = {
        "x": dtype,
        "weight": dtype,
        "bias": F32,
        "row_scale": None,
        "threshold": F32,
        "used": I32,
        "keys": I64,
        "begin": "i32",
        "end": "i32",
        "batch": "i32",
        "capacity": "i32",
    }
    constants = {
        "D": 768,
        "HAS_BIAS": True,
        "EMULATED": False,
        "BL": labels,
        "BB": min(samples, most),
        "BD": width,
    }
    got = compile_kernel(
        kernel._score_tiles, arch, kinds, constants, divisible=("begin",), num_warps=warps
    )
    assert (got.stack, got.local) == (0, 0) and got.shared <= SMALL
    assert got.mma == (dtype != F32) and got.wgmma == (dtype != F32 and arch == "sm_90a")


@pytest.mark.parametrize("samples", [16, 128])
@pytest.mark.parametrize("arch", E4M3_ARCHES)
def test_score_tiles_of_e4m3(arch: str, samples: int) -> None:
    """The table as uint8; its products run in bf16."""
    labels, _, width, warps = kernel.TILE
    kinds = {
        "x": torch.bfloat16,
        "weight": torch.uint8,
        "bias": F32,
        "row_scale": F32,
        "threshold": F32,
        "used": I32,
        "keys": I64,
        "begin": "i32",
        "end": "i32",
        "batch": "i32",
        "capacity": "i32",
    }
    constants = {
        "D": 768,
        "HAS_BIAS": True,
        "EMULATED": False,
        "BL": labels,
        "BB": samples,
        "BD": width,
    }
    got = compile_kernel(
        kernel._score_tiles, arch, kinds, constants, divisible=("begin",), num_warps=warps
    )
    assert (got.stack, got.local) == (0, 0) and got.shared <= SMALL
    assert got.mma and got.wgmma == (arch == "sm_90a")


@pytest.mark.parametrize("arch", ARCHES)
def test_cut_lists(arch: str) -> None:
    kinds = {
        "exclude": I64,
        "threshold": F32,
        "used": I32,
        "keys": I64,
        "k": "i32",
        "excluded": "i32",
        "row_offset": "i64",
        "capacity": "i32",
        "slack": "i32",
    }
    for constants in ({"LAST": True, "HAS_EXCLUDE": True}, {"LAST": False, "HAS_EXCLUDE": False}):
        got = compile_kernel(
            kernel._cut_lists, arch, kinds, constants | {"BLOCK": kernel.CUT_BLOCK}
        )
        assert (got.stack, got.local) == (0, 0) and got.shared <= SMALL
