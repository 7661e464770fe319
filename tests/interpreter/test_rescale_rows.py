"""`rescale_rows_` in Triton: the reference's bits, and nothing of the other rows even read."""

import math

import pytest
import torch
from torch import Tensor

from common import assert_same_bits, make_counter, to_fp8
from counting import counted
from xmlkernels.reference.rescale_rows import rescale_rows_ as reference
from xmlkernels.triton import rescale_rows as kernel


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROWS", "COLUMNS"):
        monkeypatch.setattr(kernel, name, 16)


def table(n: int, d: int) -> dict[str, Tensor]:
    """Rows from far below their range to beyond it, several scales, maxima that claim more than
    their rows hold.
    """
    g = torch.Generator().manual_seed(0)
    size = torch.exp2(torch.rand(n, 1, generator=g) * 14 - 12)
    scale = torch.exp2(-torch.randint(6, 10, (n,), generator=g).float())
    spread = torch.exp2(-16 * torch.rand(n, d, generator=g))
    weight, row_scale = to_fp8(torch.randn(n, d, generator=g) * size * spread, scale)
    row_scale[3::7, 1] *= 4
    return {"weight": weight, "row_scale": row_scale}


def run(op: object, t: dict[str, Tensor], offset: int = 0) -> dict[str, Tensor]:
    t = {k: v.clone() for k, v in t.items()}
    return t | {"count": op(t["weight"], t["row_scale"], make_counter(), offset)}  # type: ignore[operator]


@pytest.mark.parametrize("shape", [(40, 37), (1, 1), (0, 5), (17, 16)], ids=str)
def test_the_reference_bit_for_bit(shape: tuple[int, int]) -> None:
    t = table(*shape)
    got = run(kernel.rescale_rows_, t, 2**33 - 9)
    assert_same_bits(got, run(reference, t, 2**33 - 9))
    assert shape[0] < 40 or 0 < int(got["count"]) < 40


def test_scales_at_every_limit() -> None:
    """Half the range and its neighbours, for no doubling, one and several; infinity, NaN, nothing;
    and the largest scale.
    """
    pairs = []
    for scale in (2.0**-100, 2.0**-8, 2.0**100):
        for doublings in (0, 1, 5):
            edge = torch.tensor(224 * scale * 2.0**doublings)
            near = (edge.nextafter(torch.tensor(to)) for to in (math.inf, 0.0))
            pairs += [(scale, float(v)) for v in (edge, *near)]
        pairs += [(scale, math.inf), (scale, math.nan), (scale, 0.0), (scale, 1e-45)]
    weight = (
        torch.arange(len(pairs) * 20)
        .remainder(127)
        .to(torch.uint8)
        .view(-1, 20)
        .view(torch.float8_e4m3fn)
    )
    t = {"weight": weight, "row_scale": torch.tensor(pairs)}
    got = run(kernel.rescale_rows_, t)
    assert_same_bits(got, run(reference, t))
    assert int(got["count"]) == 16 and got["row_scale"][9, 0] == 2.0**100


def test_rows_that_stay_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    t = table(40, 37)
    with counted(monkeypatch, t) as traffic:
        count = int(kernel.rescale_rows_(t["weight"], t["row_scale"], make_counter()))
    assert traffic.loads["weight"] == traffic.stores["weight"] == count * 37
    assert traffic.loads["row_scale"] == 2 * 40 and traffic.stores["row_scale"] == 2 * count
