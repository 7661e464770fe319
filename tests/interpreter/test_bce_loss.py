"""The Triton `bce_loss` and its backward in the interpreter, against float64."""

import math
from typing import Any

import pytest
import torch

from common import DTYPES, Step, assert_no_worse, make_hyper, name_of, random_step, torch_step
from tiny import PLAN, SHAPE
from xmlkernels.reference import bce_loss as reference
from xmlkernels.triton.bce_loss import bce_loss, bce_loss_backward


def arguments(step: Step, *, wide: bool = False) -> tuple[Any, ...]:
    t = {k: v.double() if wide and v.is_floating_point() else v for k, v in step.tensors.items()}
    return t["x"], t["weight"], t.get("bias"), t["pos_row"], t["pos_sample"], t.get("pos_value")


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_no_worse_than_torch(dtype: torch.dtype, values: bool) -> None:
    step = random_step(
        *SHAPE,
        dtype,
        states={"bias": torch.float32},
        share=0.05,
        values=values,
        hyper=make_hyper(1.0),
    )
    low, args, wide = torch_step(step), arguments(step), arguments(step, wide=True)
    loss = bce_loss(*args, plan=PLAN)
    assert_no_worse(loss, low["loss"], reference.bce_loss(*wide), dtype, what="loss")
    got = bce_loss_backward(*args, need_dweight=True, need_dbias=True, plan=PLAN)
    exact = reference.bce_loss_backward(*wide, need_dweight=True, need_dbias=True)
    # With lr = 1 the step of torch is the gradient; its own rounding of the table is taken out in
    # fp32.
    fp32 = torch_step(step.replace(weight=step.tensors["weight"].float()))
    lows = (
        low["dx"],
        (step.tensors["weight"].float() - fp32["weight"]).to(dtype),
        step.tensors["bias"] - low["bias"],
    )
    for name, mine, theirs, right in zip(("dx", "dweight", "dbias"), got, lows, exact, strict=True):
        assert mine.dtype == torch.float32
        assert_no_worse(mine, theirs, right, dtype, what=name)


def test_only_what_is_asked_and_padding_without_gradient() -> None:
    step = random_step(*SHAPE, torch.bfloat16, states={"bias": torch.float32})
    step.tensors["weight"][50:] = math.nan
    args = arguments(step)
    dx, dweight, dbias = bce_loss_backward(*args, rows=50, need_dweight=True, plan=PLAN)
    assert dweight.shape == step.tensors["weight"].shape and dbias.shape == (0,)
    assert (dweight[50:] == 0).all() and (dweight[:50] != 0).any() and dx.isfinite().all()
    dx2, none, dbias = bce_loss_backward(*args, rows=50, need_dbias=True, plan=PLAN)
    assert none.shape == (0,)
    assert dbias.shape == (SHAPE[1],)
    assert (dbias[50:] == 0).all()
    assert torch.equal(dx, dx2)
    assert bce_loss(*args, rows=50, plan=PLAN).isfinite().all()


@pytest.mark.parametrize("shape", [(0, 40, 16), (3, 0, 16)], ids=name_of)
def test_empty(shape: tuple[int, int, int]) -> None:
    args = arguments(random_step(*shape, torch.float32))
    assert bce_loss(*args, plan=PLAN).tolist() == [0.0]
    dx, dweight, _ = bce_loss_backward(*args, need_dweight=True, plan=PLAN)
    assert (dx == 0).all()
    assert dx.shape == (shape[0], 16)
    assert (dweight == 0).all()
    assert dweight.shape == shape[1:]


def test_a_non_finite_x_makes_all_nan() -> None:
    step = random_step(*SHAPE, torch.float16, x_dtype=torch.float32)
    step.tensors["x"][3, 7] = math.inf
    assert bce_loss(*arguments(step), plan=PLAN).isnan().all()
    for result in bce_loss_backward(
        *arguments(step), need_dweight=True, need_dbias=True, plan=PLAN
    ):
        assert result.isnan().all()
