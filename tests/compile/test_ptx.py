"""The PTX of the rounding, run by its manual on numbers, has the bits of the references."""

import pytest
import torch
from torch import Tensor

import ptx
from common import bits
from xmlkernels.reference import rounding
from xmlkernels.triton import ptx as pieces

# All signs, exponents and seven bits of mantissa: every bf16, NaN and infinities included.
HIGH = torch.arange(65536) << 16
LOW = (0, 1, 0x7FFF, 0x8000, 0xFFFF)


def words_of(value: Tensor) -> Tensor:
    return value.view(torch.int32).to(torch.int64) & ptx.MASK


def numbers(seed: int) -> Tensor:
    """Bits of fp32: every high half with chosen low halves, and with random ones."""
    g = torch.Generator().manual_seed(seed)
    low = [torch.full_like(HIGH, low) for low in LOW]
    low += [torch.randint(0, 65536, HIGH.shape, generator=g) for _ in range(4)]
    return torch.cat([HIGH | each for each in low])


def value_of(word: Tensor) -> Tensor:
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32).view(torch.float32)


def draws(seed: int, bound: int, count: int) -> list[Tensor]:
    """All ones, zeros, and random words."""
    g = torch.Generator().manual_seed(seed)
    random = [torch.randint(0, bound, (count,), generator=g) for _ in range(4)]
    return [torch.full((count,), bound - 1), torch.zeros(count, dtype=torch.int64), *random]


def encode(word: Tensor, r32: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and magnitudes of four times as many numbers as there are registers."""
    w, r = word.reshape(-1, 4), r32.reshape(-1, 4)
    operands = {3 + i: w[:, i] for i in range(4)} | {7 + i: r[:, i] for i in range(4)}
    got = ptx.run(pieces.encode_e4m3(), operands)
    code = torch.stack([got[0] >> 8 * i & 0xFF for i in range(4)], -1)
    size = torch.stack([got[1 + i // 2] >> 16 * (i % 2) & 0xFFFF for i in range(4)], -1)
    return code.flatten(), size.flatten()


def test_e4m3_is_the_reference() -> None:
    word = numbers(0)
    for r32 in draws(1, 1 << 32, word.numel()):
        code, size = encode(word, r32)
        wanted = rounding.round_e4m3(value_of(word), r32).view(torch.uint8).to(torch.int64)
        assert torch.equal(code, wanted)
        assert torch.equal(size, wanted & 0x7F)


@pytest.mark.parametrize("exponent", range(-50, 10))
def test_e4m3_rounds_up_from_one_word_on(exponent: int) -> None:
    """The word from which on a number is rounded up, and the one before it: all 32 bits count."""
    g = torch.Generator().manual_seed(exponent)
    value = torch.ldexp(1 + torch.rand(4096, generator=g), torch.tensor(exponent))
    value[:8] = torch.ldexp(1 + torch.arange(8) / 8, torch.tensor(exponent))
    unit = torch.exp2(value.log2().floor().clamp(min=-6) - 3).double()
    fraction = torch.floor((value.double() / unit).frac() * 2.0**32).to(torch.int64)
    first = ((1 << 32) - fraction).clamp(max=ptx.MASK)
    for r32 in (first, (first - 1).clamp(min=0)):
        code, _ = encode(words_of(value), r32)
        wanted = rounding.round_e4m3(value, r32).view(torch.uint8).to(torch.int64)
        assert torch.equal(code, wanted)


def test_e4m3_keeps_every_code() -> None:
    code = torch.arange(256, dtype=torch.uint8)
    real = code[(code & 0x7F) != 0x7F]
    real = torch.cat([real, real[:2]])  # whole registers
    for r32 in draws(2, 1 << 32, 256):
        value = real.view(torch.float8_e4m3fn).float()
        assert torch.equal(encode(words_of(value), r32)[0], real.to(torch.int64))


@pytest.mark.parametrize(
    ("piece", "dtype"),
    [
        (pieces.round_bf16(True), torch.bfloat16),
        (pieces.round_bf16(False), torch.bfloat16),
        (pieces.round_fp16(), torch.float16),
    ],
    ids=["bf16", "bf16 below sm_86", "fp16"],
)
def test_sixteen_bits_are_the_reference(piece: str, dtype: torch.dtype) -> None:
    word = numbers(3)
    # A NaN has no rounding that is defined, but must not depend on the card, nor be stored.
    finite = value_of(word).isfinite() | value_of(word).isinf()
    for r16 in draws(4, 1 << 16, word.numel()):
        w, r = word.reshape(-1, 2), r16.reshape(-1, 2)
        got = ptx.run(piece, {1: w[:, 0], 2: w[:, 1], 3: r[:, 0] | r[:, 1] << 16})[0]
        half = torch.stack([got & 0xFFFF, got >> 16], -1).flatten()
        wanted = bits(rounding.round_stochastic(value_of(word), r16, dtype)).to(torch.int64)
        assert torch.equal(half[finite], wanted[finite] & 0xFFFF)
        stored = half.to(torch.uint16).view(torch.int16).view(dtype)
        assert stored.isfinite().all()


def test_a_wrong_constant_is_found() -> None:
    """The comparison sees an error of the last bit of 32."""
    text = pieces.encode_e4m3().replace("0f09800000", "0f09000000")
    assert text != pieces.encode_e4m3()
    value, r32 = torch.full((4,), 2.0**-9 * 2.0**-30), torch.full((4,), 2**32 - 4)
    operands = {3 + i: words_of(value)[i : i + 1] for i in range(4)}
    operands |= {7 + i: r32[i : i + 1] for i in range(4)}
    assert ptx.run(pieces.encode_e4m3(), operands)[0] != ptx.run(text, operands)[0]
