"""Label tables in e4m3 with a power-of-two scale per row: coding, unbiased rounding, and the three
head ops on them.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from common import (
    DEVICES,
    Step,
    assert_no_worse,
    assert_same_bits,
    bits,
    decoded,
    dense_targets,
    dyadic_step,
    fp8_step,
    make_counter,
    make_hyper,
    needs_kernels,
    opcheck,
    random_step,
    to_fp8,
    torch_step,
    unit,
)
from test_fp8_rounding import CODES, E4M3, WEIGHTS, value_of
from xmlkernels.errors import InputError
from xmlkernels.ops import bce_loss, bce_step_, matmul_topk

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [
    (1, 1, 1),
    (0, 37, 16),
    (5, 0, 7),
    (5, 129, 7),
    (64, 1024, 64),
    (100, 2051, 100),
    (65, 1537, 384),
]


# 1. Every code
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 5, 70])
def test_the_kernels_decode_every_code(width: int, device: str) -> None:
    """Each row is one code in one column; x picks that column, so that each score is one decoded
    value.
    """
    for scale in (1.0, 2.0**-8, 2.0**-100):
        weight = torch.zeros(256, width, dtype=torch.uint8)
        weight[:, -1] = CODES
        x = torch.zeros(1, width)
        x[0, -1] = 1
        row_scale = torch.tensor([[scale, 0.0]]).repeat(256, 1)
        values, rows = matmul_topk(
            x.to(device), weight.view(E4M3).to(device), None, 256, row_scale=row_scale.to(device)
        )
        found = rows[0].cpu() >= 0
        assert sorted((rows[0].cpu()[~found]).tolist()) == [-1, -1]  # the two NaN codes
        got = dict(zip(rows[0].cpu()[found].tolist(), values[0].cpu()[found].tolist(), strict=True))
        assert got == {c: value_of(c) * scale for c in range(256) if c & 0x7F != 0x7F}


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_of_length_zero_moves_no_value(device: str) -> None:
    weight = (
        CODES[CODES.bitwise_and(0x7F) != 0x7F]
        .repeat(2, 3)[:, :300]
        .contiguous()
        .view(E4M3)
        .to(device)
    )
    row_scale = torch.tensor([[2.0**-8, 0.0], [2.0**5, 0.0]], device=device)
    before, kept = decoded(weight, row_scale), weight.clone()
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    step = (empty, empty.int(), make_hyper(0.0).to(device), make_counter().to(device))
    bce_step_(weight, torch.randn(3, 300, device=device), *step, row_scale=row_scale)
    assert torch.equal(decoded(weight, row_scale), before)
    assert float((bits(weight) == bits(kept)).float().mean()) > 0.98  # -0 may become 0
    assert row_scale[:, 1].tolist() == [448 * 2.0**-8, 448 * 2.0**5]


# 2. Updates without bias
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("w", WEIGHTS)
def test_the_step_moves_the_mean_by_the_update(w: float, device: str) -> None:
    """By 3 % of a unit, which rounding to nearest would lose everywhere, subnormals included;
    48,000 equal weights.
    """
    n, d = 6000, 8
    weight, row_scale = to_fp8(torch.full((n, d), w), 2.0**-7)
    start = decoded(weight, row_scale)[0, 0].double()
    x = torch.full((1, d), -1.0 if w < 2 else 1.0)
    spacing = unit(start / 2.0**-7, E4M3) * 2.0**-7
    change = 0.03 * float(spacing)
    lr = change / float(torch.sigmoid(start * x.sum()))
    hyper, counter, none = make_hyper(lr), make_counter(), torch.zeros(0, dtype=torch.int64)
    weight, row_scale = weight.to(device), row_scale.to(device)
    args = (x, none, none.int(), hyper, counter)
    bce_step_(weight, *(t.to(device) for t in args), row_scale=row_scale)
    got = decoded(weight, row_scale).double().cpu()
    expected = start - change * x[0, 0].double()
    # One draw is off by spacing * sqrt(0.03 * 0.97) in the mean square.
    assert abs(float(got.mean() - expected)) < 5 * float(spacing) * 0.171 / (n * d) ** 0.5
    assert 0.02 < float((got != start).double().mean()) < 0.04


# 3. Against the exact step
def make(shape: tuple[int, int, int], rule: str, **options: Any) -> Step:
    states = {
        "sgd": {},
        "momentum": {"momentum": BF16},
        "adam": {"momentum": BF16, "second": BF16},
    }[rule]
    hyper = make_hyper(0.05 if rule != "adam" else 0.003, 0.01, 0.9, 0.95, 1e-3, 0.5, 2.0)
    step = random_step(
        *shape, F32, x_dtype=BF16, states={"bias": F32} | states, hyper=hyper, **options
    )
    step = step.replace(weight=step.tensors["weight"] * 3)
    return fp8_step(step, 2.0**-8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_torch(shape: tuple[int, int, int], rule: str, device: str) -> None:
    step = make(shape, rule).to(device)
    t = step.tensors
    got, exact = step.run(), step.exact()
    wide = Step(
        {k: v for k, v in t.items() if k != "row_scale"}
        | {"weight": decoded(t["weight"], t["row_scale"]).to(BF16)}
    )
    low = torch_step(wide)
    for name in ("dx", "loss", "bias"):
        assert_no_worse(got[name], low[name], exact[name], BF16, what=name)
    for name in {"momentum", "second"} & t.keys():
        assert_no_worse(got[name], low[name], exact[name], BF16, what=name, rounded=BF16)
    if shape[1]:
        in_units, scale = exact["weight"] / t["row_scale"][:, :1], t["row_scale"][:, :1].cpu()
        assert float(in_units.abs().max()) < 448
        nearest = in_units.float().to(E4M3).float()
        low8 = (low["weight"].float() / t["row_scale"][:, :1]).to(E4M3).float()
        assert_no_worse(got["weight"].float(), low8, nearest, E4M3, what="weight")
        new = decoded(got["weight"], got["row_scale"]).cpu().double()
        slack = 2 * (low["weight"].cpu().double() - exact["weight"].cpu()).abs().max()
        spacing = unit(torch.maximum(new.abs(), exact["weight"].cpu().abs()) / scale, E4M3) * scale
        assert ((new - exact["weight"].cpu()).abs() < spacing + slack).all()
        top = torch.maximum(
            t["row_scale"][:, 1], decoded(got["weight"], got["row_scale"]).abs().amax(1)
        )
        assert torch.equal(got["row_scale"], torch.stack([t["row_scale"][:, 0], top], 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("x_dtype", [F32, BF16, F16])
def test_loss_and_topk_on_the_decoded_table(x_dtype: torch.dtype, device: str) -> None:
    b, n, d = 33, 1100, 40
    step = random_step(b, n, d, F32, x_dtype=x_dtype, states={"bias": F32}).to(device)
    t = fp8_step(step, 2.0**-9).tensors
    table = decoded(t["weight"], t["row_scale"])
    x, wide = t["x"].clone().requires_grad_(), t["x"].double().requires_grad_()
    bias = t["bias"].clone().requires_grad_()
    loss = bce_loss(x, t["weight"], bias, t["pos_row"], t["pos_sample"], row_scale=t["row_scale"])
    loss.sum().backward()
    z = wide @ table.double().T + t["bias"].double()
    target = dense_targets(t, n).double()
    exact = torch.nn.BCEWithLogitsLoss(reduction="sum")(z, target)
    exact.backward()
    z_low = (t["x"].to(BF16).float() @ table.T + t["bias"]).to(BF16)
    g = (torch.sigmoid(z_low) - target.to(BF16)).float()
    assert_no_worse(
        loss.detach(),
        exact.detach().float().reshape(1).to(BF16),
        exact.detach().reshape(1),
        BF16,
        what="loss",
    )
    assert_no_worse(
        x.grad, (g @ table).to(BF16), wide.grad, BF16 if x_dtype != F16 else F16, what="dx"
    )
    g_exact = torch.sigmoid(z.detach()) - target
    assert_no_worse(bias.grad, g.sum(0), g_exact.sum(0), BF16, what="dbias")
    values, rows = matmul_topk(t["x"], t["weight"], t["bias"], 7, row_scale=t["row_scale"])
    assert_no_worse(
        values, z_low.float().topk(7).values, z.detach().topk(7).values, BF16, what="values"
    )
    assert_no_worse(
        values, z_low.float().gather(1, rows), z.detach().gather(1, rows), BF16, what="rows"
    )


# 4. One answer whatever threads and shards
@needs_kernels
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_threads_and_repeats_give_the_same_bits(rule: str, threads: None) -> None:
    step = make((65, 1537, 100), rule)
    torch.set_num_threads(1)
    one = step.run()
    for count in (2, 3):
        torch.set_num_threads(count)
        assert_same_bits(one, step.run())


@pytest.mark.parametrize("device", DEVICES)
def test_shards_draw_by_global_row(device: str) -> None:
    step = make((33, 900, 70), "adam", share=0.0).to(device)
    whole = step.replace(row_offset=2**33 - 400).run()
    parts = []
    for begin, end in ((0, 400), (400, 900)):  # the second begins at row 2^33
        names = ("weight", "row_scale", "bias", "momentum", "second")
        piece = {k: step.tensors[k][begin:end].clone() for k in names}
        parts.append(step.replace(**piece, row_offset=2**33 - 400 + begin).run())
    for name in ("weight", "row_scale", "momentum", "second"):
        assert torch.equal(bits(torch.cat([p[name] for p in parts])), bits(whole[name])), name
    elsewhere = step.run()
    assert not torch.equal(bits(elsewhere["weight"]), bits(whole["weight"]))


@pytest.mark.parametrize("device", DEVICES)
def test_exact_sums_give_the_bits_of_the_reference(device: str) -> None:
    """Scales from 2^-11 to 2^-8: subnormals, normals, and rows that saturate."""
    for shape, exponent in (((33, 700, 24), -6), ((17, 521, 150), -18)):
        base = dyadic_step(
            *shape, F32, exponent=exponent, lr=2.0 ** (exponent - 2), x_dtype=BF16, need_loss=False
        )
        step = fp8_step(base, 2.0 ** -(torch.arange(shape[1]) % 4 + 8).float()).to(device)
        assert_same_bits(step.run(), step.reference(), but=("loss",))


# 5. Edges
@pytest.mark.parametrize("device", DEVICES)
def test_padding_rows_are_not_touched(device: str) -> None:
    step = make((33, 300, 40), "adam").replace(rows=271).to(device)
    got = step.run()
    for name in ("weight", "row_scale", "momentum", "second", "bias"):
        assert torch.equal(bits(got[name][271:]), bits(step.tensors[name][271:])), name
        assert not torch.equal(bits(got[name][:271]), bits(step.tensors[name][:271])), name


@pytest.mark.parametrize("device", DEVICES)
def test_stores_saturate_at_448_scales(device: str) -> None:
    step = make((9, 50, 33), "sgd").replace(hyper=make_hyper(1e30)).to(device)
    got = step.run()
    assert got["dx"].isfinite().all()
    assert (got["weight"].float().abs() == 448).all()
    assert (got["row_scale"][:, 1] == 448 * 2.0**-8).all()
    again = step.replace(
        weight=got["weight"],
        row_scale=got["row_scale"],
        x=torch.full((9, 33), 65504.0, device=device),
    )
    assert all(
        v.float().isfinite().all()
        for v in again.replace(hyper=make_hyper(0.1).to(device)).run().values()
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_non_finite_x_changes_nothing(device: str) -> None:
    step = make((9, 50, 33), "adam").to(device)
    step.tensors["x"][4, 5] = torch.inf
    got = step.run()
    assert got["dx"].isnan().all() and got["loss"].isnan().all()
    assert_same_bits({k: got[k] for k in step.tensors.keys() & got.keys()}, step.tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["bce_step_", "bce_loss", "matmul_topk"])
def test_opcheck(op: str, device: str) -> None:
    """All but the schema's own test, which compares by torch.allclose: that has no e4m3. It is made
    up for below.
    """
    t = make((5, 40, 7), "adam").to(device).tensors
    t["row_scale"][:, 1] = 0  # so that the step raises it
    before = {k: v.clone() for k, v in t.items()}
    some = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    function = getattr(torch.ops.xmlkernels, op).default
    positives = (t["pos_row"], t["pos_sample"])
    if op == "bce_step_":
        named = {k: t[k] for k in ("bias", "momentum", "second", "row_scale")}
        opcheck(
            function,
            (t["weight"], t["x"], *positives, t["hyper"], t["counter"]),
            named,
            test_utils=some,
        )
    elif op == "bce_loss":
        x = t["x"].clone().requires_grad_()
        opcheck(
            function,
            (x, t["weight"], t["bias"], *positives, None, t["row_scale"]),
            {},
            test_utils=some,
        )
    else:
        opcheck(
            function,
            (t["x"], t["weight"], t["bias"], 3),
            {"row_scale": t["row_scale"]},
            test_utils=some,
        )
    assert_same_bits(before, t)  # opcheck works on copies
    schema = str(function._schema)
    if op != "bce_step_":
        assert "!" not in schema
        return
    function(t["weight"], t["x"], *positives, t["hyper"], t["counter"], **named)
    changed = {k for k in t if not torch.equal(bits(before[k]), bits(t[k]))}
    assert changed == {k for k in t if f"!) {k}," in schema or f"!)? {k}=" in schema}


# 6. Messages
def refused(match: str, op: str = "bce_step_", **changed: Any) -> None:
    t = make((4, 6, 3), "sgd").tensors | changed
    positives = (t["pos_row"], t["pos_sample"])
    before = {k: v.clone() for k, v in t.items() if isinstance(v, Tensor)}
    with pytest.raises(InputError, match=match):
        if op == "bce_step_":
            options = {k: t[k] for k in ("row_scale", "kahan") if k in t}
            bce_step_(t["weight"], t["x"], *positives, t["hyper"], t["counter"], **options)
        elif op == "bce_loss":
            bce_loss(t["x"], t["weight"], None, *positives, row_scale=t["row_scale"])
        else:
            matmul_topk(t["x"], t["weight"], None, 2, row_scale=t["row_scale"])
    assert_same_bits(before, {k: t[k] for k in before})


@pytest.mark.parametrize("op", ["bce_step_", "bce_loss", "matmul_topk"])
def test_row_scale_is_checked(op: str) -> None:
    bad = torch.full((6, 2), 2.0**-8)
    refused(
        rf"{op}: argument row_scale: expected torch.float32 \[6, 2\] beside an 8-bit table, got "
        r"None",
        op,
        row_scale=None,
    )
    refused(
        rf"{op}: argument row_scale: expected torch.float32 \[6, 2\] on cpu",
        op,
        row_scale=bad[:, 0].clone(),
    )
    refused(rf"{op}: argument row_scale: expected torch.float32", op, row_scale=bad.double())
    for value in (0.3, 0.0, -1.0, torch.nan, torch.inf, 2.0**-101, 2.0**101):
        bad[4, 0] = value
        refused(
            rf"{op}: argument row_scale: expected powers of two .* got .* in row 4; start with "
            r"2\^-8",
            op,
            row_scale=bad,
        )
    refused(
        rf"{op}: argument row_scale: expected None for a torch.bfloat16 table, got a tensor; "
        r"leave it out",
        op,
        weight=torch.zeros(6, 3, dtype=BF16),
    )
    refused(
        rf"{op}: argument weight: .* take torch.float8_e4m3fn alone",
        op,
        weight=torch.zeros(6, 3).to(torch.float8_e5m2),
    )


def test_kahan_and_gradients_are_refused() -> None:
    refused(
        "argument kahan: expected None for an 8-bit table, got a tensor; leave it out",
        kahan=torch.zeros(6, 3, dtype=BF16),
    )
    weight = make((4, 6, 3), "sgd").tensors["weight"].clone().requires_grad_()
    refused(
        "bce_loss: argument weight: expected no gradient asked of an 8-bit table",
        "bce_loss",
        weight=weight,
    )
    refused(
        "bce_step_: argument weight: expected a tensor that requires no gradient", weight=weight
    )
