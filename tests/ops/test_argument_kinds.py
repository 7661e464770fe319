"""8. What every op refuses in the same words: values that are no tensors, hyper that is not finite,
tensors that share memory, rows beyond int64; and what the kernels refuse when they are called past
the checks of `xmlkernels.ops`."""

import inspect
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common import bits, make_counter, make_hyper, needs_kernels
from common_calls import DIRECT, PUBLIC, Call, written
from xmlkernels import ops
from xmlkernels.errors import InputError

LONG = torch.int64
STEPS = [op for op in PUBLIC if "hyper" in inspect.signature(getattr(ops, op)).parameters]
OFFSETS = [op for op in PUBLIC if "row_offset" in inspect.signature(getattr(ops, op)).parameters]
NO_TENSORS = [
    (None, "None"),
    ([1.0, 2.0], "a list"),
    (np.zeros(3), "a numpy.ndarray"),
    ("x", "a str"),
    (1.5, "1.5"),
]


def good(op: str, *needed: str, dtype: torch.dtype | None = None) -> Call:
    """A good call with rows, the optional arguments `needed`, and a table of `dtype`."""
    for seed in range(3000):
        call = DIRECT[op](random.Random(seed))
        table = next(call[name] for name in ("weight", "param", "scores", "keys") if name in call)
        there = all(isinstance(call.get(name), Tensor) and call[name].numel() for name in needed)
        if there and len(table) > 3 and dtype in (None, table.dtype):
            return call
    raise AssertionError(f"no call of {op} with {needed}")


def refusals() -> dict[str, str]:
    """The sentence about each argument of each op that is None, a list, an array, a text or a
    number in a tensor's place.
    """
    out = {}
    for op in PUBLIC:
        for name, parameter in inspect.signature(getattr(ops, op)).parameters.items():
            if Tensor not in getattr(parameter.annotation, "__args__", (parameter.annotation,)):
                continue
            for value, told in NO_TENSORS:
                if (value is None and parameter.default is None) or (
                    value is None and parameter.annotation is not Tensor
                ):
                    continue
                with pytest.raises(InputError) as raised:
                    getattr(ops, op)(**good(op) | {name: value})
                out[f"{op} {name} {told}"] = str(raised.value)
    for op in DIRECT:
        function = getattr(torch.ops.xmlkernels, op)
        for name in [a.name for a in function.default._schema.arguments if str(a.type) == "Tensor"]:
            with pytest.raises((InputError, RuntimeError)) as told_by_the_kernel:
                function(**good(op) | {name: None})
            out[f"direct {op} {name}"] = str(told_by_the_kernel.value)
    return out


def test_what_is_no_tensor_is_told_by_op_and_argument() -> None:
    found = refusals()
    assert len(found) > 300
    for key, sentence in found.items():
        op, name, told = key.split(" ", 2)
        if op == "direct":
            assert (
                sentence == f"{name}: argument {told}: expected a torch.Tensor, got None; pass one"
            )
            continue
        assert sentence.startswith(f"{op}: argument {name}: expected a torch.Tensor"), sentence
        assert f", got {told}; " in sentence
    assert (
        found["sparse_adam_ momentum None"]
        == "sparse_adam_: argument momentum: expected a torch.Tensor, got None; pass one"
    )


