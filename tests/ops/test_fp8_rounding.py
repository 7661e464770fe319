"""e4m3 by the reference: every code, and rounding without bias over the whole range, subnormals
included.
"""

import pytest
import torch
from torch import Tensor

from common import bits, unit
from xmlkernels.reference.rounding import WEIGHT, decode, philox, random32, round_e4m3

E4M3 = torch.float8_e4m3fn
CODES = torch.arange(256, dtype=torch.uint8)
WEIGHTS = [0.0, 1e-4, 0.002, 0.0117, 0.0156, 0.5, 3.0]
DELTAS = [0.0, 1e-3, 3.3e-5, -1e-6, 7e-8, 2.0**-30, -(2.0**-34), 1e-12]


def value_of(code: int) -> float:
    """By the format's definition: 4 bits of exponent (bias 7), 3 of mantissa."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    size = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -size if code & 0x80 else size


@pytest.mark.parametrize("scale", [1.0, 2.0**-8, 2.0**-100, 2.0**100])
def test_the_reference_decodes_every_code(scale: float) -> None:
    expected = torch.tensor([value_of(c) * scale for c in range(256)])
    got = decode(CODES.view(E4M3)[:, None], torch.tensor([[scale, 0.0]]).expand(256, 2))[:, 0]
    assert torch.equal(got.nan_to_num(-1), expected.nan_to_num(-1))
    assert torch.equal(got.isnan(), expected.isnan())


def starts(scale: float) -> Tensor:
    """Table values near WEIGHTS (and two of the other sign) less DELTAS, in units of the scale."""
    start = (torch.tensor([*WEIGHTS, -0.0117, -0.5]) / scale).clamp(-448, 448).to(
        E4M3
    ).float() * scale
    return ((start[:, None] - torch.tensor(DELTAS)).flatten() / scale).clamp(-448, 448)


@pytest.mark.parametrize("scale", [1.0, 2.0**-8])
def test_rounding_is_unbiased_over_many_words(scale: float) -> None:
    """65,536 words spread evenly: the mean is the value to 2^-16 of a unit."""
    value, words = starts(scale), (torch.arange(65536) << 16) + 0x8000
    rounded = round_e4m3(value[:, None].expand(-1, 65536), words)
    error = (rounded.float().double().mean(1) - value.double()).abs() / unit(value, E4M3)
    assert (error <= 2.0**-16).all(), value[error > 2.0**-16]


@pytest.mark.parametrize("scale", [1.0, 2.0**-8])
def test_rounding_is_unbiased_over_all_words(scale: float) -> None:
    """The result grows with the word, and the word at which it changes is the value's fraction of a
    unit: so the mean over all 2^32 words is the value, to 2^-32 of a unit."""
    tiny = torch.tensor([2.0**-9 * f for f in (7.3, 0.71, 0.01, 1e-4, 3e-8, 1e-9, 1e-20)])
    value = torch.cat([starts(scale), tiny, -tiny])
    units = unit(value, E4M3)
    low = (value.double().abs() / units).floor()
    # Words of 2^32 that round away.
    chance = ((value.double().abs() / units - low) * 2.0**32).floor().to(torch.int64)
    for word, away in (
        (2**32 - chance - 1, 0),
        (2**32 - chance, 1),
        (0 * chance, 0),
        (0 * chance + 2**32 - 1, 1),
    ):
        some = (chance > 0) | torch.tensor(away == 0)
        got = round_e4m3(value, word.clamp(max=2**32 - 1)).float().double().abs()
        assert torch.equal(got[some], ((low + away) * units)[some].clamp(max=448))


def test_rounding_picks_a_neighbour_and_keeps_what_is_stored() -> None:
    g = torch.Generator().manual_seed(0)
    value = torch.randn(20000, generator=g) * torch.exp2(
        torch.randint(-14, 8, (20000,), generator=g).float()
    )
    rounded = round_e4m3(value, torch.randint(0, 2**32, (20000,), generator=g))
    assert ((rounded.float().double() - value.double()).abs() < unit(value, E4M3))[
        value.abs() < 448
    ].all()
    real = CODES[CODES.bitwise_and(0x7F) != 0x7F].view(E4M3)
    assert torch.equal(bits(round_e4m3(real.float(), torch.full((254,), 2**32 - 1))), bits(real)), (
        "a stored value moved"
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_saturates(sign: int) -> None:
    value = torch.tensor([448, 449, 470, 1e9, 3.4e38, torch.inf])[:, None].expand(-1, 3)
    assert (
        round_e4m3(sign * value, torch.tensor([0, 2**31, 2**32 - 1])).float() == sign * 448
    ).all()


def test_random32_lays_out_the_draw() -> None:
    """Column c takes word c % 4 of draw c // 4, with the row's high half in the counter."""
    counter, row = torch.tensor([7, 9]), 2**33 + 5
    got = random32(counter, torch.tensor([row]), 11, WEIGHT)[0]
    for column in range(11):
        parts = tuple(torch.tensor(v) for v in (5, 2, column // 4, WEIGHT))
        draw = philox((counter[0], counter[1]), (parts[0], parts[1], parts[2], parts[3]))
        assert int(got[column]) == int(draw[column % 4])
