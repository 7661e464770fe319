"""`shortlist_matmul`: logits of shortlists, and their gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from common import DEVICES, DTYPES, assert_no_worse, assert_same_bits, name_of, needs_kernels
from shortlists import BOTH, SHAPES, backward, everything, forward, make, make_exact, moved, plain
from xmlkernels import ops
from xmlkernels.reference.shortlist_matmul import shortlist_backward as reference_backward
from xmlkernels.reference.shortlist_matmul import shortlist_matmul as reference

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
shared_or_not = pytest.mark.parametrize("shared", BOTH, ids=["per sample", "shared"])


# 1.
@pytest.mark.parametrize("device", DEVICES)
def test_by_hand(device: str) -> None:
    """Two samples, a pad, and row 2 twice in the second list; the upstream gradient is 1, 2, ... in
    reading order.
    """
    x = torch.tensor([[1.0, 2], [3, -1]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0, 0], [9, 9], [2, 1]], device=device, requires_grad=True)
    bias = torch.tensor([0.5, 0, -1], device=device, requires_grad=True)
    index = torch.tensor([[0, 2, -1], [2, 0, 2]], device=device)
    z = ops.shortlist_matmul(x, weight, bias, index)
    assert z.tolist() == [[1.5, 3, -math.inf], [4, 3.5, 4]]
    upstream = torch.tensor([[1.0, 2, math.nan], [4, 5, 6]], device=device)
    dx, dweight, dbias = torch.autograd.grad(z, (x, weight, bias), upstream)
    assert dx.tolist() == [[1 * 1 + 2 * 2, 2], [4 * 2 + 5 * 1 + 6 * 2, 4 + 6]]
    assert dweight.is_coalesced() and dweight.indices().tolist() == [[0, 2]]
    assert dweight.values().tolist() == [[1 + 15, 2 - 5], [2 + 30, 4 - 10]]
    assert dbias.is_coalesced()
    assert dbias.indices().tolist() == [[0, 2]]
    assert dbias.values().tolist() == [6, 12]


@pytest.mark.parametrize("device", DEVICES)
def test_by_hand_with_a_shared_list(device: str) -> None:
    x = torch.tensor([[1.0, 2], [3, -1]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0, 0], [9, 9], [2, 1]], device=device, requires_grad=True)
    z = ops.shortlist_matmul(x, weight, None, torch.tensor([2, -1, 0, 2], device=device))
    assert z.tolist() == [[4, -math.inf, 1, 4], [5, -math.inf, 3, 5]]
    upstream = torch.tensor([[1.0, math.nan, 2, 3], [4, math.inf, 5, 6]], device=device)
    dx, dweight = torch.autograd.grad(z, (x, weight), upstream)
    assert dx.tolist() == [[4 * 2 + 2, 4], [10 * 2 + 5, 10]]
    assert dweight.is_coalesced() and dweight.indices().tolist() == [[0, 2]]
    assert dweight.values().tolist() == [[2 + 15, 4 - 5], [4 + 30, 8 - 10]]


# 2.
@shared_or_not
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_reference_is_autograd(shape: tuple[int, int, int, int], shared: bool) -> None:
    t = make(*shape, F64, shared=shared)
    expected, tight = plain(t, F64), {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(
        reference(t["x"], t["weight"], t["bias"], t["index"]), expected["logits"], **tight
    )
    got = reference_backward(t["dlogits"], t["x"], t["weight"], t["index"], need_dbias=True)
    for name, value in zip(("dx", "rows", "grad", "dbias"), got, strict=True):
        torch.testing.assert_close(value, expected[name], **tight)


@shared_or_not
def test_gradcheck_of_the_reference(shared: bool) -> None:
    t = make(4, 6, 9, 5, F64, shared=shared)
    real = (t["index"] >= 0).expand(4, 6)

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return reference(x, weight, bias, t["index"])[real]

        @staticmethod
        def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            dlogits = torch.full((4, 6), math.nan, dtype=F64).masked_scatter(real, dz)
            dx, rows, grad, dbias = reference_backward(
                dlogits, x, weight, t["index"], need_dbias=True
            )
            dense = (
                torch.zeros_like(weight).index_add(0, rows, grad),
                torch.zeros(9, dtype=F64).index_add(0, rows, dbias),
            )
            return dx, *dense

    leaves = tuple(t[k].double().requires_grad_() for k in ("x", "weight", "bias"))
    assert torch.autograd.gradcheck(Reference.apply, leaves)


# 3.
@pytest.mark.parametrize("device", DEVICES)
@shared_or_not
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_no_worse_than_torch(
    shape: tuple[int, int, int, int], dtype: torch.dtype, shared: bool, device: str
) -> None:
    t = make(*shape, dtype, shared=shared)
    check_against_exact(t, dtype, device)


def check_against_exact(t: dict[str, Tensor], dtype: torch.dtype, device: str = "cpu") -> None:
    got, low, wide = moved(everything(moved(t, device)), "cpu"), plain(t, dtype), plain(t, F64)
    assert torch.equal(got["rows"], wide["rows"])
    real = wide["logits"] > -math.inf
    assert torch.equal(got["logits"] == -math.inf, ~real)
    assert_no_worse(
        got["logits"][real], low["logits"][real], wide["logits"][real], dtype, what="logits"
    )
    for name in ("dx", "grad", "dbias"):
        assert got[name].dtype == F32
        assert_no_worse(got[name], low[name], wide[name], dtype, what=name)


@pytest.mark.parametrize("device", DEVICES)
@shared_or_not
@pytest.mark.parametrize("x_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_x_of_another_format(
    dtype: torch.dtype, x_dtype: torch.dtype, shared: bool, device: str
) -> None:
    t = make(9, 40, 200, 33, dtype, x_dtype=x_dtype, shared=shared)
    check_against_exact(t, max(dtype, x_dtype, key=lambda d: torch.finfo(d).eps), device)


@pytest.mark.parametrize("device", DEVICES)
@shared_or_not
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bits_where_every_sum_is_exact(dtype: torch.dtype, shared: bool, device: str) -> None:
    for shape in ((1, 1, 1, 1), (5, 40, 30, 7), (67, 300, 400, 70), (9, 900, 2300, 40)):
        t = make_exact(*shape, dtype, shared=shared)
        args = (t["x"], t["weight"], t["bias"], t["index"])
        expected = reference_backward(t["dlogits"], args[0], args[1], args[3], need_dbias=True)
        expected = {"logits": reference(*args)} | dict(
            zip(("dx", "rows", "grad", "dbias"), expected, strict=True)
        )
        got = moved(everything(moved(t, device)), "cpu")
        # A sum of zeros may be -0 in one order and 0 in another.
        assert_same_bits(
            {k: v + 0 for k, v in got.items()}, {k: v + 0 for k, v in expected.items()}
        )


# 4.
@pytest.mark.parametrize("device", DEVICES)
@shared_or_not
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_unnamed_rows_are_not_read(dtype: torch.dtype, shared: bool, device: str) -> None:
    """Neither for a pad nor beside a named row; D = 17 makes a whole vector reach into the next
    row.
    """
    t = make(9, 50, 400, 17, dtype, shared=shared)
    t["index"] = torch.where(t["index"] >= 0, t["index"] // 2 * 2 + 1, -1)
    clean = moved(t, device)
    t = moved(t | {"weight": t["weight"].clone(), "bias": t["bias"].clone()}, device)
    t["weight"][::2], t["bias"][::2] = math.nan, math.inf
    assert_same_bits(everything(t), everything(clean))


@pytest.mark.parametrize("device", DEVICES)
@shared_or_not
def test_all_pads(shared: bool, device: str) -> None:
    t = moved(make(5, 300, 20, 6, shared=shared), device)
    t["index"].fill_(-1)
    t["dlogits"].fill_(math.nan)
    got = everything(t)
    assert (got["logits"] == -math.inf).all()
    assert (got["dx"] == 0).all()
    assert got["dx"].shape == (5, 6)
    assert [got[k].shape for k in ("rows", "grad", "dbias")] == [(0,), (0, 6), (0,)]


@pytest.mark.parametrize("device", DEVICES)
@shared_or_not
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_one_row_named_by_every_entry(dtype: torch.dtype, shared: bool, device: str) -> None:
    """Duplicates within a list add up, in one row of the gradient."""
    t = make_exact(7, 300, 5, 10, dtype, shared=shared)
    t["index"].fill_(4)
    got, total = backward(moved(t, device)), t["dlogits"].sum(1)
    assert got["rows"].tolist() == [4]
    # A shared list adds its duplicates before the product, which rounds a sum beyond 256 in bf16.
    exact = {} if not (shared and dtype == BF16) else {"rtol": 2**-7, "atol": 4.0}
    torch.testing.assert_close(
        got["grad"].cpu()[0], total @ t["x"].float(), **(exact or {"rtol": 0, "atol": 0})
    )
    torch.testing.assert_close(
        got["dx"].cpu(),
        total[:, None] * t["weight"][4].float(),
        **(exact or {"rtol": 0, "atol": 0}),
    )
    assert float(got["dbias"]) == float(total.sum())


@pytest.mark.parametrize("device", DEVICES)
def test_a_shared_list_is_that_list_for_every_sample(device: str) -> None:
    t = moved(make(33, 70, 200, 40, shared=True), device)
    got, expected = everything(t), everything(t | {"index": t["index"].expand(33, 70).contiguous()})
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_sample_stays_its_own(bad: float, device: str) -> None:
    t = moved(make(5, 300, 20, 33), device)
    clean = everything(t)
    t["x"][2, 32] = bad
    got, others = everything(t), [0, 1, 3, 4]
    assert torch.equal(got["logits"][others], clean["logits"][others])
    assert torch.equal(got["dx"], clean["dx"])
    assert not got["logits"][2][t["index"][2] >= 0].isfinite().any()
    assert not got["grad"][:, 32].isfinite().all()
    assert torch.equal(got["grad"][:, :32], clean["grad"][:, :32])


@pytest.mark.parametrize("device", DEVICES)
@shared_or_not
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nothing_becomes_non_finite_at_the_edges(
    dtype: torch.dtype, shared: bool, device: str
) -> None:
    t = moved(make(9, 40, 50, 33, dtype, x_dtype=F32, pads=0, shared=shared), device)
    for name in ("weight", "x"):
        t[name] = t[name].sign() * (65280.0 if dtype == BF16 else 65504.0)
    t["dlogits"] = t["dlogits"].sign() * 65504
    for name, value in everything(t).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("device", DEVICES)
@shared_or_not
def test_nothing_is_written_and_no_graph_is_kept_without_grad(shared: bool, device: str) -> None:
    t = moved(make(6, 12, 30, 9, BF16, shared=shared), device)
    before = {k: v.clone() for k, v in t.items()}
    everything(t)
    assert_same_bits(before, t)
    with torch.no_grad():
        assert forward(t | {"x": t["x"].requires_grad_()}).grad_fn is None


# 6.
@needs_kernels
@shared_or_not
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(1, 1300, 900, 40), (70, 2500, 3000, 33)], ids=name_of)
def test_threads_and_repeats_change_nothing(
    shape: tuple[int, int, int, int], dtype: torch.dtype, shared: bool, threads: None
) -> None:
    t = make(*shape, dtype, shared=shared)
    torch.set_num_threads(1)
    first = everything(t)
    for count in (1, 2, 4, 3):
        torch.set_num_threads(count)
        assert_same_bits(everything(t), first)
