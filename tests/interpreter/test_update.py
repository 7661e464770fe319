"""The divisions and roots of Adam on a card: from approximations as coarse as the card's, they come
out as good as IEEE's.
"""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from common import make_counter, make_hyper, unit
from xmlkernels.triton import update

COARSE = 2.0**-22.9  # relative error of `rsqrt.approx.ftz.f32`; `rcp.approx.ftz.f32` has 2^-23
COUNT = 1 << 16


@triton.jit
def divide_kernel(a, b, inverse, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, update.divide(tl.load(a + at), tl.load(b + at), tl.load(inverse + at)))


@triton.jit
def root_kernel(x, inverse, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, update.refine_root(tl.load(x + at), tl.load(inverse + at)))


@triton.jit
def root_of_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, update.root_of(tl.load(x + at)))


def divide(a: Tensor, b: Tensor, inverse: Tensor) -> Tensor:
    out = torch.empty_like(a)
    divide_kernel[(1,)](a, b, inverse, out, len(a))
    return out


def root(x: Tensor, inverse: Tensor) -> Tensor:
    out = torch.empty_like(x)
    root_kernel[(1,)](x, inverse, out, len(x))
    return out


def coarse(exact: Tensor, generator: torch.Generator) -> Tensor:
    """Return fp32 numbers that are off by up to what the card's approximations are."""
    error = 2 * torch.rand(exact.shape, generator=generator, dtype=torch.float64) - 1
    return (exact * (1 + (COARSE - 2.0**-24) * error)).float()


def numbers(generator: torch.Generator, bits: int = 24, low: int = -40, high: int = 40) -> Tensor:
    """Return positive numbers of a few significant bits and many sizes."""
    whole = torch.randint(1 << (bits - 1), 1 << bits, (COUNT,), generator=generator)
    size = torch.randint(low, high, (COUNT,), generator=generator)
    return torch.ldexp(whole.float(), size - bits)


def test_a_quotient_is_the_rounded_one() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = numbers(g), numbers(g)
    a *= torch.randint(0, 2, a.shape, generator=g) * 2 - 1
    exact, inverse = a.double() / b.double(), coarse(1 / b.double(), g)
    got = divide(a, b, inverse)
    errors = (got.double() - exact).abs() / unit(exact, torch.float32)
    assert errors.max() <= 0.51
    # Without the correction it is not.
    rough = (a * inverse).double() - exact
    assert (rough.abs() / unit(exact, torch.float32)).max() > 1.5


def test_a_root_is_the_rounded_one() -> None:
    g = torch.Generator().manual_seed(1)
    x = numbers(g, low=-120, high=120)
    exact = x.double().sqrt()
    got = root(x, coarse(1 / exact, g))
    assert ((got.double() - exact).abs() / unit(exact, torch.float32)).max() <= 0.51


def test_what_fp32_holds_is_exact() -> None:
    """A first step of Adam from zeros is lr times the sign of the gradient."""
    g = torch.Generator().manual_seed(2)
    q, b = numbers(g, bits=12), numbers(g, bits=12)
    a = q * b
    assert torch.equal(divide(a, b, coarse(1 / b.double(), g)), q)
    assert torch.equal(root(b * b, coarse(1 / b.double(), g)), b)
    zero = torch.zeros(COUNT)
    assert torch.equal(divide(zero, b, coarse(1 / b.double(), g)), zero)


def test_roots_at_the_ends() -> None:
    """Zero, the smallest and the largest numbers, and a moment that overflowed."""
    tiny = torch.finfo(torch.float32).tiny
    x = torch.tensor([0.0, 1e-45, 1e-40, tiny, 2 * tiny, 3.0e38, 3.4028235e38, torch.inf])
    got = torch.empty_like(x)
    root_of_kernel[(1,)](x, got, 8)
    assert got[0] == 0 and (got[1:3] > 0).all() and (got[1:3] < tiny**0.5).all()
    want = x[3:7].double().sqrt()
    assert ((got[3:7].double() - want).abs() <= 0.51 * unit(want, torch.float32)).all()
    assert got[7] == got[6]  # no NaN: the step is 0 or near it, as the limit is


@pytest.mark.parametrize("step", [0, 1, 9_999])
def test_corrections_are_those_of_the_reference(step: int) -> None:
    hyper, counter = make_hyper(0.01, 0.0, 0.9, 0.999), make_counter(step=step)
    betas = hyper[2:4].double()
    c1, c2 = (1 - betas ** (step + 1)).tolist()
    want = torch.tensor([hyper[0].double().item() / c1, c2**-0.5], dtype=torch.float64)
    got = update.bias_corrections(hyper, counter).double()
    assert ((got - want).abs() <= 0.51 * unit(want, torch.float32)).all()
