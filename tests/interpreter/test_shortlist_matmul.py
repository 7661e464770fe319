"""`shortlist_matmul` and its backward in Triton: the reference's numbers over many tiles, pads,
duplicates and hot rows.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.model import shortlist_accesses
from common import DTYPES, assert_no_worse, name_of
from counting import counted
from xmlkernels.reference import shortlist_matmul as reference
from xmlkernels.triton import shortlist_matmul as kernel

N, D, S = 40, 37, 21
B = {True: 18, False: 4}  # samples are a dimension of the tiles of a shared list alone
SHARED = pytest.mark.parametrize("shared", [False, True], ids=["lists", "shared"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """At least two tiles in every dimension, parts of a shared list and pieces of a row's
    occurrences included.
    """
    monkeypatch.setattr(kernel, "LIST_TILE", (16, 16))
    monkeypatch.setattr(kernel, "SHARED_TILE", (16, 16, 16, 4))
    monkeypatch.setattr(kernel, "SHARED_TILE_FP32", (16, 16, 16, 4))
    monkeypatch.setattr(kernel, "SPLITS", 2)
    yield


def problem(
    dtype: torch.dtype, shared: bool, whole: bool, x_dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """x, weight, bias, index, dlogits; whole: whole numbers, exact in any order. NaN where nothing
    may be read.
    """
    g = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return (
            torch.randint(-3, 4, shape, generator=g).float()
            if whole
            else torch.randn(shape, generator=g)
        )

    index = torch.randint(0, N, (S,) if shared else (B[shared], S), generator=g)
    # The edges, and a row that everyone names.
    index[..., 3] = 0
    index[..., 4] = N - 1
    index[..., 11] = 5
    index[..., 12] = 5  # twice
    index[index == 7] = 8  # named by nobody
    index[..., 6] = index[..., -1] = -1
    weight, dlogits = numbers(N, D).to(dtype), numbers(B[shared], S)
    weight[7] = math.nan
    dlogits[:, 6] = dlogits[:, -1] = math.nan
    return numbers(B[shared], D).to(x_dtype or dtype), weight, numbers(N), index, dlogits


@SHARED
@pytest.mark.parametrize("x_dtype", DTYPES, ids=name_of)
def test_e4m3_tables_are_exact(x_dtype: torch.dtype, shared: bool) -> None:
    """Whole numbers as codes, rows of different scales; the row that nobody names is NaN in
    both.
    """
    x, weight, bias, index, dlogits = problem(torch.float32, shared, True, x_dtype)
    scale = torch.exp2(torch.arange(N).remainder(7) - 3.0)
    row_scale = torch.stack([scale, torch.full_like(scale, math.nan)], 1)
    table = weight.to(torch.float8_e4m3fn)
    got = kernel.shortlist_matmul(x, table, bias, index, row_scale)
    assert torch.equal(got, reference.shortlist_matmul(x, table, bias, index, row_scale))
    expected = reference.shortlist_backward(dlogits, x, table, index, row_scale, need_dbias=True)
    for mine, theirs in zip(
        kernel.shortlist_backward(dlogits, x, table, index, row_scale, need_dbias=True),
        expected,
        strict=True,
    ):
        assert torch.equal(mine, theirs)


@SHARED
@pytest.mark.parametrize(
    "dtype, x_dtype",
    [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
    ids=name_of,
)
def test_whole_numbers_are_exact(dtype: torch.dtype, x_dtype: torch.dtype, shared: bool) -> None:
    x, weight, bias, index, dlogits = problem(dtype, shared, True, x_dtype)
    assert torch.equal(
        kernel.shortlist_matmul(x, weight, bias, index),
        reference.shortlist_matmul(x, weight, bias, index),
    )
    expected = reference.shortlist_backward(dlogits, x, weight, index, need_dbias=True)
    got = kernel.shortlist_backward(dlogits, x, weight, index, need_dbias=True)
    for name, mine, theirs in zip(("dx", "rows", "grad", "dbias"), got, expected, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name
    assert 7 not in expected[1] and {0, 5, N - 1} <= set(expected[1].tolist())


@SHARED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_no_worse_than_torch(dtype: torch.dtype, shared: bool) -> None:
    x, weight, bias, index, dlogits = problem(dtype, shared, False)
    wide = (x.double(), weight.double())
    real = (index >= 0).expand(B[shared], S)
    exact = reference.shortlist_matmul(*wide, bias.double(), index)[real]
    low = reference.shortlist_matmul(x, weight, bias, index)[real].to(dtype)
    logits = kernel.shortlist_matmul(x, weight, bias, index)
    assert torch.equal(logits == -math.inf, ~real)
    assert_no_worse(logits[real], low, exact, dtype, what="logits")
    exact_back = reference.shortlist_backward(dlogits.double(), *wide, index, need_dbias=True)
    low_back = reference.shortlist_backward(
        dlogits.to(dtype).float(), x, weight, index, need_dbias=True
    )
    got = kernel.shortlist_backward(dlogits, x, weight, index, need_dbias=True)
    assert torch.equal(got[1], exact_back[1])
    for name, at in (("dx", 0), ("grad", 2), ("dbias", 3)):
        assert_no_worse(got[at], low_back[at].to(dtype), exact_back[at], dtype, what=name)


@SHARED
def test_only_what_is_asked_for(shared: bool) -> None:
    x, weight, _, index, dlogits = problem(torch.float32, shared, True)
    for asked in (
        {},
        {"need_dweight": False},
        {"need_dx": False, "need_dweight": False, "need_dbias": True},
    ):
        got = kernel.shortlist_backward(dlogits, x, weight, index, **asked)
        expected = reference.shortlist_backward(dlogits, x, weight, index, **asked)
        assert all(
            a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
            for a, b in zip(got, expected, strict=True)
        )


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 3), (3,)], ids=name_of)
def test_empty_lists_and_lists_of_pads(shape: tuple[int, ...]) -> None:
    batch = shape[0] if len(shape) == 2 else 2
    x, weight, index = torch.ones(batch, 5), torch.ones(4, 5), torch.full(shape, -1)
    logits = kernel.shortlist_matmul(x, weight, None, index)
    assert logits.shape == (batch, shape[-1]) and (logits == -math.inf).all()
    dx, rows, grad, dbias = kernel.shortlist_backward(
        torch.full_like(logits, math.nan), x, weight, index, need_dbias=True
    )
    assert torch.equal(dx, torch.zeros(batch, 5))
    assert rows.shape == dbias.shape == (0,)
    assert grad.shape == (0, 5)


def test_an_empty_batch_names_no_row() -> None:
    x, weight, index = torch.ones(0, 5), torch.ones(4, 5), torch.tensor([1, 2])
    assert kernel.shortlist_matmul(x, weight, None, index).shape == (0, 2)
    dx, rows, grad, _ = kernel.shortlist_backward(torch.empty(0, 2), x, weight, index)
    assert dx.shape == (0, 5) and rows.shape == (0,) and grad.shape == (0, 5)


@SHARED
def test_accesses_are_the_closed_form(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and dx read a named row once for each block of samples (of columns, in dx, its
    share), pads nothing. Each entry of lists per sample reads the sample.
    """
    x, weight, bias, index, dlogits = problem(torch.float32, shared, True)
    named = int((index >= 0).sum())
    model = shortlist_accesses(
        B[shared],
        S,
        D,
        named,
        shared=shared,
        block_s=16 if shared else 1,
        block_b=16,
        block_d=16,
    )
    of_b = 2 if shared else 1
    assert model["forward"] == {
        "weight": (of_b * named * D, 0),
        "x": ((2 if shared else S) * B[shared] * D, 0),
    }
    with counted(monkeypatch, {"x": x, "weight": weight}) as traffic:
        kernel.shortlist_matmul(x, weight, bias, index)
    assert {k: (traffic.loads[k], traffic.stores[k]) for k in model["forward"]} == model["forward"]
    with counted(monkeypatch, {"x": x, "weight": weight, "dlogits": dlogits}) as traffic:
        kernel.shortlist_backward(dlogits, x, weight, index, need_dweight=False)
    assert {k: (traffic.loads[k], traffic.stores[k]) for k in model["dx"]} == model["dx"]
