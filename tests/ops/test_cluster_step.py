"""`cluster_step_`: one training step of the rows in each sample's clusters. Stored bits have a file
of their own beside.
"""

import math

import pytest
import torch

from common import (
    DEVICES,
    DTYPES,
    assert_no_worse,
    assert_same_bits,
    dense_targets,
    make_counter,
    make_hyper,
    name_of,
)
from common_cluster import (
    SHAPES,
    ClusterStep,
    assert_scores,
    random_cluster_step,
    torch_cluster_step,
)
from xmlkernels.ops import Hyper, cluster_step_
from xmlkernels.reference.cluster_step import cluster_step_ as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ADAM = make_hyper(0.01, 0.1, 0.9, 0.999, 1e-8, 0.5, 2.0)
SGD = make_hyper(0.05, 0.01, 0.9, 0.0, 0.0, 0.5, 2.0)
MIXED = (40, [9, 0, 60, 7, 11, 3, 100, 10], 4, 100)  # small and large clusters in one call

# name: (states, hyper, options). A state's dtype None is the table's; "rows" is a row-wise second
# moment in fp32.
VARIANTS = {
    "plain": ({}, SGD, {}),
    "bias": ({"bias": F32}, SGD, {}),
    "decoupled": ({"bias": F32}, SGD, {"decoupled": True}),
    "values": ({}, SGD, {"values": True}),
    "momentum bf16": ({"momentum": BF16, "bias": F32}, SGD, {}),
    "adam fp32": ({"momentum": F32, "second": F32}, ADAM, {}),
    "adam bf16": ({"momentum": BF16, "second": BF16, "bias": F32}, ADAM, {}),
    "adamw mixed": ({"momentum": BF16, "second": F32}, ADAM, {"decoupled": True}),
    "adam by rows": ({"momentum": BF16, "second": "rows"}, ADAM, {}),
    "adamw by rows": ({"momentum": F32, "second": "rows"}, ADAM, {"decoupled": True}),
    "kahan": ({"kahan": None}, SGD, {}),
    "kahan adamw": ({"kahan": None, "momentum": BF16, "second": BF16}, ADAM, {"decoupled": True}),
    "no loss": ({}, SGD, {"need_loss": False}),
    "no positives": ({"bias": F32}, SGD, {"share": 0.0}),
    "x fp32": ({}, SGD, {"x_dtype": F32}),
    "x bf16": ({"bias": F32}, SGD, {"x_dtype": BF16}),
}


def make(variant: str, shape: tuple, dtype: torch.dtype) -> ClusterStep:
    states, hyper, options = VARIANTS[variant]
    full = {
        name: dtype if state is None else F32 if state == "rows" else state
        for name, state in states.items()
    }
    step = random_cluster_step(*shape, dtype, states=full, hyper=hyper, **options)
    if states.get("second") == "rows":
        step = step.replace(second=step.tensors["second"].mean(1))
    return step


def check_against_exact(step: ClusterStep) -> None:
    dtype = step.tensors["weight"].dtype
    got, exact, low = step.run(), step.exact(), torch_cluster_step(step)
    assert got["dx"].dtype == got["scores"].dtype == got["loss"].dtype == F32
    assert_no_worse(got["dx"], low["dx"], exact["dx"], dtype, what="dx")
    assert_scores(got["scores"], low["scores"], exact["scores"], dtype)
    if step.options["need_loss"]:
        assert_no_worse(got["loss"], low["loss"], exact["loss"], dtype, what="loss")
    else:
        assert got["loss"].shape == (0,)
    if "kahan" in got:
        whole = got["weight"].double() + got["kahan"].double()
        wide = exact["weight"] + exact["kahan"]
        assert_no_worse(whole, low["weight"], wide, dtype, what="weight + kahan")
    rest = exact.get("kahan", 0)
    assert_no_worse(
        got["weight"], low["weight"], exact["weight"] + rest, dtype, what="weight", rounded=dtype
    )
    for name in ("momentum", "second"):
        if name in got:
            assert_no_worse(
                got[name], low[name], exact[name], dtype, what=name, rounded=got[name].dtype
            )
    if "bias" in got:
        assert_no_worse(got["bias"], low["bias"], exact["bias"], dtype, what="bias")
    untouched = ~step.mask().any(0)
    for name in got.keys() & {"weight", "momentum", "second", "kahan", "bias"}:
        assert_same_bits({name: got[name][untouched]}, {name: step.tensors[name][untouched]})


