"""The shared device functions compile for every architecture without spilling."""

import pytest
import torch
import triton
import triton.language as tl

from compiled import ARCHES, SMALL, compile_kernel
from xmlkernels.triton import common

pytestmark = pytest.mark.compile


@triton.jit
def store_kernel(value, out, code, counter, width, R: tl.constexpr, C: tl.constexpr):
    """A tile rounded to the table's format, and to e4m3."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * C
    at = rows[:, None] * width + column + tl.arange(0, C)[None, :]
    v, seed, step = tl.load(value + at), tl.load(counter), tl.load(counter + 1)
    tl.store(
        out + at,
        common.to_stored(v, seed, step, rows, column, C, common.WEIGHT, out.dtype.element_ty),
    )
    r32 = common.random32(seed, step, rows, column, C, common.RESCALE)
    tl.store(code + at, common.encode_e4m3(v, r32)[0])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("arch", ARCHES)
def test_stores(arch: str, dtype: torch.dtype) -> None:
    kinds = {
        "value": torch.float32,
        "out": dtype,
        "code": torch.uint8,
        "counter": torch.int64,
        "width": "i32",
    }
    got = compile_kernel(store_kernel, arch, kinds, {"R": 32, "C": 128}, divisible=("width",))
    assert (got.stack, got.local) == (0, 0) and got.shared <= SMALL


@pytest.mark.parametrize("arch", ARCHES)
def test_prepare_batch(arch: str) -> None:
    kinds = {"x": torch.float32, "out": torch.bfloat16, "flag": torch.int32, "count": "i32"}
    constants = {"COPY": True, "EMULATED": False, "BLOCK": 1024}
    got = compile_kernel(common._prepare_batch, arch, kinds, constants, divisible=("count",))
    assert (got.stack, got.local) == (0, 0) and got.shared <= SMALL
