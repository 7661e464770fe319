"""What `bce_step_` hands to the pass of csrc/cuda/sm90, and what it refuses: a stand-in in plain
torch takes the op's place.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from common import assert_same_bits, dyadic_step, make_hyper
from tiny import PLAN, step_op
from xmlkernels.reference.hyper import SCALE
from xmlkernels.reference.update import update_rows
from xmlkernels.triton import bce_pass

BF16 = torch.bfloat16
CHUNKS: list[int] = []  # first rows


def stand_in(
    weight: Tensor,
    x: Tensor,
    gradient: Tensor,
    partial: Tensor,
    hyper: Tensor,
    counter: Tensor,
    flag: Tensor,
    rows: int,
    first: int,
    row_offset: int,
    decoupled: bool,
) -> None:
    CHUNKS.append(first)
    if flag.item():
        return
    count = min(gradient.shape[0], rows - first)
    table, g = weight[first : first + count], gradient[:count, : x.shape[0]].float()
    if first == 0:
        partial.zero_()
    partial[-1] += g.T @ table.float()
    numbers = row_offset + first + torch.arange(count)
    grad = hyper[SCALE] * (g @ x.float())
    states = (None, None, None)
    for target, value in update_rows(table, grad, hyper, counter, numbers, *states, decoupled):
        target.copy_(value)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The switch on, and the stand-in for whatever is asked of it."""
    made = SimpleNamespace(bce_pass_=stand_in)
    monkeypatch.setattr(bce_pass.torch.ops, "xmlkernels", made)
    monkeypatch.setattr(bce_pass, "missing", lambda device: None)
    CHUNKS.clear()
    with bce_pass.chosen():
        yield


def test_each_chunk_is_handed_over_once(passes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bce_pass, "refusal", lambda tiles, plain: None)
    l2 = make_hyper(2.0**-8, 2.0**-4, scale=0.5, dx_scale=4.0)
    for options in ({}, {"hyper": l2}, {"hyper": l2, "decoupled": True, "row_offset": 2**33 + 5}):
        step = dyadic_step(13, 75, 24, BF16).replace(**options)
        assert_same_bits(step.run(step_op), step.reference(), but=("loss",))
    assert CHUNKS == 3 * [0, PLAN.chunk]
    step.tensors["x"][3, 3] = torch.nan
    got = step.run(step_op)
    assert got["dx"].isnan().all() and torch.equal(got["weight"], step.tensors["weight"])


def test_what_it_does_not_serve_is_refused(passes: None) -> None:
    step = dyadic_step(13, 75, 24, BF16)
    bias, momentum = torch.zeros(75), torch.zeros(75, 24, dtype=BF16)
    for other in (
        step.replace(bias=bias),
        step.replace(momentum=momentum),
        step.replace(kahan=momentum),
        dyadic_step(13, 75, 24, torch.float16),
        dyadic_step(13, 75, 24, torch.float32),
    ):
        with pytest.raises(NotImplementedError, match="without bias, states and skipped rows"):
            other.run(step_op)
    with pytest.raises(NotImplementedError, match="65 to 128 samples"):
        step.run(step_op)
    assert not CHUNKS
    shape = {"weight": torch.zeros(1), "kind": BF16, "tma": True, "b_blocks": 1, "pitch": 128}
    assert bce_pass.refusal(SimpleNamespace(**shape), True) is None  # type: ignore[arg-type]
    for changed in ({"tma": False}, {"b_blocks": 2}, {"pitch": 64}):
        assert bce_pass.refusal(SimpleNamespace(**shape | changed), True)  # type: ignore[arg-type]


def test_a_library_without_it_is_named() -> None:
    with bce_pass.chosen(), pytest.raises(NotImplementedError, match="without CUTLASS"):
        dyadic_step(13, 75, 24, BF16).run(step_op)
