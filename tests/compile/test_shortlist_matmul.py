"""The kernels of `shortlist_matmul` compile for cards that are not here, without spilling; dense
products on tensor cores.
"""

from typing import Any

import pytest
import torch

from compiled import ARCHES, E4M3_ARCHES, SMALL, Compiled, compile_kernel
from xmlkernels.triton import shortlist_matmul as kernel
from xmlkernels.triton import shortlist_rows

pytestmark = pytest.mark.compile
FORMATS = [
    (arch, dtype) for arch in ARCHES for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
FORMATS += [(arch, torch.uint8) for arch in E4M3_ARCHES]  # e4m3, as its bits
every = pytest.mark.parametrize(
    "arch, dtype", FORMATS, ids=lambda v: v if isinstance(v, str) else str(v)[6:]
)
F32, I64 = torch.float32, torch.int64
NEED = {"D": 768, "NEED_GRAD": True, "NEED_DBIAS": True}


def built(
    fn: Any, arch: str, dtype: torch.dtype, constants: dict[str, Any], warps: int = 4
) -> Compiled:
    kinds = dict.fromkeys(("bias", "logits", "dlogits", "dx", "parts", "grad", "dbias"), F32)
    small = dtype == torch.uint8
    kinds |= {
        "x": torch.bfloat16 if small else dtype,
        "weight": dtype,
        "row_scale": F32 if small else None,
        "index": I64,
        "order": I64,
        "start": I64,
        "samples": torch.int32,
    }
    kinds |= dict.fromkeys(("batch", "size", "part_size", "unique"), "i32")
    kinds = {name: kinds[name] for name in fn.arg_names if name in kinds}
    got = compile_kernel(
        fn,
        arch,
        kinds,
        constants,
        divisible=tuple(n for n in kinds if n == "size"),
        num_warps=warps,
    )
    assert (got.stack, got.local) == (0, 0) and got.shared <= SMALL
    return got


@every
def test_lists(arch: str, dtype: torch.dtype) -> None:
    entries, columns = kernel.LIST_TILE
    score = built(
        kernel._score_lists, arch, dtype, {"D": 768, "HAS_BIAS": True, "BS": entries, "BD": columns}
    )
    dx = built(kernel._dx_lists, arch, dtype, {"D": 768, "BS": entries, "BD": columns})
    rows = built(
        shortlist_rows._rows_lists,
        arch,
        dtype,
        {**NEED, "BO": shortlist_rows.OCCURRENCES, "BD": columns},
    )
    for got in (score, dx, rows):
        assert not got.code.static(r"(LDG|STG|LDGSTS)\.E\.[US](8|16)")
        assert not got.code.subroutines  # a division of 64-bit numbers is one


@every
def test_shared(arch: str, dtype: torch.dtype) -> None:
    def tile(fp32: bool) -> tuple[dict[str, Any], int]:
        entries, samples, columns, warps = kernel.SHARED_TILE_FP32 if fp32 else kernel.SHARED_TILE
        return {"EMULATED": False, "BS": entries, "BB": samples, "BD": columns}, warps

    constants, warps = tile(dtype == F32)
    got = built(kernel._score_shared, arch, dtype, {"D": 768, "HAS_BIAS": True, **constants}, warps)
    assert got.mma == (dtype != F32) and got.wgmma == (dtype != F32 and arch == "sm_90a")
    # Gradients of fp16 tables stay fp32: fp16 has no room for small ones.
    low = dtype in (
        torch.bfloat16,
        torch.uint8,
    )
    constants, warps = tile(not low)
    for fn, more in ((kernel._dx_shared, {"D": 768}), (shortlist_rows._rows_shared, NEED)):
        got = built(fn, arch, dtype, {**more, "LOW": low, **constants}, warps)
        assert got.mma == low and got.wgmma == (low and arch == "sm_90a")