# 1. A tiny example, worked by hand.
@pytest.mark.parametrize("device", DEVICES)
def test_by_hand(device: str) -> None:
    """W = [[0, 0], [ln 3, 0], [7, 7]], clusters {0, 1} and {2}; x = [[1, 0], [0, 2]]; sample 0
    selects the first cluster, and sample 1 none. Positives: (1, 0), and (0, 1), (2, 0) outside the
    shortlists.

    Logits of sample 0: 0, ln 3; sigma 1/2, 3/4; G = 2 (sigma - y) = 1, -1/2. dx_0 = 3 G W = [-3 ln
    3 / 2, 0]. dW = G^T x = [[1, 0], [-1/2, 0]], db = [1, -1/2]. Loss: 2 (softplus(0) + softplus(ln
    3) - ln 3) = 2 (3 ln 2 - ln 3).
    """
    ln3 = math.log(3)
    weight = torch.tensor([[0, 0], [ln3, 0], [7, 7]], device=device)
    x = torch.tensor([[1.0, 0], [0, 2]], device=device)
    clusters = torch.tensor([[-1, 0], [-1, -1]], device=device)
    row_ptr = torch.tensor([0, 2, 3], device=device)
    row = torch.tensor([0, 1, 2], device=device)
    sample = torch.tensor([1, 0, 0], dtype=torch.int32, device=device)
    bias = torch.zeros(3, device=device)
    momentum = torch.tensor([[1.0, 0], [0, 1], [5, 5]], device=device)
    hyper = make_hyper(0.1, 0.5, 0.5, scale=2, dx_scale=3).to(device)
    counter = make_counter().to(device)
    dx, scores, loss = cluster_step_(
        weight,
        x,
        clusters,
        row_ptr,
        3,
        row,
        sample,
        hyper,
        counter,
        bias=bias,
        momentum=momentum,
        need_loss=True,
    )
    torch.testing.assert_close(dx.cpu(), torch.tensor([[-1.5 * ln3, 0], [0, 0]]))
    torch.testing.assert_close(loss.cpu(), torch.tensor([2 * (3 * math.log(2) - ln3)]))
    expected = torch.full((2, 2, 3), -math.inf)
    expected[0, 1, :2] = torch.tensor([0, ln3])
    torch.testing.assert_close(scores.cpu(), expected)
    # m = m/2 + dW + w/2 on the selected rows
    m = torch.tensor([[1.5, 0], [ln3 / 2 - 0.5, 0.5], [5, 5]])
    torch.testing.assert_close(momentum.cpu(), m)
    moved = torch.tensor([[0, 0], [ln3, 0], [7, 7]]) - 0.1 * m * torch.tensor([[1.0], [1], [0]])
    torch.testing.assert_close(weight.cpu(), moved)
    torch.testing.assert_close(bias.cpu(), torch.tensor([-0.1, 0.05, 0]))


