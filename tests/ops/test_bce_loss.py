"""`bce_loss`: the loss over all labels, and its gradients by autograd."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from common import (
    DEVICES,
    DTYPES,
    SHAPES,
    Step,
    assert_no_worse,
    assert_same_bits,
    dense_targets,
    dyadic_step,
    make_hyper,
    name_of,
    needs_kernels,
    random_step,
    torch_step,
)
from xmlkernels.ops import bce_loss, bce_step_
from xmlkernels.reference.bce_loss import bce_loss as reference
from xmlkernels.reference.bce_loss import bce_loss_backward as reference_backward

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LEAVES = ("x", "weight", "bias")
SUBSETS = [c for n in range(4) for c in itertools.combinations(LEAVES, n)]


def run(step: Step, *, needs: tuple[str, ...] = LEAVES, upstream: float = 1.0) -> dict[str, Tensor]:
    """The loss, and the gradient of upstream * loss for each leaf in `needs`."""
    t = {k: v.clone().requires_grad_(k in needs) for k, v in step.tensors.items()}
    rows = step.options.get("rows", -1)
    loss = bce_loss(
        t["x"],
        t["weight"],
        t.get("bias"),
        t["pos_row"],
        t["pos_sample"],
        t.get("pos_value"),
        rows=rows,
    )
    assert loss.shape == (1,) and loss.dtype == F32
    if needs:
        (upstream * loss).sum().backward()
    assert all((k in needs) == (t[k].grad is not None) for k in LEAVES if k in t)
    return {"loss": loss.detach()} | {k: t[k].grad for k in needs if k in t}


def exact(step: Step, upstream: float = 1.0) -> dict[str, Tensor]:
    """The same in float64 by torch's own autograd on dense targets."""
    n = step.tensors["weight"].shape[0]
    rows = n if step.options.get("rows", -1) < 0 else step.options["rows"]
    x, w = (step.tensors[k].double().requires_grad_() for k in ("x", "weight"))
    b = step.tensors["bias"].double().requires_grad_() if "bias" in step.tensors else None
    y = dense_targets(step.tensors, rows).double()
    z = torch.nn.functional.linear(x, w[:rows], None if b is None else b[:rows])
    loss = torch.nn.BCEWithLogitsLoss(reduction="sum")(z, y)
    (upstream * loss).backward()
    grads = {"x": x.grad, "weight": w.grad} | ({} if b is None else {"bias": b.grad})
    return {"loss": loss.detach().reshape(1)} | grads


def low_precision(step: Step) -> dict[str, Tensor]:
    """PyTorch at the table's precision; the gradient of the table is read off a step with lr = 1 in
    fp32.
    """
    got = torch_step(step.replace(hyper=make_hyper(1.0)))
    dtype = step.tensors["weight"].dtype
    y = dense_targets(step.tensors, step.tensors["weight"].shape[0]).to(dtype)
    x, w = step.tensors["x"].to(dtype).float(), step.tensors["weight"].float()
    z = (x @ w.T + step.tensors["bias"]).to(dtype)
    g = (torch.sigmoid(z) - y).float()
    return {
        "loss": got["loss"],
        "x": got["dx"].to(dtype),
        "weight": (g.T @ x).to(dtype),
        "bias": g.sum(0).to(dtype),
    }


# 1.
@pytest.mark.parametrize("device", DEVICES)
def test_by_hand(device: str) -> None:
    """The numbers of `bce_step_`'s example: G = [[1/2, -1/4], [-1/2, 1/2]], loss 5 ln 2 - ln 3."""
    ln3 = math.log(3)
    x = torch.tensor([[1.0, 0], [0, 2]], device=device, requires_grad=True)
    weight = torch.tensor([[0, 0], [ln3, 0]], device=device, requires_grad=True)
    bias = torch.zeros(2, device=device, requires_grad=True)
    row = torch.tensor([0, 1], device=device)
    sample = torch.tensor([1, 0], dtype=torch.int32, device=device)
    loss = bce_loss(x, weight, bias, row, sample)
    torch.testing.assert_close(loss.detach().cpu(), torch.tensor([5 * math.log(2) - ln3]))
    (3 * loss).backward()
    torch.testing.assert_close(x.grad.cpu(), 3 * torch.tensor([[-ln3 / 4, 0], [ln3 / 2, 0]]))
    torch.testing.assert_close(weight.grad.cpu(), 3 * torch.tensor([[0.5, -1], [-0.25, 1]]))
    torch.testing.assert_close(bias.grad.cpu(), 3 * torch.tensor([0, 0.25]))


