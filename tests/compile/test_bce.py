"""`bce_step_` and `bce_loss`: every kernel compiles for every architecture, within its registers
and shared memory.
"""

from typing import Any

import pytest
import torch

from compiled import ARCHES, E4M3_ARCHES, LARGE, SMALL, Compiled, compile_kernel
from xmlkernels.triton import bce_loss, bce_step, bce_tile, positives, skip
from xmlkernels.triton.bce_tile import GRADIENT_SCALE, make_plan

pytestmark = pytest.mark.compile
F32, BF16, F16, I32, I64 = torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64
# (B, dtype of the table); D = 768 as in the figures to reach
TABLES = [(128, BF16), (512, F16), (128, F32)]
SIZES = {"batch": "i32", "rows": "i32", "first": "i32", "tile": "i32", "D": "i32"}
ALIGNED = ("D", "tile", "first", "batch")


def name_of(value: object) -> str | None:
    return f"B{value[0]}-{str(value[1])[6:]}" if isinstance(value, tuple) else None


def build(
    kernel: Any,
    arch: str,
    table: tuple[int, torch.dtype],
    arguments: dict[str, Any],
    **constants: Any,
) -> Compiled:
    p = make_plan(table[0], 768, table[1])
    blocks = {
        "BLOCK_B": p.block_b,
        "BLOCK_L": p.block_l,
        "BLOCK_D": p.block_d,
        "STEP": p.step,
        "EMULATED": False,
        "GROUP": skip.GROUP,
    }
    blocks["G_SCALE"] = GRADIENT_SCALE.get(table[1], 1.0)
    blocks = {k: v for k, v in blocks.items() if k in kernel.arg_names}
    aligned = tuple(name for name in (*ALIGNED, "segment_rows") if name in arguments)
    options = {"num_warps": p.warps, "num_stages": p.stages, "enable_fp_fusion": True}
    return compile_kernel(kernel, arch, arguments, blocks | constants, divisible=aligned, **options)


def check(got: Compiled, arch: str, table: tuple[int, torch.dtype]) -> None:
    assert (got.stack, got.local) == (0, 0), got.registers
    assert got.shared <= SMALL < LARGE  # one choice of blocks serves the smallest cards and sm_90a
    if table[1] != F32:
        assert got.wgmma if arch == "sm_90a" else got.mma


@pytest.mark.parametrize("values", [None, F32], ids=["", "values"])
@pytest.mark.parametrize("skips", [False, True], ids=["", "skips"])
@pytest.mark.parametrize("table", TABLES, ids=name_of)
@pytest.mark.parametrize("arch", ARCHES)
def test_gradient_tile(
    arch: str, table: tuple[int, torch.dtype], skips: bool, values: torch.dtype | None
) -> None:
    if values and skips:
        pytest.skip("each compiled alone")
    if values and table[1] == F16:
        pytest.skip("compiled for bf16")
    dtype = table[1]
    tensors = {
        "x": dtype,
        "weight": dtype,
        "bias": F32,
        "row_scale": None,
        "starts": I64,
        "pos_row": I64,
        "pos_sample": I32,
        "pos_value": values,
    }
    tensors |= {"gradient": dtype, "column_sum": F32, "loss": F32, "peaks": F32 if skips else None}
    check(build(bce_tile.gradient_tile, arch, table, tensors | SIZES), arch, table)


@pytest.mark.parametrize("skips", [False, True], ids=["", "skips"])
@pytest.mark.parametrize("table", TABLES, ids=name_of)
@pytest.mark.parametrize("arch", ARCHES)
def test_add_dx(arch: str, table: tuple[int, torch.dtype], skips: bool) -> None:
    tensors = {"gradient": table[1], "weight": table[1], "partial": F32, "segment_rows": "i32"}
    tensors["active"] = I32 if skips else None
    check(build(bce_tile.add_dx, arch, table, tensors | SIZES), arch, table)


STATES = {
    "sgd": {},
    "momentum": {"momentum": BF16},
    "kahan adam": {"momentum": BF16, "second": BF16, "kahan": BF16},
}


@pytest.mark.parametrize("skips", [False, True], ids=["", "skips"])
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("table", TABLES, ids=name_of)
@pytest.mark.parametrize("arch", ARCHES)
def test_update_rows(arch: str, table: tuple[int, torch.dtype], states: str, skips: bool) -> None:
    dtype = table[1]
    if skips and (table[0] == 512 or states == "momentum"):
        pytest.skip("compiled for B=128, without state and with all of them")
    if table[0] == 512 and states != "sgd":
        pytest.skip("compiled for B=128")
    given = dict.fromkeys(("momentum", "second", "kahan")) | STATES[states]
    if dtype == F32:
        given |= {"kahan": None} | {k: F32 for k, v in given.items() if v and k != "kahan"}
    tensors = {
        "x": dtype,
        "gradient": dtype,
        "column_sum": F32,
        "weight": dtype,
        "bias": F32,
        **given,
        "row_scale": None,
        "hyper": F32,
    }
    tensors |= {
        "counter": I64,
        "correction": F32 if given["second"] else None,
        "flag": I32,
        "quiet": I32 if skips else None,
    }
    sizes = SIZES | {"row_offset": "i64", "b_blocks": "i32"}
    check(build(bce_step.update_rows, arch, table, tensors | sizes, DECOUPLED=True), arch, table)


