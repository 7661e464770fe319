"""`shortlist_matmul` on e4m3 tables with a scale per row: scores and the gradient of x; such a
table has no gradient.
"""

import pytest
import torch

from common import DEVICES, DTYPES, assert_no_worse, assert_same_bits, name_of, opcheck, to_fp8
from shortlists import BOTH, backward, everything, forward, make, make_exact_fp8, moved, plain
from xmlkernels import ops
from xmlkernels.errors import InputError
from xmlkernels.reference.shortlist_matmul import shortlist_backward as reference_backward
from xmlkernels.reference.shortlist_matmul import shortlist_matmul as reference

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
shared_or_not = pytest.mark.parametrize("shared", BOTH, ids=["lists", "shared"])
SIZES = [(1, 1, 1, 1), (5, 40, 30, 7), (67, 300, 400, 70), (3, 700, 90, 16)]


@pytest.mark.parametrize("device", DEVICES)
@shared_or_not
def test_by_hand(shared: bool, device: str) -> None:
    """Codes [[1, 2], [-4, 0.5]] at scales 2 and 1/4 are rows [[2, 4], [-1, 1/8]]; x = [3, 8], bias
    [0, 10].
    """
    weight = torch.tensor([[1, 2], [-4, 0.5]]).to(E4M3).to(device)
    row_scale = torch.tensor([[2.0, 9], [0.25, 9]], device=device)
    x = torch.tensor([[3.0, 8]], device=device, requires_grad=True)
    index = torch.tensor([1, -1, 0, 1], device=device)
    z = ops.shortlist_matmul(
        x,
        weight,
        torch.tensor([0.0, 10], device=device),
        index if shared else index[None],
        row_scale,
    )
    assert z.tolist() == [[8.0, -torch.inf, 38.0, 8.0]]
    z.backward(torch.tensor([[1.0, 5, 0.5, 2]], device=device))
    assert x.grad is not None and x.grad.tolist() == [[1 - 3, 2 + 3 / 8]]


@pytest.mark.parametrize("x_dtype", DTYPES, ids=name_of)
@shared_or_not
def test_the_reference_is_that_of_the_values(shared: bool, x_dtype: torch.dtype) -> None:
    t = make_exact_fp8(9, 20, 30, 7, shared=shared)
    t["x"] = t["x"].to(x_dtype)
    values, args = t["weight"].float() * t["row_scale"][:, :1], (t["index"], t["row_scale"])
    got = (
        reference(t["x"], t["weight"], t["bias"], *args),
        *reference_backward(t["dlogits"], t["x"], t["weight"], *args),
    )
    wide = (
        reference(t["x"], values, t["bias"], t["index"]),
        *reference_backward(t["dlogits"], t["x"], values, t["index"]),
    )
    for mine, theirs in zip(got, wide, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=name_of)
@shared_or_not
@pytest.mark.parametrize("size", SIZES, ids=name_of)
def test_bits_where_sums_are_exact(
    size: tuple[int, ...], shared: bool, x_dtype: torch.dtype, device: str
) -> None:
    t = moved(make_exact_fp8(*size, shared=shared), device)
    t["x"] = t["x"].to(x_dtype)
    logits = reference(t["x"], t["weight"], t["bias"], t["index"], t["row_scale"])
    names = ("dx", "rows", "grad", "dbias")
    args = (t["dlogits"], t["x"], t["weight"], t["index"], t["row_scale"])
    expected = dict(zip(names, reference_backward(*args, need_dbias=True), strict=True)) | {
        "logits": logits
    }
    got = everything(t)
    # Zeros without their sign.
    assert_same_bits({k: v + 0 for k, v in got.items()}, {k: v + 0 for k, v in expected.items()})


@pytest.mark.parametrize("device", DEVICES)
@shared_or_not
def test_no_worse_than_torch_in_bf16(shared: bool, device: str) -> None:
    """Every value of the table is exact in bf16, so the bf16 answer of torch is that of the same
    table.
    """
    t = make(33, 150, 400, 100, torch.float32, shared=shared)
    t["weight"], t["row_scale"] = to_fp8(t["weight"], 2.0**-8)
    t["x"] = t["x"].to(BF16)
    values = t | {"weight": t["weight"].float() * t["row_scale"][:, :1]}
    exact, low = plain(values, torch.float64), plain(values, BF16)
    got = everything(moved(t, device))
    for name in ("logits", "dx", "grad", "dbias"):
        real = torch.isfinite(exact[name])
        assert_no_worse(got[name].cpu()[real], low[name][real], exact[name][real], BF16, what=name)
    assert torch.equal(got["rows"].cpu(), exact["rows"])


@pytest.mark.parametrize("device", DEVICES)
@shared_or_not
def test_opcheck(shared: bool, device: str) -> None:
    t = moved(make_exact_fp8(5, 7, 20, 9, shared=shared), device)
    x, bias = t["x"].requires_grad_(), t["bias"].requires_grad_()
    # test_schema multiplies in e4m3.
    some = (
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    opcheck(
        torch.ops.xmlkernels.shortlist_matmul.default,
        (x, t["weight"], bias, t["index"], t["row_scale"]),
        test_utils=some,
    )
    args = tuple(t[k].detach() for k in ("dlogits", "x", "weight", "index", "row_scale"))
    opcheck(
        torch.ops.xmlkernels.shortlist_backward.default,
        args,
        {"need_dweight": False},
        test_utils=some,
    )


def test_messages() -> None:
    t = make_exact_fp8(4, 5, 6, 3)
    call = (t["x"], t["weight"], None, t["index"])
    with pytest.raises(
        InputError,
        match=r"argument row_scale: expected torch.float32 \[6, 2\] beside an 8-bit table, got "
        r"None",
    ):
        ops.shortlist_matmul(*call)
    with pytest.raises(InputError, match=r"argument row_scale: expected powers of two .* got 0.3"):
        ops.shortlist_matmul(*call, torch.full((6, 2), 0.3))
    weight = t["weight"].clone().requires_grad_()
    with pytest.raises(
        InputError,
        match="argument weight: expected no gradient asked of an 8-bit table, .*; cluster_step_ "
        "trains",
    ):
        ops.shortlist_matmul(t["x"], weight, None, t["index"], t["row_scale"])
    with pytest.raises(
        RuntimeError, match="argument row_scale: expected one beside an 8-bit weight"
    ):
        backward({k: v for k, v in t.items() if k != "row_scale"})
    assert forward(t).shape == (4, 5)