@needs_kernels
def test_the_sentences_are_the_same_without_the_native_library() -> None:
    code = (
        "import json, test_argument_kinds as t; assert t.ops.missing; "
        "print(json.dumps(t.refusals()))"
    )
    paths = [str(Path(__file__).parent), str(Path(ops.__file__).parents[2])]
    env = os.environ | {"XMLKERNELS_NATIVE": "0", "PYTHONPATH": os.pathsep.join(paths)}
    env.pop("XMLKERNELS_REQUIRE_NATIVE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == refusals()


@pytest.mark.parametrize(
    "value, told",
    [
        ("3", "a str"),
        (None, "None"),
        (1.5, "1.5"),
        (True, "True"),
        (2**63, str(2**63)),
        (torch.tensor(3), "a tensor, torch.int64"),
        (np.zeros(2, dtype=int), "a numpy.ndarray"),
    ],
)
def test_numbers_are_held_to_their_kind(value: Any, told: str) -> None:
    with pytest.raises(InputError) as raised:
        ops.matmul_topk(**good("matmul_topk") | {"k": value})
    assert raised.value.where == "matmul_topk: argument k"
    assert raised.value.expected == "an int of 64 bits"
    assert raised.value.got.startswith(told)
    with pytest.raises(
        InputError, match="bce_step_: argument skip_below: expected a float, got a str"
    ):
        ops.bce_step_(**good("bce_step_") | {"skip_below": "none"})
    with pytest.raises(
        InputError, match="bce_step_: argument decoupled: expected a bool, got None"
    ):
        ops.bce_step_(**good("bce_step_") | {"decoupled": None})


def test_numbers_of_numpy_and_missing_arguments_are_python_s_own() -> None:
    call = good("matmul_topk") | {"k": 2, "row_offset": np.int64(7)}
    values, _ = ops.matmul_topk(**call)
    assert values.shape[1] == 2
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'k'"):
        ops.matmul_topk(call["x"], call["weight"], None)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'kk'"):
        ops.matmul_topk(**call, kk=1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("op", STEPS)
def test_a_step_without_finite_numbers_is_refused(op: str, value: float) -> None:
    for call_it, error in (
        (getattr(ops, op), InputError),
        (getattr(torch.ops.xmlkernels, op), (RuntimeError, InputError)),
    ):
        for at in range(7):
            call = good(op)
            call["hyper"] = call["hyper"].clone()
            call["hyper"][at] = value
            before = {
                k: bits(v)
                for k, v in call.items()
                if isinstance(v, Tensor) and v.element_size() > 1
            }
            with pytest.raises(
                error,
                match=f"{op}: argument hyper: expected seven finite numbers, got -?(nan|inf) at "
                f"{at}",
            ):
                call_it(**call)
            assert all(torch.equal(bits(call[k]), v) for k, v in before.items())
        with pytest.raises(
            error, match=f"{op}: argument counter: expected a step from 0 .*, got -1"
        ):
            call_it(**good(op) | {"counter": torch.tensor([3, -1])})


@pytest.mark.parametrize("op", [op for op in PUBLIC if written(op)])
def test_memory_that_is_written_is_no_other_argument_s(op: str) -> None:
    """Whole tensors of the same kind, and one that begins in the middle of another."""
    tried = 0
    call = good(op, dtype=torch.float8_e4m3fn if op == "rescale_rows_" else torch.float32)
    states = {"momentum", "second"} & written(op)
    call |= {name: torch.ones_like(call.get("weight", call.get("param"))) for name in states}
    for name in written(op):
        t = call.get(name)
        for other, value in call.items():
            same = (
                isinstance(value, Tensor)
                and isinstance(t, Tensor)
                and (value.dtype, value.shape) == (t.dtype, t.shape)
            )
            if other == name or not same or not t.numel():
                continue
            for run, error in (
                (getattr(ops, op), InputError),
                (getattr(torch.ops.xmlkernels, op), (RuntimeError, InputError)),
            ):
                with pytest.raises(
                    error,
                    match=f"{op}: arguments .* and .*: expected memory of their own, .*; clone one",
                ):
                    run(**call | {other: t})
                tried += 1
    table = "param" if "param" in call else "weight"
    size = call[table].nbytes
    both = torch.zeros(size + 256, dtype=torch.uint8)
    counter = both[max(0, size - 16) // 8 * 8 :][:16].view(LONG)
    inside = both[:size].view(call[table].dtype).view(call[table].shape)
    with pytest.raises(
        InputError, match=f"{op}: arguments {table} and counter: expected memory of their own"
    ):
        getattr(ops, op)(**call | {table: inside, "counter": counter})
    assert tried or not states
    behind = both[(size + 15) // 8 * 8 :][:16].view(LONG)
    getattr(ops, op)(**call | {table: inside, "counter": behind})  # neighbours share no byte


@pytest.mark.parametrize("op", OFFSETS)
def test_global_rows_fit_in_an_int64(op: str) -> None:
    call = good(op)
    n = len(call.get("weight", call.get("param")))
    limit = 2**63 - 1 - n
    for run, error in (
        (getattr(ops, op), InputError),
        (getattr(torch.ops.xmlkernels, op), (RuntimeError, InputError)),
    ):
        for offset in (limit + 1, 2**63 - 1, -1, -(2**63)):
            with pytest.raises(
                error, match=f"{op}: argument row_offset: expected .*, got {offset};"
            ):
                run(**call | {"row_offset": offset})
    if op == "matmul_topk":
        call |= {"k": n, "rows": -1, "exclude": None, "bias": None}
        _, rows = ops.matmul_topk(**call | {"row_offset": limit})
        assert rows.numel() and int(rows.min()) == limit and int(rows.max()) == limit + n - 1
    else:
        getattr(ops, op)(**call | {"row_offset": limit})


def test_a_step_that_cannot_be_counted_further_is_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"argument counter: expected a step from 0 to 2\^63 - 2 at 1, got 92233720368",
    ):
        ops.bce_step_(**good("bce_step_") | {"counter": torch.tensor([0, 2**63 - 1])})


def test_k_beyond_every_table_is_refused_before_memory_is_asked_for() -> None:
    for run, error in (
        (ops.matmul_topk, InputError),
        (torch.ops.xmlkernels.matmul_topk, (RuntimeError, InputError)),
    ):
        for k in (65_537, 2**40, 2**62):
            with pytest.raises(error, match=f"matmul_topk: argument k: expected .*, got {k};"):
                run(**good("matmul_topk") | {"k": k})


def sparse_call(op: str, rows: list[int]) -> tuple[Any, ...]:
    states = {"sparse_sgd_": [None], "sparse_adagrad_": [torch.ones(4, 3)]}.get(
        op, [torch.zeros(4, 3), torch.ones(4, 3)]
    )
    steer = make_hyper(0.1, beta1=0.9, beta2=0.9, eps=1e-8), make_counter()
    return (torch.zeros(4, 3), *states, torch.tensor(rows), torch.ones(len(rows), 3), *steer)


@pytest.mark.parametrize(
    "rows", [[7, 0, 2], [4, 1], [0, 0], [2, 1], [-1, 0], [-(2**63)], [0, 2**62, 3]]
)
@pytest.mark.parametrize("op", ["sparse_sgd_", "sparse_adagrad_", "sparse_adam_"])
def test_rows_out_of_order_reach_no_kernel(op: str, rows: list[int]) -> None:
    args = sparse_call(op, rows)
    with pytest.raises(
        (RuntimeError, InputError), match=f"{op}: argument rows: expected .*, got .*; "
    ):
        getattr(torch.ops.xmlkernels, op)(*args)
    assert not args[0].any()
    getattr(torch.ops.xmlkernels, op)(*sparse_call(op, [0, 2, 4, 7, 7]))  # fill stands at the end


@pytest.mark.parametrize(
    "op, changed, name",
    [
        ("bag_step_", {"token": torch.tensor([0, 99, 0])}, "token"),
        ("bag_step_", {"token": torch.tensor([0, -2, 0])}, "token"),
        ("bag_step_", {"offset": torch.tensor([0, 4])}, "offset"),
        ("bag_step_", {"offset": torch.tensor([-1, 3])}, "offset"),
        ("bag_step_", {"offset": torch.tensor([2, 1])}, "offset"),
        ("bag_step_", {"grad": torch.ones(2, 3)}, "offset"),
        ("bag_step_", {"token_weight": torch.ones(2)}, "token_weight"),
    ],
)
def test_bags_that_do_not_fit_reach_no_kernel(op: str, changed: Call, name: str) -> None:
    call = {
        "weight": torch.zeros(4, 3),
        "grad": torch.ones(1, 3),
        "token": torch.tensor([0, 3, -1]),
        "offset": torch.tensor([0, 3]),
        "hyper": make_hyper(0.1),
        "counter": make_counter(),
    }
    getattr(torch.ops.xmlkernels, op)(**call)
    with pytest.raises((RuntimeError, InputError), match=f"{op}: argument {name}: expected"):
        getattr(torch.ops.xmlkernels, op)(**call | changed)


@pytest.mark.parametrize("op", list(DIRECT))
def test_every_tensor_of_every_op_is_measured_by_the_kernel(op: str) -> None:
    """One more dimension, another dtype, or another layout of each argument, past the checks of
    `xmlkernels.ops`.
    """
    function = getattr(torch.ops.xmlkernels, op)
    for name in [k for k, v in good(op).items() if isinstance(v, Tensor)]:
        t = good(op, name)[name]
        for other in (
            t[None],
            t.double() if t.dtype != torch.float64 else t.float(),
            t.float().to(torch.complex64),
        ):
            with pytest.raises(
                (RuntimeError, InputError), match=f"{op}: argument {name}: expected .*, got .*; "
            ):
                function(**good(op, name) | {name: other})


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("entry", [-2, 5, 2**40, -(2**62)])
def test_a_shared_list_is_measured_for_an_empty_batch_too(entry: int, batch: int) -> None:
    weight, index = torch.zeros(5, 33, dtype=torch.bfloat16), torch.tensor([0, entry, 4, -1])
    x = torch.zeros(batch, 33)
    with pytest.raises(
        (RuntimeError, InputError),
        match="shortlist_matmul: argument index: expected rows from 0 to 4",
    ):
        torch.ops.xmlkernels.shortlist_matmul(x, weight, None, index)
    with pytest.raises(
        (RuntimeError, InputError),
        match="shortlist_backward: argument index: expected rows from 0 to 4",
    ):
        torch.ops.xmlkernels.shortlist_backward(torch.zeros(batch, 4), x, weight, index)


def test_the_backward_of_a_shortlist_has_checks_of_its_own() -> None:
    call = good("shortlist_backward", "dlogits", "x")
    for name, value, told in (
        ("dlogits", call["dlogits"][:, :-1].contiguous(), "torch.float32"),
        ("dlogits", call["dlogits"].double(), "torch.float32"),
        ("index", torch.full_like(call["index"], len(call["weight"])), "rows from 0"),
        ("x", call["x"][:, None], "[any, "),
    ):
        with pytest.raises(InputError) as raised:
            ops.shortlist_backward(**call | {name: value})
        assert raised.value.where == f"shortlist_backward: argument {name}"
        assert told in raised.value.expected
    for a, b in zip(
        ops.shortlist_backward(**call), torch.ops.xmlkernels.shortlist_backward(**call), strict=True
    ):
        assert torch.equal(bits(a), bits(b))
