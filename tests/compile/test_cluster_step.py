"""The kernels of `cluster_step_` compile for cards that are not here, without spilling."""

from typing import Any

import pytest
import torch

from compiled import ARCHES, E4M3_ARCHES, SMALL, compile_kernel
from xmlkernels.triton import cluster_step as kernel

pytestmark = pytest.mark.compile
F32, BF16, F16, I32, I64 = torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64
U8 = torch.uint8  # e4m3 as its bits; its products run in bf16
STATES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32-adam": (F32, {"momentum": F32, "second": F32}),
    "bf16-momentum-kahan": (BF16, {"momentum": BF16, "kahan": BF16}),
    "bf16-adam": (BF16, {"momentum": BF16, "second": BF16}),
    "bf16-row-adam": (BF16, {"momentum": BF16, "second": F32, "ROW_WISE": True}),
    "fp16-adam": (F16, {"momentum": F16, "second": F16}),
}
EIGHT: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "e4m3-sgd": (U8, {"row_scale": F32}),
    "e4m3-row-adam": (U8, {"row_scale": F32, "momentum": BF16, "second": F32, "ROW_WISE": True}),
}
CASES = [(a, s) for a in ARCHES for s in STATES] + [(a, s) for a in E4M3_ARCHES for s in EIGHT]


@pytest.mark.parametrize("large", [False, True], ids=["clusters", "level0"])
@pytest.mark.parametrize("arch, states", CASES)
def test_step_tiles(arch: str, states: str, large: bool) -> None:
    dtype, given = (STATES | EIGHT)[states]
    low = dtype in (BF16, U8)
    rows, pairs, columns = kernel.MOST if low else kernel.MOST_FP32
    if not large:
        rows, pairs = 16, 16
    kinds: dict[str, Any] = dict.fromkeys(("momentum", "second", "kahan", "row_scale"))
    kinds |= {k: v for k, v in given.items() if k != "ROW_WISE"}
    kinds |= dict.fromkeys(
        ("bias", "moment", "scores", "gradient", "parts", "losses", "pos_value", "hyper"), F32
    )
    kinds |= dict.fromkeys(("order", "group", "edge", "pos_edge", "pos_row", "counter"), I64)
    kinds |= {
        "weight": dtype,
        "x": BF16 if low else dtype,
        "flag": I32,
        "pos_sample": I32,
        "correction": F32,
        "row_offset": "i64",
    }
    numbers = (
        "cluster_rows",
        "chosen",
        "tiles",
        "first_tile",
        "part_tiles",
        "first_column",
        "last_column",
    )
    kinds |= dict.fromkeys(numbers, "i32")
    constants = {
        "D": 768,
        "ROW_WISE": given.get("ROW_WISE", False),
        "SCORE": True,
        "NEED_LOSS": True,
        "DECOUPLED": True,
        "LOW": low,
        "EMULATED": False,
        "BR": rows,
        "BP": pairs,
        "BD": columns,
    }
    divisible, warps = ("first_column", "last_column"), 8 if rows == 64 else 4
    got = compile_kernel(
        kernel._step_tiles, arch, kinds, constants, divisible=divisible, num_warps=warps
    )
    assert (got.stack, got.local) == (0, 0) and got.shared <= SMALL
    assert got.mma == (dtype != F32)
    # wgmma takes 64 rows at a time: level 0 of a cascade has them, a cluster of a few labels has
    # not.
    assert got.wgmma == (arch == "sm_90a" and rows >= 64)


@pytest.mark.parametrize("arch", ARCHES)
def test_sum_parts(arch: str) -> None:
    kinds = {
        "parts": F32,
        "clusters": I64,
        "row_ptr": I64,
        "hyper": F32,
        "flag": I32,
        "dx": F32,
        "rows": "i64",
    }
    kinds |= dict.fromkeys(
        ("chosen", "first_tile", "part_tiles", "first_column", "last_column"), "i32"
    )
    constants = {"D": 768, "FIRST": False, "BR": 16, "BS": kernel.SUMMANDS, "BD": 64}
    got = compile_kernel(
        kernel._sum_parts, arch, kinds, constants, divisible=("first_column", "last_column")
    )
    assert (got.stack, got.local) == (0, 0) and got.shared <= SMALL
