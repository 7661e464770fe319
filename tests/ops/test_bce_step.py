"""`bce_step_`: one training step of the full label table. Rounding and layout have files of their
own beside this one.
"""

import math

import pytest
import torch

from common import (
    DEVICES,
    DTYPES,
    LOW,
    SHAPES,
    Step,
    assert_no_worse,
    assert_same_bits,
    dense_targets,
    dyadic_step,
    make_counter,
    make_hyper,
    name_of,
    random_step,
    torch_step,
    unit,
)
from xmlkernels.ops import bce_step_
from xmlkernels.ops.hyper import LR, Hyper
from xmlkernels.reference.bce_step import bce_step_ as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ADAM = make_hyper(0.01, 0.1, 0.9, 0.999, 1e-8, 0.5, 2.0)
SGD = make_hyper(0.05, 0.01, 0.9, 0.0, 0.0, 0.5, 2.0)

# name: (states, hyper, options). A state's dtype None is the table's.
VARIANTS = {
    "plain": ({}, SGD, {}),
    "bias": ({"bias": F32}, SGD, {}),
    "decoupled": ({"bias": F32}, SGD, {"decoupled": True}),
    "values": ({}, SGD, {"values": True}),
    "momentum fp32": ({"momentum": F32}, SGD, {}),
    "momentum bf16": ({"momentum": BF16, "bias": F32}, SGD, {}),
    "momentum fp16 decoupled": ({"momentum": F16}, SGD, {"decoupled": True}),
    "adam fp32": ({"momentum": F32, "second": F32}, ADAM, {}),
    "adam bf16": ({"momentum": BF16, "second": BF16, "bias": F32}, ADAM, {}),
    "adamw mixed": ({"momentum": BF16, "second": F32}, ADAM, {"decoupled": True}),
    "kahan": ({"kahan": None}, SGD, {}),
    "kahan adamw": ({"kahan": None, "momentum": BF16, "second": BF16}, ADAM, {"decoupled": True}),
    "no loss": ({}, SGD, {"need_loss": False}),
    "no positives": ({"bias": F32}, SGD, {"share": 0.0}),
    "x fp32": ({}, SGD, {"x_dtype": F32}),
    "x bf16": ({"bias": F32}, SGD, {"x_dtype": BF16}),
    "x fp16": ({"bias": F32}, SGD, {"x_dtype": F16}),
}


