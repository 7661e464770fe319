"""Every op in a CUDA graph: two replays leave the bits of two eager calls, so that a whole training
step can be captured.

A capture refuses what waits for the device; a replay shows what a kernel reads on the host, and
what it left in memory that the graph gives to another launch.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from common import bits, fp8_step, make_hyper, random_step, to_fp8
from common_calls import DIRECT, written
from common_cluster import random_cluster_step
from shortlists import make, make_choice
from skips import clear_step
from sparse_common import random_bags, random_rows
from xmlkernels import ops

Call = dict[str, Any]
F32, BF16 = torch.float32, torch.bfloat16
ADAM = make_hyper(0.01, 0.1, 0.9, 0.999, 1e-8)
STATES = {"momentum": BF16, "second": BF16, "bias": F32}
SIZE = (33, 2051, 72)  # two tiles in every dimension, and L odd, as the benchmarks' are


def step(fp8: bool = False, **options: Any) -> Call:
    made = random_step(*SIZE, BF16, **options)
    made = fp8_step(made) if fp8 else made
    return made.tensors | made.options


def skipping() -> Call:
    made, _ = clear_step(*SIZE, BF16)
    return made.tensors | made.options


def clusters(sizes: list[int], fp8: bool = False, **options: Any) -> Call:
    made = random_cluster_step(33, sizes, 7, 72, BF16, **options)
    made = fp8_step(made) if fp8 else made  # type: ignore[assignment]
    return made.tensors | made.options


def part(call: Call, *names: str, **more: Any) -> Call:
    return {name: call[name] for name in names if name in call} | more


def loss(fp8: bool = False) -> Call:
    call = step(fp8, states={"bias": F32})
    return part(call, "x", "weight", "bias", "pos_row", "pos_sample", "row_scale")


def topk(fp8: bool = False) -> Call:
    call = part(step(fp8), "x", "weight", "row_scale", bias=None, k=10)
    return call | {"exclude": torch.arange(33)[:, None] * 3}


def lists(*names: str, shared: bool = False, **more: Any) -> Call:
    call = make(33, 130, 700, 72, BF16, shared=shared)
    return part(call, "x", "weight", "index", *names, **more)


def rows(rule: str, **options: Any) -> Call:
    made = random_rows(rule, (130, 700, 72), BF16, state=BF16, fill=2, **options)
    return ({"momentum": None} if rule == "sgd" else {}) | made.tensors | made.options


def bags() -> Call:
    made = random_bags("adam", (33, 900, 700, 72), BF16, state=BF16)
    return {"weight" if k == "param" else k: v for k, v in made.tensors.items()} | made.options


def merging() -> Call:
    call = make_choice((33, 8, 40, 30, 45), positives=3)
    given = {name: call[name] for name in ("clusters", "row_ptr", "k", "width")}
    return given | {"keys": ops.shortlist_select(**call), "most": 8}


def rescale() -> Call:
    weight, row_scale = to_fp8(torch.randn(700, 72))
    row_scale[:, 1] *= 40  # so that every row asks for another scale
    return {"weight": weight, "row_scale": row_scale, "counter": torch.tensor([3, 4])}


# By op and variant. A gradient of the table in rows is left out: the number of rows is read on the
# host, so no step that asks for one is captured.
PROBLEMS: dict[tuple[str, str], Callable[[], Call]] = {
    ("bce_step_", "sgd"): step,
    ("bce_step_", "adam"): lambda: step(states=STATES, hyper=ADAM),
    ("bce_step_", "e4m3"): lambda: step(True),
    ("bce_step_", "skip"): skipping,
    ("bce_loss", "bf16"): loss,
    ("bce_loss", "e4m3"): lambda: loss(True),
    ("bce_loss_backward", "dx"): lambda: loss() | {"need_dweight": False, "need_dbias": False},
    ("bce_loss_backward", "all"): lambda: loss() | {"need_dweight": True, "need_dbias": True},
    ("cluster_step_", "small"): lambda: clusters([10, 11] * 40, states=STATES, hyper=ADAM),
    ("cluster_step_", "large"): lambda: clusters([120, 5, 300, 0, 33] * 2),
    ("cluster_step_", "e4m3"): lambda: clusters([10, 11] * 40, True),
    ("matmul_topk", "bf16"): topk,
    ("matmul_topk", "e4m3"): lambda: topk(True),
    ("shortlist_matmul", "own"): lambda: lists("bias"),
    ("shortlist_matmul", "shared"): lambda: lists("bias", shared=True),
    ("shortlist_backward", "dx"): lambda: lists(
        "dlogits", need_dx=True, need_dweight=False, need_dbias=False
    ),
    ("shortlist_select", "fp32"): lambda: make_choice((33, 8, 40, 30, 45), positives=3),
    ("shortlist_merge", "fp32"): merging,
    ("rescale_rows_", "e4m3"): rescale,
    ("sparse_sgd_", "sgd"): lambda: rows("sgd"),
    ("sparse_adagrad_", "adagrad"): lambda: rows("adagrad"),
    ("sparse_adam_", "adam"): lambda: rows("adam"),
    ("bag_step_", "adam"): bags,
}
IDS = [" ".join(key) for key in PROBLEMS]


def held(call: Call, device: str) -> Call:
    """A copy of a call's tensors on a device."""
    return {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in call.items()}


def one(op: str, call: Call) -> Callable[[], dict[str, Tensor]]:
    """One call, then the counter's next step, as training has it.

    The function that comes back reads the bits that this call, or its last replay, has left.
    """
    function = getattr(ops, op, None) or getattr(torch.ops.xmlkernels, op)
    out = function(**call)
    if "counter" in call:
        call["counter"][1] += 1
    results = (out,) if isinstance(out, Tensor) else tuple(out or ())
    left = {str(i): t for i, t in enumerate(results)} | {
        name: call[name] for name in written(op) if isinstance(call.get(name), Tensor)
    }

    return lambda: {name: bits(t).clone() for name, t in left.items()}


def test_every_op_is_captured() -> None:
    """An op that is new here has no graph test yet: add its problem."""
    captured = {op for op, _ in PROBLEMS}
    public = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert captured == public | set(DIRECT)


@pytest.mark.parametrize("key", PROBLEMS, ids=IDS)
def test_a_second_call_differs_and_a_repeat_does_not(key: tuple[str, str]) -> None:
    """What the graph test compares can tell a replay that did nothing from one that did."""
    op, call = key[0], PROBLEMS[key]()
    runs = []
    for _ in range(2):
        mine = held(call, "cpu")
        runs.append([one(op, mine)() for _ in range(2)])
    first, second = runs[0]
    for a, b in zip(*runs, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    updates = bool(written(op))
    assert any(not torch.equal(first[name], second[name]) for name in first) == updates


@pytest.mark.gpu
@pytest.mark.parametrize("key", PROBLEMS, ids=IDS)
def test_two_replays_are_two_eager_calls(key: tuple[str, str]) -> None:
    op, call = key[0], PROBLEMS[key]()
    mine, warm, captured = (held(call, "cuda") for _ in range(3))
    eager = [one(op, mine)() for _ in range(2)]
    one(op, warm)  # what is set up lazily is, before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        left = one(op, captured)
    for expected in eager:
        graph.replay()
        torch.cuda.synchronize()
        found = left()
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), name