@pytest.mark.parametrize("table", [(128, BF16), (128, F32)], ids=name_of)
@pytest.mark.parametrize("arch", ARCHES)
def test_store_gradient(arch: str, table: tuple[int, torch.dtype]) -> None:
    tensors = {
        "x": table[1],
        "gradient": table[1],
        "column_sum": F32,
        "row_scale": None,
        "dweight": F32,
        "dbias": F32,
        "flag": I32,
    }
    check(
        build(bce_loss.store_gradient, arch, table, tensors | SIZES | {"b_blocks": "i32"}),
        arch,
        table,
    )


@pytest.mark.parametrize("part", ["gradient", "dx", "dweight", "update", "update adam"])
@pytest.mark.parametrize("arch", E4M3_ARCHES)
def test_e4m3_tables(arch: str, part: str) -> None:
    """The table as uint8; its products run in bf16."""
    table, weight = (128, torch.float8_e4m3fn), torch.uint8
    if part == "gradient":
        tensors = {
            "x": BF16,
            "weight": weight,
            "bias": F32,
            "row_scale": F32,
            "starts": I64,
            "pos_row": I64,
            "pos_sample": I32,
        }
        tensors |= {
            "pos_value": None,
            "gradient": BF16,
            "column_sum": F32,
            "loss": F32,
            "peaks": F32,
        }
        got = build(bce_tile.gradient_tile, arch, table, tensors | SIZES)
    elif part == "dx":
        tensors = {
            "gradient": BF16,
            "weight": weight,
            "partial": F32,
            "segment_rows": "i32",
            "active": I32,
        }
        got = build(bce_tile.add_dx, arch, table, tensors | SIZES)
    elif part == "dweight":
        tensors = {
            "x": BF16,
            "gradient": BF16,
            "column_sum": F32,
            "row_scale": F32,
            "dweight": F32,
            "dbias": F32,
            "flag": I32,
        }
        got = build(bce_loss.store_gradient, arch, table, tensors | SIZES | {"b_blocks": "i32"})
    else:
        state = BF16 if part == "update adam" else None
        tensors = {
            "x": BF16,
            "gradient": BF16,
            "column_sum": F32,
            "weight": weight,
            "bias": F32,
            "momentum": state,
        }
        tensors |= {
            "second": state,
            "kahan": None,
            "row_scale": F32,
            "hyper": F32,
            "counter": I64,
            "flag": I32,
        }
        tensors |= {
            "quiet": I32,
            "correction": F32 if state else None,
            "row_offset": "i64",
            "b_blocks": "i32",
        }
        got = build(bce_step.update_rows, arch, table, tensors | SIZES, DECOUPLED=True)
    check(got, arch, table)


@pytest.mark.parametrize("arch", ARCHES)
def test_the_small_kernels(arch: str) -> None:
    sums = {"partial": F32, "dx": F32, "hyper": F32, "flag": I32, "count": "i32", "segments": "i32"}
    losses = {"part": F32, "loss": F32, "hyper": F32, "flag": I32, "count": "i32"}
    starts = {"pos_row": I64, "starts": I64, "count": "i32", "rows": "i32", "blocks": "i32"}
    groups = {
        "peaks": F32,
        "starts": I64,
        "hyper": F32,
        "reach": F32,
        "flag": I32,
        "quiet": I32,
        "active": I32,
        "skipped": I64,
    }
    groups |= {
        "rows": "i32",
        "first": "i32",
        "tile": "i32",
        "b_blocks": "i32",
        "l_blocks": "i32",
        "skip_below": "fp32",
    }
    for kernel, arguments, constants in (
        (bce_tile.sum_dx, sums, {"G_SCALE": 1.0, "BLOCK": 1024}),
        (bce_tile.sum_loss, losses, {"BLOCK": 1024}),
        (positives.find_starts, starts, {"BLOCK_L": 64, "BLOCK": 512}),
        (skip.choose_groups, groups, {"GROUP": skip.GROUP, "BLOCK_L": 64, "GROUPS": 512}),
    ):
        got = compile_kernel(kernel, arch, arguments, constants)
        assert (got.stack, got.local) == (0, 0) and got.shared <= SMALL