def make(variant: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Step:
    states, hyper, options = VARIANTS[variant]
    full = {name: dtype if state is None else state for name, state in states.items()}
    return random_step(*shape, dtype, states=full, hyper=hyper, seed=seed, **options)


def check_against_exact(step: Step) -> None:
    dtype = step.tensors["weight"].dtype
    got, exact, low = step.run(), step.exact(), torch_step(step)
    assert got["dx"].dtype == got["loss"].dtype == torch.float32
    assert_no_worse(got["dx"], low["dx"], exact["dx"], dtype, what="dx")
    if step.options["need_loss"]:
        assert_no_worse(got["loss"], low["loss"], exact["loss"], dtype, what="loss")
    else:
        assert got["loss"].shape == (0,)
    kahan = "kahan" in got
    if kahan:
        whole = got["weight"].double() + got["kahan"].double()
        wide = exact["weight"] + exact["kahan"]
        assert_no_worse(whole, low["weight"], wide, dtype, what="weight + kahan")
    assert_no_worse(
        got["weight"],
        low["weight"],
        exact["weight"] + exact.get("kahan", 0),
        dtype,
        what="weight",
        rounded=dtype,
    )
    for name in ("momentum", "second"):
        if name in got:
            assert_no_worse(
                got[name], low[name], exact[name], dtype, what=name, rounded=got[name].dtype
            )
    if "bias" in got:
        assert_no_worse(got["bias"], low["bias"], exact["bias"], dtype, what="bias")


# 1. A tiny example, worked by hand.
@pytest.mark.parametrize("device", DEVICES)
def test_by_hand(device: str) -> None:
    """x = [[1, 0], [0, 2]], W = [[0, 0], [ln 3, 0]], positives (row 0, sample 1) and (row 1, sample
    0).

    Logits z = [[0, ln 3], [0, 0]], sigma = [[1/2, 3/4], [1/2, 1/2]], G = sigma - y = [[1/2, -1/4],
    [-1/2, 1/2]]. dx = G W = [[-ln 3 / 4, 0], [ln 3 / 2, 0]]. dW = G^T x = [[1/2, -1], [-1/4, 1]];
    db = [0, 1/4]. Loss: softplus(0) three times, softplus(ln 3) = ln 4, less the positives' logits
    0 + ln 3: 5 ln 2 - ln 3.
    """
    ln3 = math.log(3)
    weight = torch.tensor([[0, 0], [ln3, 0]], device=device)
    x = torch.tensor([[1.0, 0], [0, 2]], device=device)
    row = torch.tensor([0, 1], device=device)
    sample = torch.tensor([1, 0], dtype=torch.int32, device=device)
    bias, momentum = torch.zeros(2, device=device), torch.tensor([[1.0, 0], [0, 1]], device=device)
    hyper = make_hyper(0.1, 0.5, 0.5, scale=1, dx_scale=4).to(device)
    counter = make_counter().to(device)
    dx, loss = bce_step_(
        weight, x, row, sample, hyper, counter, bias=bias, momentum=momentum, need_loss=True
    )
    torch.testing.assert_close(dx.cpu(), torch.tensor([[-ln3, 0], [2 * ln3, 0]]))
    torch.testing.assert_close(loss.cpu(), torch.tensor([5 * math.log(2) - ln3]))
    # m = m/2 + dW + w/2: [[1/2 + 1/2, -1], [-1/4 + ln 3 / 2, 1/2 + 1]]
    m = torch.tensor([[1.0, -1], [ln3 / 2 - 0.25, 1.5]])
    torch.testing.assert_close(momentum.cpu(), m)
    torch.testing.assert_close(weight.cpu(), torch.tensor([[0, 0], [ln3, 0]]) - 0.1 * m)
    torch.testing.assert_close(bias.cpu(), torch.tensor([0, -0.025]))


# 2. The reference against float64 autograd and torch's own optimizers.
def torch_optimizer(
    p: torch.nn.Parameter, kind: str, hyper: Step, decoupled: bool
) -> torch.optim.Optimizer:
    lr, decay, beta1, beta2, eps, *_ = Hyper(*hyper.tensors["hyper"].tolist())
    if kind == "adam":
        return (torch.optim.AdamW if decoupled else torch.optim.Adam)(
            [p], lr, (beta1, beta2), eps, decay
        )
    return torch.optim.SGD(
        [p], lr, beta1 if kind == "momentum" else 0, weight_decay=0 if decoupled else decay
    )


@pytest.mark.parametrize("decoupled", [False, True], ids=["l2", "decoupled"])
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_reference_is_autograd_and_torch_optim(kind: str, decoupled: bool) -> None:
    b, n, d = 6, 23, 5
    step = random_step(b, n, d, F32, share=0.2, values=True, hyper=ADAM if kind == "adam" else SGD)
    t = {
        k: v.double() if v.is_floating_point() and k != "hyper" else v
        for k, v in step.tensors.items()
    }
    state = {
        "sgd": {},
        "momentum": {"momentum": torch.zeros(n, d).double()},
        "adam": {"momentum": torch.zeros(n, d).double(), "second": torch.zeros(n, d).double()},
    }[kind]
    weight, bias = t["weight"].clone(), torch.randn(n).double()
    p, p_bias = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(bias.clone())
    optimizer = torch_optimizer(p, kind, step, decoupled)
    bias_optimizer = torch.optim.SGD([p_bias], float(t["hyper"][LR]))
    lr, decay, *_, scale, dx_scale = Hyper(*t["hyper"].tolist())
    y = dense_targets(step.tensors, n).double()
    for number in range(6):
        x = torch.randn(b, d).double().requires_grad_()
        loss = scale * torch.nn.BCEWithLogitsLoss(reduction="sum")(
            torch.nn.functional.linear(x, p, p_bias), y
        )
        optimizer.zero_grad()
        bias_optimizer.zero_grad()
        loss.backward()
        if decoupled and kind != "adam":
            p.data.mul_(1 - lr * decay)
        optimizer.step()
        bias_optimizer.step()
        dx, got = reference(
            weight,
            x.detach(),
            t["pos_row"],
            t["pos_sample"],
            t["hyper"],
            make_counter(step=number),
            pos_value=t["pos_value"],
            bias=bias,
            decoupled=decoupled,
            need_loss=True,
            **state,
        )
        tight = {"rtol": 1e-11, "atol": 1e-12}
        torch.testing.assert_close(got, loss.detach().reshape(1), **tight)
        torch.testing.assert_close(dx, dx_scale * x.grad, **tight)
        torch.testing.assert_close(weight, p.detach(), **tight)
        torch.testing.assert_close(bias, p_bias.detach(), **tight)
    if kind == "momentum":
        torch.testing.assert_close(
            state["momentum"], optimizer.state[p]["momentum_buffer"], rtol=1e-11, atol=1e-12
        )
    if kind == "adam":
        torch.testing.assert_close(
            state["second"], optimizer.state[p]["exp_avg_sq"], rtol=1e-11, atol=1e-12
        )


# 3. The kernel is no worse than PyTorch at the same precision.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_no_worse_than_torch_on_every_shape(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    check_against_exact(make("plain", shape, dtype).to(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_worse_than_torch_with_every_option(
    variant: str, dtype: torch.dtype, device: str
) -> None:
    if "kahan" in variant and dtype == F32:
        pytest.skip("fp32 tables take no compensation")
    for shape in ((5, 333, 17), (65, 1100, 100)):
        check_against_exact(make(variant, shape, dtype).to(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 200, 16), (0, 0, 16), (64, 0, 16), (0, 33, 7)], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_empty(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    """No samples: decay and momentum still move the rows. No rows: dx and loss are 0."""
    step = random_step(*shape, dtype, states={"momentum": F32, "bias": F32}, hyper=SGD).to(device)
    got, exact = step.run(), step.exact()
    assert (got["dx"] == 0).all() and got["dx"].shape == (shape[0], shape[2])
    assert got["loss"].tolist() == [0.0]
    torch.testing.assert_close(got["momentum"], exact["momentum"].float())
    error = (got["weight"].double() - exact["weight"]).abs()
    slack = 4e-7 * exact["weight"].abs().clamp(min=0.1)
    assert (error <= slack + (unit(exact["weight"], dtype) if dtype in LOW else 0)).all()


# 4. Boundary ids.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_corner_positives(dtype: torch.dtype, device: str) -> None:
    """First and last row, first and last sample: the exact sums show one misplaced target at
    once.
    """
    b, n, d = 65, 1501, 16
    base = dyadic_step(b, n, d, dtype, share=0.0)
    for pairs in (
        [(0, 0)],
        [(0, b - 1)],
        [(n - 1, 0)],
        [(n - 1, b - 1)],
        [(0, 0), (0, 1), (n - 1, b - 2), (n - 1, b - 1)],
    ):
        row, sample = (torch.tensor(v) for v in zip(*pairs, strict=True))
        step = base.replace(pos_row=row, pos_sample=sample.to(torch.int32)).to(device)
        assert_same_bits(step.run(), step.reference(), but=("loss",))


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_with_every_sample_and_a_sample_with_every_row(device: str) -> None:
    b, n = 70, 1500
    y = torch.zeros(n, b)
    y[777], y[:, 33] = 1, 1
    row, sample = y.nonzero(as_tuple=True)
    step = (
        dyadic_step(b, n, 24, BF16)
        .replace(pos_row=row, pos_sample=sample.to(torch.int32))
        .to(device)
    )
    assert_same_bits(step.run(), step.reference(), but=("loss",))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("poison", [math.nan, 60000.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rows", [0, 1, 1027, 1499])
def test_padding_is_neither_scored_nor_trained(
    rows: int, dtype: torch.dtype, poison: float, device: str
) -> None:
    b, n, d = 33, 1500, 17
    states = {"bias": F32, "momentum": BF16, "second": F32}
    states |= {} if dtype == F32 else {"kahan": dtype}
    step = random_step(b, n, d, dtype, states=states, hyper=ADAM, rows=rows)
    for name in ("weight", *states):
        step.tensors[name][rows:] = poison
    keep = step.tensors["pos_row"] < rows
    fit = {k: step.tensors[k][:rows].clone() for k in ("weight", *states)}
    short = step.replace(
        pos_row=step.tensors["pos_row"][keep],
        pos_sample=step.tensors["pos_sample"][keep],
        rows=-1,
        **fit,
    )
    got, alone = step.to(device).run(), short.to(device).run()
    for name in ("weight", *states):
        assert_same_bits({name: got[name][rows:]}, {name: step.tensors[name][rows:]})
        assert_same_bits({name: got[name][:rows]}, {name: alone[name]})
    assert_same_bits({k: got[k] for k in ("dx", "loss")}, alone)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("values", [False, True])
def test_fill_entries_are_ignored(values: bool, device: str) -> None:
    """A captured graph has room for more positives than a batch has; the rest is filled with row =
    n.
    """
    n, rows = 900, 850
    step = random_step(
        9, n, 16, BF16, states={"momentum": F32}, hyper=SGD, values=values, rows=rows
    )
    keep = step.tensors["pos_row"] < rows
    step = step.replace(
        **{
            k: step.tensors[k][keep]
            for k in ("pos_row", "pos_sample", "pos_value")
            if k in step.tensors
        }
    )
    fill = {"pos_row": torch.full((40,), rows), "pos_sample": torch.zeros(40, dtype=torch.int32)}
    fill |= {"pos_value": torch.full((40,), math.nan)} if values else {}
    filled = step.replace(**{k: torch.cat([step.tensors[k], v]) for k, v in fill.items()})
    assert_same_bits(filled.to(device).run(), step.to(device).run())
    # Every sample, on rows beyond.
    whole = torch.arange(rows, rows + 9 * 6).reshape(-1, 9)[:, 0].repeat_interleave(9)
    fill = {"pos_row": whole, "pos_sample": torch.arange(9, dtype=torch.int32).repeat(6)}
    fill |= {"pos_value": torch.ones(54)} if values else {}
    filled = step.replace(**{k: torch.cat([step.tensors[k], v]) for k, v in fill.items()})
    assert_same_bits(filled.to(device).run(), step.to(device).run())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_loss_does_not_change_the_step(dtype: torch.dtype, device: str) -> None:
    step = make("momentum bf16", (65, 1500, 40), dtype).to(device)
    assert_same_bits(step.run(), step.replace(need_loss=False).run(), but=("loss",))


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_are_left_alone(device: str) -> None:
    step = make("values", (16, 700, 24), BF16).to(device)
    before = {k: v.clone() for k, v in step.tensors.items()}
    t = step.tensors
    bce_step_(
        t["weight"],
        t["x"],
        t["pos_row"],
        t["pos_sample"],
        t["hyper"],
        t["counter"],
        pos_value=t["pos_value"],
    )
    assert_same_bits({k: v for k, v in before.items() if k != "weight"}, t)


@pytest.mark.parametrize("device", DEVICES)
def test_the_step_trains(device: str) -> None:
    """Steps on a problem that can be learned bring the loss down in every format alike."""
    losses = {}
    for dtype in DTYPES:
        step = random_step(32, 300, 64, dtype, hyper=make_hyper(0.1)).to(device)
        run = [step.run()]
        for number in range(30):
            step = step.replace(
                weight=run[-1]["weight"], counter=make_counter(step=number).to(device)
            )
            run.append(step.run())
        losses[dtype] = [float(r["loss"]) for r in run]
        assert losses[dtype][-1] < 0.02 * losses[dtype][0]
    for dtype in LOW:
        assert losses[dtype][-1] == pytest.approx(losses[F32][-1], rel=0.1)