# 2. The reference against float64 autograd on the masked dense problem and torch's own optimizers.
@pytest.mark.parametrize("decoupled", [False, True], ids=["l2", "decoupled"])
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_reference_is_autograd_and_torch_optim(kind: str, decoupled: bool) -> None:
    """Torch's optimizers see the selected rows alone, as a parameter of their own. The shortlist
    stays, so that a row's count of steps is the table's."""
    step = random_cluster_step(
        *SHAPES["ragged"], F32, share=0.2, values=True, hyper=ADAM if kind == "adam" else SGD
    )
    t = {
        k: v.double() if v.is_floating_point() and k != "hyper" else v
        for k, v in step.tensors.items()
    }
    mask, d = step.mask(), t["x"].shape[1]
    touched = mask.any(0)
    n = len(touched)
    names = {"sgd": (), "momentum": ("momentum",), "adam": ("momentum", "second")}[kind]
    state = {name: torch.zeros(n, d).double() for name in names}
    weight, bias = t["weight"].clone(), torch.randn(n).double()
    p, p_bias = torch.nn.Parameter(weight[touched]), torch.nn.Parameter(bias[touched])
    lr, decay, beta1, beta2, eps, scale, dx_scale = Hyper(*t["hyper"].tolist())
    optimizer: torch.optim.Optimizer
    if kind == "adam":
        optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)(
            [p], lr, (beta1, beta2), eps, decay
        )
    else:
        optimizer = torch.optim.SGD(
            [p], lr, beta1 if names else 0, weight_decay=0 if decoupled else decay
        )
    y = dense_targets(step.tensors, n).double()[:, touched]
    tight = {"rtol": 1e-11, "atol": 1e-12}
    for number in range(5):
        x = torch.randn(len(mask), d).double().requires_grad_()
        z = torch.nn.functional.linear(x, p, p_bias)
        terms = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none")
        loss = scale * terms[mask[:, touched]].sum()
        x_grad, p.grad, bias_grad = torch.autograd.grad(loss, (x, p, p_bias))
        p_bias.data -= lr * bias_grad
        if decoupled and kind != "adam":
            p.data.mul_(1 - lr * decay)
        optimizer.step()
        dx, scores, got = reference(
            weight,
            x.detach(),
            t["clusters"],
            t["row_ptr"],
            11,
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
        torch.testing.assert_close(got, loss.detach().reshape(1), **tight)
        torch.testing.assert_close(dx, dx_scale * x_grad, **tight)
        torch.testing.assert_close(weight[touched], p.detach(), **tight)
        torch.testing.assert_close(bias[touched], p_bias.detach(), **tight)
        assert torch.equal(weight[~touched], t["weight"][~touched])
        real = z.detach()[mask[:, touched]].sum()  # every candidate's score stands once
        torch.testing.assert_close(scores[scores > -math.inf].sum(), real, **tight)
    if kind == "adam":
        torch.testing.assert_close(
            state["second"][touched], optimizer.state[p]["exp_avg_sq"], **tight
        )


# 3. The kernel is no worse than PyTorch at the same precision.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_torch_on_every_shape(shape: str, dtype: torch.dtype, device: str) -> None:
    check_against_exact(make("bias", SHAPES[shape], dtype).to(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_worse_than_torch_with_every_option(
    variant: str, dtype: torch.dtype, device: str
) -> None:
    if "kahan" in variant and dtype == F32:
        pytest.skip("fp32 tables take no compensation")
    check_against_exact(make(variant, MIXED, dtype).to(device))


@pytest.mark.parametrize("device", DEVICES)
def test_an_empty_shortlist_moves_nothing(device: str) -> None:
    """No candidate: dx and loss are 0, scores -inf, and decay and momentum leave every row
    alone.
    """
    step = make("momentum bf16", MIXED, BF16)
    step = step.replace(clusters=torch.full_like(step.tensors["clusters"], -1)).to(device)
    got = step.run()
    assert (got["dx"] == 0).all()
    assert got["loss"].tolist() == [0.0]
    assert (got["scores"] == -math.inf).all()
    assert_same_bits({k: got[k] for k in ("weight", "momentum", "bias")}, step.tensors)


# 4. Boundary ids.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_positives_outside_the_shortlist_are_ignored(dtype: torch.dtype, device: str) -> None:
    step = make("values", MIXED, dtype)
    t, mask = step.tensors, step.mask()
    inside = mask[t["pos_sample"].long(), t["pos_row"]]
    assert 0 < inside.sum() < len(inside)
    alone = step.replace(**{k: t[k][inside] for k in ("pos_row", "pos_sample", "pos_value")})
    assert_same_bits(alone.to(device).run(), step.to(device).run())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("poison", [math.nan, 60000.0])
@pytest.mark.parametrize("rows", [0, 1, 77, 150, 203])
def test_padding_is_neither_scored_nor_trained(rows: int, poison: float, device: str) -> None:
    """Rows from `rows` on, in the midst of clusters small and large: as a table that ends there."""
    states = {"bias": F32, "momentum": BF16, "second": F32, "kahan": BF16}
    step = random_cluster_step(*MIXED, BF16, states=states, hyper=ADAM, rows=rows)
    for name in ("weight", *states):
        step.tensors[name][rows:] = poison
    t = step.tensors
    fit = {k: t[k][:rows].clone() for k in ("weight", *states)}
    keep = t["pos_row"] < rows
    pos = {k: t[k][keep] for k in ("pos_row", "pos_sample")}
    short = step.replace(**fit, **pos, row_ptr=t["row_ptr"].clamp(max=rows), rows=-1)
    got, alone = step.to(device).run(), short.to(device).run()
    for name in ("weight", *states):
        assert_same_bits({name: got[name][rows:]}, {name: t[name][rows:]})
        assert_same_bits({name: got[name][:rows]}, {name: alone[name]})
    assert_same_bits({k: got[k] for k in ("dx", "scores", "loss")}, alone)
    filled = step.replace(
        **{
            k: torch.cat([t[k], torch.full((9,), v).to(t[k].dtype)])
            for k, v in (("pos_row", t["weight"].shape[0]), ("pos_sample", 0))
        }
    )
    assert_same_bits(filled.to(device).run(), got)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_what_nobody_selects_is_not_read(dtype: torch.dtype, device: str) -> None:
    step = make("adam bf16", MIXED, dtype)
    step = step.replace(
        clusters=torch.where(step.tensors["clusters"] == 3, -1, step.tensors["clusters"])
    )
    untouched = ~step.mask().any(0)
    clean = step.to(device).run()
    for name in ("weight", "momentum", "second", "bias"):
        step.tensors[name][untouched] = math.nan
    got = step.to(device).run()
    for name, value in got.items():
        rows = name in ("weight", "momentum", "second", "bias")
        assert_same_bits(
            {name: value[~untouched] if rows else value},
            {name: clean[name][~untouched] if rows else clean[name]},
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_non_finite_x_leaves_everything_as_it_was(
    dtype: torch.dtype, bad: float, device: str
) -> None:
    """Also in a sample that selects nothing."""
    names = {"momentum": BF16, "second": F32, "bias": F32} | (
        {} if dtype == F32 else {"kahan": dtype}
    )
    for place in ((0, 0), (39, 99)):
        step = random_cluster_step(*MIXED, dtype, states=names, hyper=ADAM)
        step.tensors["x"][place] = bad
        step.tensors["clusters"][place[0]] = -1
        step = step.to(device)
        got = step.run()
        assert_same_bits({k: got[k] for k in ("weight", *names)}, step.tensors)
        assert all(got[k].isnan().all() and got[k].numel() for k in ("dx", "scores", "loss"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lr", [1e-3, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nothing_becomes_non_finite_at_the_edges(
    dtype: torch.dtype, lr: float, device: str
) -> None:
    """|x| = |w| = 65,504 (65,280 in bf16), all signs."""
    hyper = make_hyper(lr, 0.1, 0.9, 0.999, 1e-8, 1.0, 1024.0)
    step = random_cluster_step(
        *MIXED, dtype, states={"bias": F32, "momentum": dtype, "second": dtype}, hyper=hyper
    )
    for name in ("weight", "x"):
        value = step.tensors[name]
        step.tensors[name] = (value.float().sign() * (65280.0 if dtype == BF16 else 65504.0)).to(
            dtype
        )
    for name, value in step.to(device).run().items():
        assert (value[value != -math.inf] if name == "scores" else value).isfinite().all(), name


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_are_left_alone(device: str) -> None:
    step = make("values", MIXED, BF16).to(device)
    t = step.tensors
    before = {k: v.clone() for k, v in t.items()}
    cluster_step_(
        t["weight"],
        t["x"],
        t["clusters"],
        t["row_ptr"],
        100,
        t["pos_row"],
        t["pos_sample"],
        t["hyper"],
        t["counter"],
        pos_value=t["pos_value"],
    )
    assert_same_bits({k: v for k, v in before.items() if k != "weight"}, t)
