"""Random words, rounding and conversions of the Triton kernels against the references, bit for
bit.
"""

import pytest
import torch
import triton
import triton.language as tl

from common import DTYPES, LOW, bits, name_of, unit
from xmlkernels.reference import rounding
from xmlkernels.triton import common

TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def philox_kernel(counter, key, out):
    words = common.philox(
        tl.load(key).to(tl.uint32),
        tl.load(key + 1).to(tl.uint32),
        tl.load(counter).to(tl.uint32),
        tl.load(counter + 1).to(tl.uint32),
        tl.load(counter + 2).to(tl.uint32),
        tl.load(counter + 3).to(tl.uint32),
    )
    for i in tl.static_range(4):
        tl.store(out + i, words[i].to(tl.int64))


@triton.jit
def random_kernel(
    counter,
    rows,
    out,
    first,
    WIDE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    STREAM: tl.constexpr,
):
    seed, step, row = tl.load(counter), tl.load(counter + 1), tl.load(rows + tl.arange(0, R))
    if WIDE:
        value = common.random32(seed, step, row, first, C, STREAM)
    else:
        value = common.random16(seed, step, row, first, C, STREAM)
    tl.store(out + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :], value.to(tl.int64))


@triton.jit
def round_kernel(
    value, words, out, n, DTYPE: tl.constexpr, NEAREST: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v, r = tl.load(value + at, mask=at < n, other=0.0), tl.load(words + at, mask=at < n, other=0)
    if NEAREST:
        tl.store(out + at, common.round_nearest(v, DTYPE, True), mask=at < n)
    else:
        tl.store(out + at, common.round_stochastic(v, r.to(tl.uint16), DTYPE), mask=at < n)


@triton.jit
def e4m3_kernel(value, words, code, back, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.load(words + at, mask=at < n, other=0).to(tl.uint32)
    got, _ = common.encode_e4m3(tl.load(value + at, mask=at < n, other=0.0), r)
    tl.store(code + at, got, mask=at < n)
    tl.store(back + at, common.decode_e4m3(got), mask=at < n)


@triton.jit
def smooth_kernel(z, sigma, soft, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    v = tl.load(z + at)
    s, tail = common.sigmoid_and_tail(v)
    tl.store(sigma + at, s)
    tl.store(soft + at, common.softplus(v, tail))


@triton.jit
def widen_kernel(value, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, common.widen(tl.load(value + at)))


def rounded(
    value: torch.Tensor, words: torch.Tensor, dtype: torch.dtype, *, nearest: bool = False
) -> torch.Tensor:
    out = torch.empty(value.shape, dtype=dtype)
    grid = (triton.cdiv(value.numel(), 16384),)
    round_kernel[grid](
        value.contiguous(), words.contiguous(), out, value.numel(), TL[dtype], nearest, 16384
    )
    return out


def e4m3(value: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    code, back = torch.empty(value.shape, dtype=torch.uint8), torch.empty(value.shape)
    grid = (triton.cdiv(value.numel(), 16384),)
    e4m3_kernel[grid](value.contiguous(), words.contiguous(), code, back, value.numel(), 16384)
    return code, back


def numbers(seed: int = 0, count: int = 20000) -> torch.Tensor:
    """fp32 of all sizes, exact halves among them, and the ends of every format."""
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(count, generator=g) * torch.exp2(
        torch.randint(-160, 128, (count,), generator=g).float()
    )
    small = torch.randn(count, generator=g) * torch.exp2(
        torch.randint(-44, 18, (count,), generator=g).float()
    )
    ties = (torch.randint(-4096, 4096, (count,), generator=g) + 0.5) * torch.exp2(
        torch.randint(-40, 8, (count,)).float()
    )
    ends = [
        0.0,
        -0.0,
        3.4028235e38,
        65504.0,
        65520.0,
        65519.0,
        3.3895e38,
        3.3961e38,
        448.0,
        464.0,
        1e-45,
        2.0**-149,
        torch.inf,
    ]
    return torch.cat([value, small, ties, torch.tensor([*ends, *(-e for e in ends)])])


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
    c, k = (torch.tensor([int(w, 16) for w in s.split()]) for s in (counter, key))
    out = torch.empty(4, dtype=torch.int64)
    philox_kernel[(1,)](c, k, out)
    assert [f"{int(w):08x}" for w in out] == expected.split()


@pytest.mark.parametrize("first", [0, 24])
@pytest.mark.parametrize("stream", [rounding.WEIGHT, rounding.MOMENTUM, rounding.SECOND])
def test_random16_is_the_reference(stream: int, first: int) -> None:
    rows = torch.tensor([0, 1, 2**31, 2**32 + 5, 2**40 + 3, 7, 8, 9])
    counter = torch.tensor([-3, 2**33 + 4])
    out = torch.empty(8, 32, dtype=torch.int64)
    random_kernel[(1,)](counter, rows, out, first, False, 8, 32, stream)
    assert torch.equal(out, rounding.random16(counter, rows, first + 32, stream)[:, first:])


@pytest.mark.parametrize("first", [0, 12])
def test_random32_lays_out_the_draw(first: int) -> None:
    """Column c takes word c % 4 of draw c // 4."""
    rows, counter = torch.tensor([5, 2**32 + 5]), torch.tensor([9, 2])
    out = torch.empty(2, 16, dtype=torch.int64)
    random_kernel[(1,)](counter, rows, out, first, True, 2, 16, 3)
    group = torch.arange(first // 4, first // 4 + 4)[None, :]
    words = rounding.philox(
        (counter[0], counter[1]),
        (rows[:, None], rows[:, None] >> 32, group, torch.full_like(group, 3)),
    )
    assert torch.equal(out, torch.stack(words, -1).flatten(1))


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_round_stochastic_is_the_reference(dtype: torch.dtype) -> None:
    value = numbers()
    for seed in range(3):
        words = torch.randint(0, 65536, value.shape, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(
            bits(rounded(value, words, dtype)), bits(rounding.round_stochastic(value, words, dtype))
        )
    for word in (0, 65535):
        words = torch.full(value.shape, word)
        assert torch.equal(
            bits(rounded(value, words, dtype)), bits(rounding.round_stochastic(value, words, dtype))
        )


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_round_stochastic_is_unbiased_for_every_word(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    every = torch.arange(65536)
    for v in (
        1.003,
        -0.0117,
        3.3e-5,
        info.smallest_normal * 0.71,
        -info.smallest_normal * 1e-3,
        info.max * 0.997,
    ):
        value = torch.tensor([v])
        mean = rounded(value.expand(65536), every, dtype).double().mean()
        assert abs(mean - value.double()) <= 2.0**-16 * unit(value, dtype), v


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_round_nearest_is_torchs_and_saturates(dtype: torch.dtype) -> None:
    value = numbers(1)
    got = rounded(value, torch.zeros(value.shape, dtype=torch.int64), dtype, nearest=True)
    assert torch.equal(bits(got), bits(rounding.saturate(value, dtype)))


def test_e4m3_decodes_every_code() -> None:
    """Through the encoder as well: a stored value does not move, whatever the random word."""
    code = torch.arange(256, dtype=torch.uint8)
    exact = code.view(torch.float8_e4m3fn).float()
    real = exact.isfinite()
    for word in (0, 2**31, 2**32 - 1):
        got, back = e4m3(exact[real], torch.full((int(real.sum()),), word))
        assert torch.equal(got, code[real]) and torch.equal(bits(back), bits(exact[real]))


def test_e4m3_is_unbiased_and_picks_a_neighbour() -> None:
    """Over 2^16 words spread evenly over the 2^32 the mean is the value to 2^-15 of a unit, in the
    subnormals too.
    """
    even = torch.arange(65536) * 65536 + 32768
    for v in (0.3, -1.7, 0.0161, 0.0149, 0.003, -0.0009, 1e-4, 2.0**-14 * 1.3, 300.3, 447.9):
        value = torch.tensor([v])
        _, back = e4m3(value.expand(65536), even)
        spacing = 2.0 ** max(-9, torch.frexp(value).exponent.item() - 4)
        assert abs(back.double().mean() - value.double()) <= 2.0**-15 * spacing, v
        assert (back.double() - value.double()).abs().max() < spacing
    # Far below the smallest step, 2^-9, one word in 2^32 / (value 2^9) still rounds up: exactly the
    # last ones.
    value = torch.full((4,), 2.0**-9 * 2.0**-30)
    assert e4m3(value, torch.tensor([0, 2**32 - 5, 2**32 - 4, 2**32 - 1]))[0].tolist() == [
        0,
        0,
        1,
        1,
    ]
    # and with more than 32 bits falling away
    assert e4m3(value / 4, torch.tensor([0, 2**31, 2**32 - 2, 2**32 - 1]))[0].tolist() == [
        0,
        0,
        0,
        1,
    ]
    assert e4m3(value / 8, torch.full((4,), 2**32 - 1))[0].tolist() == [0, 0, 0, 0]


def test_e4m3_saturates_and_keeps_signs() -> None:
    value = torch.tensor([448.0, 449.0, 1e30, torch.inf, -1e30, -0.0, 0.0])
    _, back = e4m3(value, torch.full((7,), 2**32 - 1))
    assert torch.equal(bits(back), bits(torch.tensor([448.0, 448, 448, 448, -448, -0.0, 0.0])))


def test_widen_is_exact() -> None:
    for dtype in LOW:
        value = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
        value = value[value.isfinite()]
        value = torch.cat([value, value.new_zeros(65536 - value.numel())])
        out = torch.empty(65536)
        widen_kernel[(4,)](value, out, 16384)
        assert torch.equal(bits(out), bits(value.float()))


def test_sigmoid_and_softplus() -> None:
    z = torch.cat(
        [
            torch.linspace(-30, 30, 4001),
            torch.tensor([0.0, -1e4, 1e4, 87.5, -87.5, -103.0, 3e38, -3e38]),
        ]
    )
    z = torch.cat([z, z.new_zeros(8192 - z.numel())])
    sigma, soft = torch.empty(8192), torch.empty(8192)
    smooth_kernel[(1,)](z, sigma, soft, 8192)
    torch.testing.assert_close(sigma, torch.sigmoid(z.double()).float(), rtol=1e-6, atol=1e-38)
    torch.testing.assert_close(
        soft, torch.logaddexp(z.double(), torch.zeros(())).float(), rtol=1e-6, atol=1e-38
    )
    assert float(sigma[4001]) == 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=name_of)
def test_prepare_batch(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    x = torch.randn(41, 50, generator=torch.Generator().manual_seed(0)).to(x_dtype)
    out, flag = common.prepare_batch(x, dtype)
    assert int(flag) == 0 and torch.equal(bits(out), bits(rounding.saturate(x.float(), dtype)))
    assert (out is x) == (dtype == x_dtype)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for place in ((0, 0), (40, 49), (20, 24)):
            spoilt = x.clone()
            spoilt[place] = bad
            assert int(common.prepare_batch(spoilt, dtype)[1]) == 1
    assert int(common.prepare_batch(x[:0], dtype)[1]) == 0
