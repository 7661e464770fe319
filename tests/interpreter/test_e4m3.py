"""`bce_step_` and `bce_loss` on e4m3 tables with a power-of-two scale per row, in the
interpreter.
"""

import math

import pytest
import torch
from torch import Tensor

from common import Step, assert_same_bits, dyadic_step, make_hyper
from tiny import PLAN, SHAPE, step_op
from xmlkernels.reference import bce_loss as reference_loss
from xmlkernels.reference.rounding import WEIGHT, encode
from xmlkernels.triton import common
from xmlkernels.triton.bce_loss import bce_loss, bce_loss_backward
from xmlkernels.triton.cluster_step import cluster_step_
from xmlkernels.triton.matmul_topk import matmul_topk

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


def run(step: Step, code: Tensor, row_scale: Tensor) -> dict[str, Tensor]:
    t = {k: v.clone() for k, v in step.tensors.items()} | {
        "weight": code.clone(),
        "row_scale": row_scale.clone(),
    }
    given = {k: t[k] for k in ("bias", "momentum", "second") if k in t}
    args = (t["weight"], t["x"], t["pos_row"], t["pos_sample"], t["hyper"], t["counter"])
    dx, loss = step_op(*args, **given, row_scale=t["row_scale"], **step.options)
    return {"dx": dx, "loss": loss, "weight": t["weight"], "row_scale": t["row_scale"]} | given


@pytest.mark.parametrize("momentum", [False, True])
def test_bits_where_sums_are_exact(momentum: bool) -> None:
    step, code, row_scale = problem(
        row_offset=2**32 - 40, hyper=make_hyper(2.0**-6, 2.0**-4, 0.5, scale=0.5, dx_scale=4.0)
    )
    if momentum:
        step = step.replace(
            momentum=torch.full(SHAPE[1:], 2.0**-5), bias=torch.zeros(SHAPE[1]), decoupled=True
        )
    got, wide = run(step, code, row_scale), step.reference()
    assert_same_bits({k: got[k] for k in ("dx", "bias", "momentum") if k in got}, wide)
    torch.testing.assert_close(got["loss"], wide["loss"], rtol=2e-6, atol=0)
    rows = torch.arange(SHAPE[1]) + 2**32 - 40
    rounded, largest = encode(wide["weight"], row_scale, step.tensors["counter"], rows, WEIGHT)
    assert (
        rounded.float() * row_scale[:, :1] != wide["weight"]
    ).float().mean() > 0.3  # or rounding is not tested
    scales = torch.stack([row_scale[:, 0], largest.maximum(row_scale[:, 1])], 1)
    assert_same_bits(
        {k: got[k] for k in ("weight", "row_scale")}, {"weight": rounded, "row_scale": scales}
    )


def test_stores_saturate_at_the_end_of_the_range() -> None:
    step, code, row_scale = problem(hyper=make_hyper(1e6))
    got = run(step, code, row_scale)
    assert (got["weight"].float().abs() <= 448).all()
    assert (got["weight"].float().abs() == 448).float().mean() > 0.9
    full = (got["weight"].float().abs() == 448).any(1)
    assert torch.equal(got["row_scale"][full, 1], 448 * row_scale[full, 0])


def test_a_non_finite_x_leaves_everything_as_it_was() -> None:
    step, code, row_scale = problem()
    step.tensors["x"][17, 19] = math.nan
    got = run(step, code, row_scale)
    assert_same_bits(
        {k: got[k] for k in ("weight", "row_scale")}, {"weight": code, "row_scale": row_scale}
    )
    assert got["dx"].isnan().all() and got["loss"].isnan().all()


def test_loss() -> None:
    step, code, row_scale = problem()
    t = step.tensors
    loss = bce_loss(t["x"], code, None, t["pos_row"], t["pos_sample"], None, row_scale, plan=PLAN)
    wide = reference_loss.bce_loss(
        t["x"].double(), t["weight"].double(), None, t["pos_row"], t["pos_sample"]
    )
    torch.testing.assert_close(loss.double(), wide, rtol=2e-6, atol=0)


def test_cards_without_e4m3_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    step, code, row_scale = problem()
    t, before = step.tensors, code.clone().view(torch.uint8)
    positives = (t["pos_row"], t["pos_sample"], t["hyper"], t["counter"])
    clusters, row_ptr = torch.zeros(SHAPE[0], 1, dtype=torch.int64), torch.tensor([0, SHAPE[1]])
    monkeypatch.setattr(common, "emulated", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    for call in (
        lambda: step_op(code, t["x"], *positives, row_scale=row_scale),
        lambda: matmul_topk(t["x"], code, None, 3, row_scale=row_scale),
        lambda: cluster_step_(
            code, t["x"], clusters, row_ptr, SHAPE[1], *positives, row_scale=row_scale
        ),
    ):
        with pytest.raises(
            NotImplementedError,
            match="e4m3 tables from sm_89 on only; use a bf16 table on this card",
        ):
            call()
    assert torch.equal(code.view(torch.uint8), before)


@pytest.mark.parametrize("finite", [True, False])
def test_backward(finite: bool) -> None:
    """Padding rows, targets between 0 and 1, a bias; every sum is exact."""
    step, code, row_scale = problem()
    t, n = step.tensors, SHAPE[1]
    if not finite:
        t["x"][17, 19] = math.inf
    bias = torch.zeros(n)
    value = torch.arange(len(t["pos_row"])).remainder(5) / 4
    given = (t["x"], code, bias, t["pos_row"], t["pos_sample"], value, row_scale)
    got = bce_loss_backward(*given, rows=n - 3, need_dweight=True, need_dbias=True, plan=PLAN)
    want = reference_loss.bce_loss_backward(*given, rows=n - 3, need_dweight=True, need_dbias=True)
    for name, mine, theirs in zip(("dx", "dweight", "dbias"), got, want, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == theirs.shape
        if finite:
            assert theirs.any() and torch.equal(mine, theirs), name
        else:
            assert mine[: n - 3].isnan().all(), name
        if name != "dx":
            assert not mine[n - 3 :].any()
