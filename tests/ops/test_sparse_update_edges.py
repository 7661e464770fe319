"""Sparse updates at the edges: non-finite gradients, saturation, Kahan."""

import math

import pytest
import torch

from common import DEVICES, DTYPES, LOW, assert_same_bits, make_counter, make_hyper, name_of, unit
from sparse_common import BF16, F32, ROW_STATES, RULES, random_rows


# What is not finite, and the edges of the formats.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("grad", DTYPES, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
def test_a_non_finite_gradient_leaves_everything_as_it_was(
    rule: str, grad: torch.dtype, bad: float, device: str
) -> None:
    every = {"row_step": rule == "adam", "lazy": True, "kahan": True}
    for shape, places in (((1, 1, 1), ((0, 0),)), ((130, 300, 33), ((0, 0), (129, 32), (64, 16)))):
        for place in places:
            step = random_rows(rule, shape, BF16, grad=grad, **every)
            step.tensors["grad"][place] = bad
            before = {k: v for k, v in step.tensors.items() if k in ("param", *ROW_STATES)}
            assert_same_bits(step.to(device).run(), before)


@pytest.mark.parametrize("device", DEVICES)
def test_a_non_finite_gradient_far_behind_is_found(device: str) -> None:
    """More numbers than one work item of the check reads."""
    step = random_rows("sgd", (9000, 10000, 65), F32)
    step.tensors["grad"][-1, -1] = math.nan
    assert_same_bits(step.to(device).run(), {"param": step.tensors["param"]})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
def test_stores_saturate_at_the_largest_finite_value(
    rule: str, dtype: torch.dtype, device: str
) -> None:
    """Gradients of ±2^60, states of 0: steps of 3e38 or more, from a weight that is not far from
    the format's end.
    """
    sign, largest = torch.tensor([[1.0, -1.0]]).repeat(65, 9), torch.finfo(dtype).max
    step = random_rows(rule, (65, 65, 18), dtype, hyper=make_hyper(3e38, 0.0, 0.5, 0.5, 1e-8))
    param = (-sign * 3e38).clamp(-largest, largest).to(dtype)
    step = step.replace(grad=sign * 2.0**60, param=param, counter=make_counter(step=0))
    got = (
        step.replace(**{k: torch.zeros_like(step.tensors[k]) for k in RULES[rule]}).to(device).run()
    )
    assert torch.equal(got["param"].cpu(), (-sign * largest).to(dtype))
    for name in RULES[rule]:
        assert got[name].isfinite().all() and (got[name].float().abs() > 1e4).all(), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lr", [1e-3, 1.0, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
def test_nothing_becomes_non_finite_at_the_edges(
    rule: str, dtype: torch.dtype, lr: float, device: str
) -> None:
    """|g| = |w| = 65,504 (65,280 in bf16), again and again on the states of the step before."""
    edge = 65280.0 if dtype == BF16 else 65504.0
    hyper = make_hyper(lr, 0.1, 0.9, 0.999, 1e-8)
    for row_wise in {False, "second" in RULES[rule]}:
        step = random_rows(rule, (65, 70, 33), dtype, hyper=hyper, row_wise=row_wise)
        t = step.tensors
        step = step.replace(
            param=(t["param"].sign() * edge).to(dtype), grad=t["grad"].sign() * edge
        ).to(device)
        for number in range(3):
            got = step.run()
            for name, value in got.items():
                assert value.isfinite().all(), f"{name} in step {number}"
            if got["param"].float().abs().max() > 65504:
                break  # beyond the promise; fp16 cannot come here
            step = step.replace(**got)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_kahan_follows_the_exact_path(dtype: torch.dtype, device: str) -> None:
    """Thirty updates, each far below half a unit of the weight: plain rounding to nearest would not
    move at all.
    """
    step = random_rows(
        "sgd", (65, 70, 24), dtype, hyper=make_hyper(1e-5 if dtype == BF16 else 1e-6)
    )
    weight = (step.tensors["param"].float().sign() * 0.75).to(dtype)
    got = step.replace(param=weight, kahan=torch.zeros_like(weight)).to(device)
    for _ in range(30):
        got = got.replace(**got.run())
    rows = step.tensors["rows"]
    moved = 30 * float(step.tensors["hyper"][0]) * step.tensors["grad"].double()
    whole = (got.tensors["param"].double() + got.tensors["kahan"].double()).cpu()[rows]
    # each step may lose half a unit of the rest, which lies below half a unit of the weight
    rest = float(unit(0.499 * unit(torch.tensor(0.75), dtype), dtype))
    assert 0 < moved.abs().max() < 0.5 * torch.finfo(dtype).eps
    assert (whole - (weight[rows].double() - moved)).abs().max() <= 30 * 0.5 * rest + 0.01 * float(
        moved.abs().max()
    )