# 2.
@pytest.mark.parametrize("rows", [-1, 17, 0])
def test_reference_is_autograd(rows: int) -> None:
    step = random_step(6, 23, 5, F32, share=0.3, values=True, states={"bias": F32}, rows=rows)
    t = {k: v.double() if v.is_floating_point() else v for k, v in step.tensors.items()}
    args = (t["x"], t["weight"], t["bias"], t["pos_row"], t["pos_sample"], t["pos_value"])
    expected = exact(step)
    tight = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(reference(*args, rows=rows), expected["loss"], **tight)
    dx, dweight, dbias = reference_backward(*args, rows=rows, need_dweight=True, need_dbias=True)
    torch.testing.assert_close(dx, expected["x"], **tight)
    torch.testing.assert_close(dweight, expected["weight"], **tight)
    torch.testing.assert_close(dbias, expected["bias"], **tight)


# 3.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_no_worse_than_torch(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    step = random_step(*shape, dtype, states={"bias": F32}, values=shape[1] % 2 == 1).to(device)
    got, low, wide = run(step), low_precision(step), exact(step)
    for name in ("loss", *LEAVES):
        if name != "loss":
            assert got[name].dtype == step.tensors[name].dtype
        assert_no_worse(got[name], low[name], wide[name], dtype, what=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=name_of)
