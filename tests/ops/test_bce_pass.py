"""The second pass of `bce_step_` in CUTLASS: what it refuses; on a card, the bits of Triton's."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from common import Step, assert_same_bits, dyadic_step, make_hyper
from xmlkernels import ops

pytest.importorskip("triton")
from xmlkernels.triton import bce_pass
from xmlkernels.triton.bce_plan import make_plan
from xmlkernels.triton.bce_step import bce_step_

BF16 = torch.bfloat16


def on_card(step: Step) -> Step:
    """Skipped where the card or the library has no such pass."""
    reason = bce_pass.missing(torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"bce_pass_: {reason}")
    return step.to("cuda")


def in_chunks(*args: Any, **options: Any) -> Any:
    """A table of 3,001 rows is three chunks, the last one not full."""
    plan = make_plan(args[1].shape[0], args[0].shape[1], BF16)
    return bce_step_(*args, plan=replace(plan, chunk=1024, splits=4), **options)


def test_it_is_off_unless_it_is_chosen() -> None:
    assert not bce_pass.is_chosen()
    with bce_pass.chosen():
        assert bce_pass.is_chosen()
    assert not bce_pass.is_chosen()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(128, 3001, 768), (65, 1025, 200), (100, 40, 72)])
def test_the_bits_of_tritons_pass_on_the_card(size: tuple[int, int, int]) -> None:
    """Sums are exact in any order, so that dX has the same bits, too."""
    l2 = make_hyper(2.0**-8, 2.0**-4, scale=0.5, dx_scale=4.0)
    for options in ({}, {"hyper": l2}, {"hyper": l2, "decoupled": True, "row_offset": 2**33 + 5}):
        step = on_card(dyadic_step(*size, BF16).replace(**options))
        for op in (ops.bce_step_, in_chunks):
            expected = step.run(op)
            with bce_pass.chosen():
                got = step.run(op)
            assert_same_bits(got, expected)


@pytest.mark.gpu
def test_repeats_and_a_graph_change_nothing_on_the_card() -> None:
    step = on_card(dyadic_step(128, 3001, 768, BF16, x_bits=11))
    t = step.tensors
    with bce_pass.chosen():
        expected = step.run()
        for _ in range(5):
            assert_same_bits(step.run(), expected)
        table, graph = t["weight"].clone(), torch.cuda.CUDAGraph()
        rest = [t[k] for k in ("x", "pos_row", "pos_sample", "hyper", "counter")]
        with torch.cuda.graph(graph):
            dx, _ = ops.bce_step_(table, *rest)
    graph.replay()
    assert_same_bits({"dx": dx, "weight": table}, {k: expected[k] for k in ("dx", "weight")})


@pytest.mark.gpu
def test_a_batch_that_is_not_finite_touches_nothing_on_the_card() -> None:
    step = on_card(dyadic_step(128, 1025, 72, BF16))
    step.tensors["x"][77, 5] = torch.inf
    with bce_pass.chosen():
        got = step.run()
    assert got["dx"].isnan().all()
    assert_same_bits({"weight": got["weight"]}, {"weight": step.tensors["weight"]})


@pytest.mark.gpu
def test_what_it_does_not_serve_is_refused_on_the_card() -> None:
    fits = on_card(dyadic_step(128, 300, 64, BF16))
    bias, momentum = torch.zeros(300, device="cuda"), torch.zeros_like(fits.tensors["weight"])
    wrong = [
        (fits.replace(bias=bias), "without bias"),
        (fits.replace(momentum=momentum), "without bias, states"),
        (dyadic_step(128, 300, 64, torch.float16).to("cuda"), "of a bf16 table"),
        (dyadic_step(64, 300, 64, BF16).to("cuda"), "65 to 128 samples"),
        (dyadic_step(128, 300, 63, BF16).to("cuda"), "widths divisible by 8"),
    ]
    for step, reason in wrong:
        with bce_pass.chosen(), pytest.raises(NotImplementedError, match=reason):
            step.run()
