"""The generator and the unbiased rounding that all references share."""

import pytest
import torch

from common import DEVICES, LOW, bits, name_of, unit
from xmlkernels.reference.rounding import (
    MOMENTUM,
    SECOND,
    WEIGHT,
    philox,
    random16,
    round_stochastic,
    saturate,
    store,
)

EVERY_WORD = torch.arange(65536)


def words(key: str, counter: str) -> list[str]:
    k = [torch.tensor(int(w, 16)) for w in key.split()]
    c = [torch.tensor(int(w, 16)) for w in counter.split()]
    return [f"{int(w):08x}" for w in philox((k[0], k[1]), (c[0], c[1], c[2], c[3]))]


# The Philox-4x32-10 lines of `kat_vectors` in the Random123 distribution.
@pytest.mark.parametrize(
    "counter, key, expected",
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    assert words(key, counter) == expected.split()


def test_random16_lays_out_the_draw() -> None:
    """Column c takes half c % 2 (low first) of word (c % 8) // 2 of draw c // 8, with the row's
    high half in the counter.
    """
    counter, row = torch.tensor([0xA4093822, 0x299F31D0]), 0x85A308D3_243F6A88 - 2**64
    got = random16(counter, torch.tensor([row]), 19, stream=2)[0]
    for column in range(19):
        draw = words("a4093822 299f31d0", f"243f6a88 85a308d3 {column // 8:x} 2")
        word = int(draw[column % 8 // 2], 16)
        assert int(got[column]) == (word >> 16 if column % 2 else word & 0xFFFF), column


@pytest.mark.parametrize("device", DEVICES)
def test_random16_is_balanced_and_uncorrelated(device: str) -> None:
    r = random16(
        torch.tensor([5, 0], device=device), torch.arange(4096, device=device), 64, WEIGHT
    ).cpu()
    n = r.numel()
    assert int(r.min()) >= 0 and int(r.max()) < 65536
    for bit in range(16):
        ones = int((r >> bit & 1).sum())
        assert abs(ones - n / 2) < 5 * (n / 4) ** 0.5, f"bit {bit}"
    counts = torch.bincount(r.flatten() >> 8, minlength=256).double()
    chi_squared = float(((counts - n / 256) ** 2 / (n / 256)).sum())
    # 255 degrees of freedom: sigma = sqrt(510)
    assert 255 - 5 * 22.6 < chi_squared < 255 + 5 * 22.6
    centred = r.double() - 32767.5
    for name, a, b in (
        ("columns", centred[:, :-1], centred[:, 1:]),
        ("rows", centred[:-1], centred[1:]),
    ):
        correlation = float((a * b).mean() / centred.square().mean())
        assert abs(correlation) < 5 / n**0.5, f"neighbouring {name}"


def test_random16_depends_on_each_part_of_the_counter() -> None:
    rows = torch.arange(64)
    base = random16(torch.tensor([1, 2]), rows, 32, WEIGHT)
    others = {
        "seed": random16(torch.tensor([2, 2]), rows, 32, WEIGHT),
        "step": random16(torch.tensor([1, 3]), rows, 32, WEIGHT),
        "row": random16(torch.tensor([1, 2]), rows + 64, 32, WEIGHT),
        "row beyond 2^32": random16(torch.tensor([1, 2]), rows + 2**32, 32, WEIGHT),
        "momentum": random16(torch.tensor([1, 2]), rows, 32, MOMENTUM),
        "second": random16(torch.tensor([1, 2]), rows, 32, SECOND),
    }
    for name, other in others.items():
        assert float((other == base).double().mean()) < 0.005, name
    # and on nothing else: not on how many rows or columns are asked for
    assert torch.equal(random16(torch.tensor([1, 2]), rows[7:9], 13, WEIGHT), base[7:9, :13])


WEIGHTS = [0.0, 1e-4, 0.002, 0.0117, 0.0156, 0.5, 3.0]
DELTAS = [0.0, 1e-3, 3.3e-5, -1e-6, 7e-8, 2.0**-30, -(2.0**-34), 1e-12]


def check_mean_over_every_word(values: torch.Tensor, dtype: torch.dtype) -> None:
    """The mean of the 65,536 roundings of each fp32 value is the value, to 2^-16 of a unit."""
    rounded = round_stochastic(values[:, None].expand(-1, 65536), EVERY_WORD, dtype)
    error = (rounded.double().mean(1) - values.double()).abs() / unit(values, dtype)
    assert (error <= 2.0**-16).all(), values[error > 2.0**-16]


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
@pytest.mark.parametrize("w", WEIGHTS)
def test_rounding_is_unbiased_for_every_word(w: float, dtype: torch.dtype) -> None:
    start = torch.tensor([w, -w]).to(dtype).float()
    check_mean_over_every_word((start[:, None] - torch.tensor(DELTAS)).flatten(), dtype)


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_rounding_is_unbiased_in_the_subnormals_and_near_the_maximum(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = [
        info.smallest_normal * f
        for f in (1.7, 1.0001, 0.9999, 0.71, 0.1, 0.013, 1e-3, 1.3e-4, 1e-5, 3e-8)
    ]
    values += [info.max * f for f in (0.9999, 0.997, 0.5001)]
    check_mean_over_every_word(torch.tensor([*values, *(-v for v in values)]), dtype)


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_rounding_picks_one_of_the_two_neighbours(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    value = torch.randn(20000, generator=g) * torch.exp2(
        torch.randint(-40, 10, (20000,), generator=g).float()
    )
    rounded = round_stochastic(value, torch.randint(0, 65536, (20000,), generator=g), dtype)
    assert ((rounded.double() - value.double()).abs() < unit(value, dtype)).all()
    kept = value.to(dtype).float()
    assert torch.equal(round_stochastic(kept, torch.full((20000,), 65535), dtype).float(), kept), (
        "a stored value moved"
    )


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_saturates(dtype: torch.dtype, sign: int) -> None:
    largest = torch.finfo(dtype).max
    for value in (largest, largest * 1.0005, 3.4e38, torch.inf):
        rounded = round_stochastic(torch.full((65536,), sign * value), EVERY_WORD, dtype)
        assert (rounded == sign * largest).all(), value


def test_saturate_rounds_to_nearest_and_clamps() -> None:
    value = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1e30, -torch.inf, 70000.0])
    assert saturate(value, torch.bfloat16).tolist()[:2] == [1.0, 1 + 4 * 2**-8]  # halves go to even
    assert saturate(value, torch.float16).tolist()[2:] == [65504.0, -65504.0, 65504.0]
    assert saturate(value.double() * 1e300, torch.float32)[2] == torch.finfo(torch.float32).max


def test_store_draws_per_global_row_and_stream() -> None:
    value, counter = torch.full((300, 40), 1.003), torch.tensor([1, 1])
    rows = torch.arange(300) + 2**33
    whole = store(value, torch.bfloat16, counter, rows, WEIGHT)
    part = store(value[100:200], torch.bfloat16, counter, rows[100:200], WEIGHT)
    assert torch.equal(bits(whole[100:200]), bits(part))
    assert not torch.equal(bits(whole), bits(store(value, torch.bfloat16, counter, rows, MOMENTUM)))
    assert torch.equal(store(value, torch.float32, counter, rows, WEIGHT), value)
