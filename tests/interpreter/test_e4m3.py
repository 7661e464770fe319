"""`bce_step_` and `bce_loss` on e4m3 tables with a power-of-two scale per row, in the interpreter."""

import math

import pytest
import torch
from torch import Tensor

from common import Step, assert_same_bits, dyadic_step, make_hyper
from tiny import PLAN, SHAPE, step_op
from xmlkernels.reference import bce_loss as reference_loss
from xmlkernels.reference.rounding import WEIGHT, philox
from xmlkernels.triton.bce_loss import bce_loss

E4M3 = torch.float8_e4m3fn


def problem(seed: int = 0, **options: object) -> tuple[Step, Tensor, Tensor]:
    """A step in fp32 whose sums are exact, and its table as codes and row scales."""
    b, n, d = SHAPE
    g = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-9, -5, (n, 1), generator=g).float())
    half = torch.randint(-15, 16, (n, d // 2), generator=g).float()
    code = torch.stack([half, -half], -1).flatten(1)
    row_scale = torch.cat([scale, torch.rand(n, 1, generator=g) * 0.5], 1)
    step = dyadic_step(b, n, d, torch.float32, **options).replace(weight=code * scale)
    return step, code.to(E4M3), row_scale


def words(step: Step) -> Tensor:
    """32 random bits of each weight: column c takes word c % 4 of draw c // 4."""
    n, d = step.tensors["weight"].shape
    rows = torch.arange(n)[:, None] + step.options.get("row_offset", 0)
    group = torch.arange((d + 3) // 4)[None, :]
    counter = step.tensors["counter"]
    draw = philox((counter[0], counter[1]), (rows, rows >> 32, group, torch.full_like(group, WEIGHT)))
    return torch.stack(draw, -1).flatten(1)[:, :d]


def round_up_or_down(value: Tensor, r32: Tensor) -> Tensor:
    """The neighbour of each value in e4m3 that a word chooses, as fp32: up by as many words as the value lies above."""
    size = value.abs().double()
    unit = torch.exp2(size.clamp(min=2.0**-6).log2().floor() - 3)
    rest = size / unit - (size / unit).floor()
    up = (rest * 2.0**32).floor() + r32.double() >= 2.0**32
    return (((size / unit).floor() + up) * unit).clamp(max=448).float().copysign(value)


def run(step: Step, code: Tensor, row_scale: Tensor) -> dict[str, Tensor]:
    t = {k: v.clone() for k, v in step.tensors.items()} | {"weight": code.clone(), "row_scale": row_scale.clone()}
    given = {k: t[k] for k in ("bias", "momentum", "second") if k in t}
    args = (t["weight"], t["x"], t["pos_row"], t["pos_sample"], t["hyper"], t["counter"])
    dx, loss = step_op(*args, **given, row_scale=t["row_scale"], **step.options)
    return {"dx": dx, "loss": loss, "weight": t["weight"], "row_scale": t["row_scale"]} | given


@pytest.mark.parametrize("momentum", [False, True])
def test_bits_where_sums_are_exact(momentum: bool) -> None:
    step, code, row_scale = problem(row_offset=2**32 - 40, hyper=make_hyper(2.0**-6, 2.0**-4, 0.5, scale=0.5, dx_scale=4.0))
    if momentum:
        step = step.replace(momentum=torch.full(SHAPE[1:], 2.0**-5), bias=torch.zeros(SHAPE[1]), decoupled=True)
    got, wide = run(step, code, row_scale), step.reference()
    assert_same_bits({k: got[k] for k in ("dx", "bias", "momentum") if k in got}, wide)
    torch.testing.assert_close(got["loss"], wide["loss"], rtol=2e-6, atol=0)
    rounded = round_up_or_down(wide["weight"] / row_scale[:, :1], words(step))
    assert torch.equal(got["weight"].float(), rounded)
    assert (rounded * row_scale[:, :1] != wide["weight"]).float().mean() > 0.3  # or rounding is not tested
    assert torch.equal(got["row_scale"][:, 0], row_scale[:, 0])
    largest = (rounded * row_scale[:, :1]).abs().amax(1)
    assert torch.equal(got["row_scale"][:, 1], torch.maximum(largest, row_scale[:, 1]))


def test_stores_saturate_at_the_end_of_the_range() -> None:
    step, code, row_scale = problem(hyper=make_hyper(1e6))
    got = run(step, code, row_scale)
    assert (got["weight"].float().abs() <= 448).all() and (got["weight"].float().abs() == 448).float().mean() > 0.9
    full = (got["weight"].float().abs() == 448).any(1)
    assert torch.equal(got["row_scale"][full, 1], 448 * row_scale[full, 0])


def test_a_non_finite_x_leaves_everything_as_it_was() -> None:
    step, code, row_scale = problem()
    step.tensors["x"][17, 19] = math.nan
    got = run(step, code, row_scale)
    assert_same_bits({k: got[k] for k in ("weight", "row_scale")}, {"weight": code, "row_scale": row_scale})
    assert got["dx"].isnan().all() and got["loss"].isnan().all()


def test_loss() -> None:
    step, code, row_scale = problem()
    t = step.tensors
    loss = bce_loss(t["x"], code, None, t["pos_row"], t["pos_sample"], None, row_scale, plan=PLAN)
    wide = reference_loss.bce_loss(t["x"].double(), t["weight"].double(), None, t["pos_row"], t["pos_sample"])
    torch.testing.assert_close(loss.double(), wide, rtol=2e-6, atol=0)
