"""`bce_step_` at the edges: inputs that are not finite, the largest numbers, compensated sums of
the smallest updates.
"""

import math

import pytest
import torch

from common import (
    DEVICES,
    DTYPES,
    LOW,
    STATES,
    Step,
    assert_same_bits,
    make_counter,
    make_hyper,
    name_of,
    random_step,
    unit,
)
from xmlkernels.ops import bce_step_

F32, BF16 = torch.float32, torch.bfloat16
ADAM = make_hyper(0.01, 0.1, 0.9, 0.999, 1e-8, 0.5, 2.0)


# What is not finite, and the edges of the formats.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_non_finite_x_leaves_everything_as_it_was(
    dtype: torch.dtype, bad: float, device: str
) -> None:
    for names in ((), ("momentum",), ("momentum", "second", "bias", "kahan")):
        states = {k: F32 if k == "bias" else dtype for k in names if k != "kahan" or dtype != F32}
        for b, d, place in (
            (1, 1, (0, 0)),
            (70, 23, (0, 0)),
            (70, 23, (69, 22)),
            (70, 23, (64, 16)),
        ):
            for x_dtype in {dtype, F32}:
                step = random_step(b, 700, d, dtype, states=states, hyper=ADAM, x_dtype=x_dtype)
                step.tensors["x"][place] = bad
                step = step.to(device)
                got = step.run()
                assert_same_bits({k: got[k] for k in ("weight", *states)}, step.tensors)
                assert got["dx"].isnan().all() and got["dx"].shape == (b, d)
                assert got["loss"].isnan().all() and got["loss"].shape == (1,)


def at_the_edge(dtype: torch.dtype, states: dict[str, torch.dtype], hyper: torch.Tensor) -> Step:
    """|x| = |w| = 65,504 (65,280 in bf16), all signs, with rows whose logits reach ±65,504² D."""
    step = random_step(66, 1030, 40, dtype, states=states, hyper=hyper)
    edge = 65280.0 if dtype == BF16 else 65504.0
    for name in ("weight", "x"):
        step.tensors[name] = (step.tensors[name].float().sign() * edge).to(step.tensors[name].dtype)
    step.tensors["weight"][:2], step.tensors["x"][:2] = edge, edge
    step.tensors["weight"][2] = -edge
    return step


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lr", [1e-3, 1.0, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("variant", ["plain", "momentum", "adam", "kahan"])
def test_nothing_becomes_non_finite_at_the_edges(
    variant: str, dtype: torch.dtype, lr: float, device: str
) -> None:
    if variant == "kahan" and dtype == F32:
        pytest.skip("fp32 tables take no compensation")
    states = {
        "plain": {"bias": F32},
        "momentum": {"momentum": dtype},
        "adam": {"momentum": dtype, "second": dtype},
    }
    hyper = make_hyper(lr, 0.1, 0.9, 0.999, 1e-8, 1.0, 1024.0)
    step = at_the_edge(dtype, states.get(variant, {"kahan": dtype}), hyper).to(device)
    for number in range(3):  # the states come from the step before
        got = step.run()
        for name, value in got.items():
            assert value.isfinite().all(), f"{name} in step {number}"
        if got["weight"].float().abs().max() > 65504:
            break  # beyond the promise; fp16 cannot come here
        step = step.replace(**{k: v for k, v in got.items() if k in step.tensors})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_stores_saturate_at_the_largest_finite_value(dtype: torch.dtype, device: str) -> None:
    """sigma = 1/2, no target: the gradient is x / 2 > 0 and < 0, and lr takes every weight far
    beyond the format.
    """
    x = torch.tensor([[2.0, -2.0]]).repeat(1, 9)
    lr = torch.tensor([3e38, 0, 0, 0, 0, 64.0, 1.0])
    step = Step(
        {
            "weight": torch.zeros(700, 18).to(dtype),
            "x": x.to(dtype),
            "pos_row": torch.empty(0, dtype=torch.int64),
            "pos_sample": torch.empty(0, dtype=torch.int32),
            "hyper": lr,
            "counter": make_counter(),
        }
    ).to(device)
    weight = step.run()["weight"].float().cpu()
    largest = torch.finfo(dtype).max
    assert (weight[:, 0::2] == -largest).all() and (weight[:, 1::2] == largest).all()


@pytest.mark.parametrize("device", DEVICES)
def test_saturated_logits_have_exact_limits(device: str) -> None:
    """z = ±1000: sigma is 1 or 0, the loss is max(z, 0) - y z."""
    weight, x = torch.tensor([[1000.0], [-1000.0]], device=device), torch.ones(2, 1, device=device)
    row = torch.tensor([0, 1], device=device)
    sample = torch.tensor([0, 0], dtype=torch.int32, device=device)
    dx, loss = bce_step_(
        weight,
        x,
        row,
        sample,
        make_hyper(0.0).to(device),
        make_counter().to(device),
        need_loss=True,
    )
    assert loss.item() == 2000.0 and dx.tolist() == [[1000.0], [1000.0]]


# Compensated summation.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_kahan_follows_the_exact_path(dtype: torch.dtype, device: str) -> None:
    """Thirty updates, each far below half a unit of the weight: plain rounding to nearest would not
    move at all.
    """
    n, d = 300, 24
    step = random_step(8, n, d, dtype, hyper=make_hyper(1e-5 if dtype == BF16 else 1e-6, 1e-3)).to(
        device
    )
    weight = (step.tensors["weight"].float().sign() * 0.75 + 0.0).to(dtype)
    step = step.replace(weight=weight, kahan=torch.zeros_like(weight))
    got, exact = step, step
    wide = {
        k: v.double() if v.is_floating_point() and k != "hyper" else v
        for k, v in step.tensors.items()
    }
    exact = Step(wide, step.options)
    for _ in range(30):
        got = got.replace(**{k: v for k, v in got.run().items() if k in STATES or k == "weight"})
        exact = exact.replace(
            **{k: v for k, v in exact.exact().items() if k in STATES or k == "weight"}
        )
    sums = [s.tensors["weight"].double() + s.tensors["kahan"].double() for s in (got, exact)]
    moved = (sums[1] - weight.double()).abs()
    assert 0 < moved.max() < 0.5 * torch.finfo(dtype).eps
    # each of the 30 steps may lose half a unit of the rest, which lies below half a unit of the
    # weight
    rest = 0.499 * unit(torch.tensor(0.75), dtype)
    allowed = 30 * 0.5 * float(unit(rest, dtype)) + 0.01 * float(moved.max())
    assert (sums[0] - sums[1]).abs().max() <= allowed
    assert got.tensors["kahan"].abs().max() > 0


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_kahan_forgets_what_saturation_cut_off(dtype: torch.dtype, sign: float) -> None:
    """A weight at the format's end that is pushed outward stays there, with nothing left over to
    come back later.
    """
    weight = torch.full((1, 8), sign * torch.finfo(dtype).max, dtype=dtype)
    before, rest = weight.clone(), torch.zeros_like(weight)
    none = torch.zeros(0, dtype=torch.int64)
    # A decay of -1 at a rate of 1 doubles the weight.
    bce_step_(
        weight,
        torch.zeros(1, 8),
        none,
        none.int(),
        make_hyper(1.0, -1.0),
        make_counter(),
        kahan=rest,
    )
    assert torch.equal(weight, before)
    assert float(rest.abs().max()) == 0