def test_x_of_another_format(dtype: torch.dtype, x_dtype: torch.dtype, device: str) -> None:
    step = random_step(33, 1100, 40, dtype, x_dtype=x_dtype, states={"bias": F32}).to(device)
    got, low, wide = run(step), low_precision(step), exact(step)
    assert got["x"].dtype == x_dtype
    coarse = max(dtype, x_dtype, key=lambda t: torch.finfo(t).eps)
    for name in ("loss", *LEAVES):
        assert_no_worse(got[name], low[name], wide[name], coarse, what=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("needs", SUBSETS, ids=lambda n: "+".join(n) or "none")
def test_only_what_is_asked_for(needs: tuple[str, ...], device: str) -> None:
    step = random_step(9, 700, 24, F32, states={"bias": F32}).to(device)
    got, wide = run(step, needs=needs, upstream=-0.5), exact(step, -0.5)
    assert got.keys() == {"loss", *needs}
    for name, value in got.items():
        torch.testing.assert_close(value, wide[name].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_finite_differences(device: str) -> None:
    """The derivative along a random direction, by central differences of the op itself in fp32."""
    g = torch.Generator().manual_seed(0)
    step = random_step(8, 60, 12, F32, share=0.1, states={"bias": F32}).to(device)
    slopes = run(step)
    for name in LEAVES:
        way = torch.randn(step.tensors[name].shape, generator=g).to(device)
        h = 0.004
        ahead, behind = (
            run(step.replace(**{name: step.tensors[name] + s * h * way}), needs=())["loss"].double()
            for s in (1, -1)
        )
        slope = float((slopes[name] * way).double().sum())
        assert float((ahead - behind) / (2 * h)) == pytest.approx(slope, rel=5e-3, abs=0.02)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_agrees_with_the_step(dtype: torch.dtype, device: str) -> None:
    """dx of `bce_step_` is the gradient of `bce_loss`, its loss the loss: bit for bit where every
    sum is exact.
    """
    step = dyadic_step(33, 1500, 40, dtype, hyper=make_hyper(0.0)).to(device)
    t = step.tensors
    dx, loss = bce_step_(
        t["weight"], t["x"], t["pos_row"], t["pos_sample"], t["hyper"], t["counter"], need_loss=True
    )
    got = run(step, needs=("x",))
    assert torch.equal(got["x"], dx.to(dtype))
    torch.testing.assert_close(got["loss"], loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_gradient_bits_where_every_sum_is_exact(dtype: torch.dtype, device: str) -> None:
    for size in ((1, 1, 1), (5, 300, 7), (65, 1025, 100), (257, 1100, 130)):
        step = dyadic_step(*size, dtype).to(device)
        t = step.tensors
        args = (
            t["x"],
            t["weight"],
            torch.zeros(size[1], device=device),
            t["pos_row"],
            t["pos_sample"],
        )
        got = torch.ops.xmlkernels.bce_loss_backward(*args, need_dweight=True, need_dbias=True)
        expected = reference_backward(*args, need_dweight=True, need_dbias=True)
        assert_same_bits(
            dict(zip("xwb", got, strict=True)), dict(zip("xwb", expected, strict=True))
        )


# 4.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [0, 1, 1027, 1499])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_padding_is_not_scored(dtype: torch.dtype, rows: int, device: str) -> None:
    step = random_step(33, 1500, 17, dtype, states={"bias": F32}, rows=rows)
    clean = step.replace(weight=step.tensors["weight"].clone(), bias=step.tensors["bias"].clone())
    step.tensors["weight"][rows:] = math.nan
    step.tensors["bias"][rows:] = math.inf
    got, expected = run(step.to(device)), run(clean.to(device))
    assert_same_bits(got, expected)
    assert (got["weight"][rows:] == 0).all() and (got["bias"][rows:] == 0).all()
    wide = exact(clean)
    assert float(got["loss"]) == pytest.approx(
        float(wide["loss"]), rel=2e-3 if dtype == BF16 else 1e-5
    )


@pytest.mark.parametrize("device", DEVICES)
def test_fill_entries_are_ignored(device: str) -> None:
    step = random_step(9, 900, 16, F32, values=True).to(device)
    fill = {"pos_row": torch.full((40,), 900), "pos_sample": torch.zeros(40, dtype=torch.int32)}
    fill["pos_value"] = torch.full((40,), math.nan)
    filled = step.replace(
        **{k: torch.cat([step.tensors[k], v.to(device)]) for k, v in fill.items()}
    )
    assert_same_bits(run(filled, needs=("x", "weight")), run(step, needs=("x", "weight")))


# What is not finite.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("n", [0, 1, 900])
def test_a_non_finite_x_makes_the_loss_nan(
    n: int, dtype: torch.dtype, bad: float, device: str
) -> None:
    for place in ((0, 0), (69, 22)):
        step = random_step(70, n, 23, dtype, share=0.01).to(device)
        step.tensors["x"][place] = bad
        assert run(step, needs=())["loss"].isnan().all(), place


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nothing_becomes_non_finite_at_the_edges(dtype: torch.dtype, device: str) -> None:
    edge = 65280.0 if dtype == BF16 else 65504.0
    step = random_step(66, 1030, 40, dtype, x_dtype=F32, states={"bias": F32})
    for name in ("weight", "x"):
        step.tensors[name] = step.tensors[name].sign() * edge
    step.tensors["weight"][:2], step.tensors["x"][:2], step.tensors["weight"][2] = edge, edge, -edge
    for name, value in run(step.to(device), needs=("x", "bias")).items():
        assert value.isfinite().all(), name


# 6.
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_threads_and_repeats_change_nothing(dtype: torch.dtype, threads: None) -> None:
    step = random_step(65, 4999, 40, dtype, states={"bias": F32})
    torch.set_num_threads(1)
    first = run(step)
    for count in (1, 2, 2, 4, 3):
        torch.set_num_threads(count)
        assert_same_bits(run(step), first)


@pytest.mark.parametrize("device", DEVICES)
def test_shards_add_up(device: str) -> None:
    step = random_step(33, 3001, 24, F32).to(device)
    t, whole = step.tensors, run(step, needs=("x", "weight"))
    parts = []
    for begin, end in ((0, 1237), (1237, 3001)):
        mine = (t["pos_row"] >= begin) & (t["pos_row"] < end)
        part = step.replace(
            weight=t["weight"][begin:end],
            pos_row=t["pos_row"][mine] - begin,
            pos_sample=t["pos_sample"][mine],
        )
        parts.append(run(part, needs=("x", "weight")))
    torch.testing.assert_close(parts[0]["x"] + parts[1]["x"], whole["x"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        parts[0]["loss"] + parts[1]["loss"], whole["loss"], rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        torch.cat([p["weight"] for p in parts]), whole["weight"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_written_and_no_graph_is_kept_without_grad(device: str) -> None:
    step = random_step(16, 700, 24, BF16, states={"bias": F32}, values=True).to(device)
    t = step.tensors
    before = {k: v.clone() for k, v in t.items()}
    args = (
        t["x"].requires_grad_(),
        t["weight"].requires_grad_(),
        t["bias"],
        t["pos_row"],
        t["pos_sample"],
        t["pos_value"],
    )
    bce_loss(*args).sum().backward()
    with torch.no_grad():
        assert bce_loss(*args).grad_fn is None
    assert_same_bits(before, t)


@pytest.mark.parametrize("device", DEVICES)
def test_an_optimizer_of_ones_own_trains_with_it(device: str) -> None:
    step = random_step(32, 300, 64, F32).to(device)
    t = step.tensors
    weight = torch.nn.Parameter(t["weight"].clone())
    optimizer = torch.optim.Adam([weight], 0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = bce_loss(t["x"], weight, None, t["pos_row"], t["pos_sample"])
        loss.sum().backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
