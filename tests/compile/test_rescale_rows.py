"""The kernel of `rescale_rows_` compiles for cards that are not here, without spilling."""

import pytest
import torch

from compiled import ARCHES, E4M3_ARCHES, SMALL, compile_kernel
from xmlkernels.triton import rescale_rows as kernel

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("arch", ARCHES | E4M3_ARCHES)
def test_rescale(arch: str) -> None:
    kinds = {
        "weight": torch.uint8,
        "row_scale": torch.float32,
        "counter": torch.int64,
        "changed": torch.int64,
    }
    kinds |= {"rows": "i32", "D": "i32", "row_offset": "i64"}
    constants = {"BR": kernel.ROWS, "BD": kernel.COLUMNS}
    got = compile_kernel(kernel._rescale, arch, kinds, constants, divisible=("D",))
    assert (got.stack, got.local) == (0, 0) and got.shared <= SMALL
