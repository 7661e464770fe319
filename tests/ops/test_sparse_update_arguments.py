"""What sparse updates refuse, and the message that says so."""

from typing import Any

import pytest
import torch
from torch import Tensor

from common import assert_same_bits, make_counter
from sparse_common import F16, F32, RowStep, random_bags, random_rows
from xmlkernels import ops
from xmlkernels.errors import InputError

# 8. Every argument that does not fit is told in one sentence.
N, D = 6, 3

F64, LONG = torch.float64, torch.int64

Case = tuple[str, dict[str, Any], str, str, str]

FLOATS = "torch.float32 or torch.bfloat16 or torch.float16"

TABLE: list[Case] = [
    (
        "param",
        {"param": torch.zeros(N, D, dtype=F64)},
        f"{FLOATS} [any, any] on cpu",
        "torch.float64 [6, 3] on cpu",
        "convert",
    ),
    (
        "param",
        {"param": torch.zeros(N)},
        f"{FLOATS} [any, any] on cpu",
        "torch.float32 [6] on cpu",
        "reshape",
    ),
    (
        "param",
        {"param": torch.zeros(D, N).T},
        "a contiguous tensor",
        "strides (1, 6) for shape [6, 3]",
        "call .contiguous()",
    ),
    (
        "param",
        {"param": torch.zeros(N, 0)},
        "a table with at least one column",
        "torch.float32 [6, 0] on cpu",
        "width of 1",
    ),
    (
        "param",
        {"param": torch.zeros(N, D, requires_grad=True)},
        "a tensor that requires no gradient",
        "one that does",
        "pass .detach()",
    ),
    (
        "hyper",
        {"hyper": torch.zeros(6)},
        "torch.float32 [7] on cpu",
        "torch.float32 [6] on cpu",
        "reshape",
    ),
    (
        "counter",
        {"counter": make_counter().int()},
        "torch.int64 [2] on cpu",
        "torch.int32 [2] on cpu",
        "convert",
    ),
    (
        "momentum",
        {"momentum": torch.zeros(N, D + 1)},
        f"{FLOATS} [6, 3] on cpu",
        "torch.float32 [6, 4] on cpu",
        "reshape",
    ),
    (
        "second",
        {"second": torch.zeros(N, 1)},
        f"{FLOATS} [6, 3] on cpu",
        "torch.float32 [6, 1] on cpu",
        "reshape",
    ),
    (
        "second",
        {"second": torch.zeros(D)},
        f"{FLOATS} [6] on cpu",
        "torch.float32 [3] on cpu",
        "reshape",
    ),
    (
        "second",
        {"second": torch.zeros(N, D, 1)},
        "shape [6, 3], or [6] for one value per row",
        "torch.float32 [6, 3, 1] on cpu",
        "reshape",
    ),
    (
        "kahan",
        {"kahan": torch.zeros(N, D)},
        "a table below fp32",
        "an fp32 table",
        "leave kahan out",
    ),
    (
        "kahan",
        {"kahan": torch.zeros(N, D, dtype=F16)},
        "torch.float32 [6, 3] on cpu",
        "torch.float16 [6, 3] on cpu",
        "convert",
    ),
    (
        "row_step",
        {"row_step": torch.zeros(N)},
        "torch.int64 [6] on cpu",
        "torch.float32 [6] on cpu",
        "convert",
    ),
    ("row_decay", {"row_decay": torch.zeros(N)}, "both or neither", "row_decay alone", "pass both"),
    ("row_decay", {"decay_sum": torch.zeros(1)}, "both or neither", "decay_sum alone", "pass both"),
    (
        "row_decay",
        {"row_decay": torch.zeros(N), "decay_sum": torch.zeros(1)},
        "decoupled=True beside it",
        "decoupled=False",
        "pass decoupled=True",
    ),
    (
        "row_decay",
        {"row_decay": torch.zeros(D), "decay_sum": torch.zeros(1), "decoupled": True},
        "torch.float32 [6] on cpu",
        "torch.float32 [3] on cpu",
        "reshape",
    ),
    (
        "decay_sum",
        {"row_decay": torch.zeros(N), "decay_sum": torch.zeros(2), "decoupled": True},
        "torch.float32 [1] on cpu",
        "torch.float32 [2] on cpu",
        "reshape",
    ),
    ("row_offset", {"row_offset": -1}, "0 or more", "-1", "pass the global row of"),
]

ROWS: list[Case] = [
    (
        "rows",
        {"rows": torch.zeros(2, dtype=torch.int32)},
        "torch.int64 [any] on cpu",
        "torch.int32 [2] on cpu",
        "convert",
    ),
    (
        "rows",
        {"rows": torch.tensor([-1, 4])},
        "rows from 0 to 5, and 6 or more as fill",
        "-1 at 0",
        "number rows within",
    ),
    (
        "rows",
        {"rows": torch.tensor([4, 1])},
        "unique rows in ascending order",
        "1 after 4 at 1",
        "sort them",
    ),
    (
        "rows",
        {"rows": torch.tensor([4, 4])},
        "unique rows in ascending order",
        "4 after 4 at 1",
        "add up the gradients",
    ),
    (
        "grad",
        {"grad": torch.zeros(2, D, dtype=F64)},
        f"{FLOATS} [2, 3] on cpu",
        "torch.float64 [2, 3] on cpu",
        "convert",
    ),
    (
        "grad",
        {"grad": torch.zeros(3, D)},
        f"{FLOATS} [2, 3] on cpu",
        "torch.float32 [3, 3] on cpu",
        "reshape",
    ),
]
BAGS: list[Case] = [
    (
        "grad",
        {"grad": torch.zeros(2, D + 1)},
        f"{FLOATS} [any, 3] on cpu",
        "torch.float32 [2, 4] on cpu",
        "reshape",
    ),
    (
        "token",
        {"token": torch.zeros(5)},
        "torch.int64 [any] on cpu",
        "torch.float32 [5] on cpu",
        "convert",
    ),
    (
        "token",
        {"token": torch.tensor([0, 6, -1, 2, 2])},
        "rows from 0 to 5, or -1 as fill",
        "-1 to 6",
        "number tokens within",
    ),
    (
        "token",
        {"token": torch.tensor([0, 5, -2, 2, 2])},
        "rows from 0 to 5, or -1 as fill",
        "-2 to 5",
        "number tokens within",
    ),
    (
        "offset",
        {"offset": torch.zeros(2, dtype=LONG)},
        "torch.int64 [3] on cpu",
        "torch.int64 [2] on cpu",
        "reshape",
    ),
    (
        "offset",
        {"offset": torch.tensor([0, 3, 6])},
        "ascending numbers from 0 to at most 5",
        "0 to 6",
        "let bag b begin",
    ),
    (
        "offset",
        {"offset": torch.tensor([0, 6, 5])},
        "ascending numbers",
        "0 to 5, not ascending",
        "let bag b begin",
    ),
    (
        "offset",
        {"offset": torch.tensor([-1, 3, 5])},
        "ascending numbers",
        "-1 to 5",
        "let bag b begin",
    ),
    (
        "token_weight",
        {"token_weight": torch.zeros(4)},
        "torch.float32 [5] on cpu",
        "torch.float32 [4] on cpu",
        "reshape",
    ),
    (
        "token_weight",
        {"token_weight": torch.zeros(5).double()},
        "torch.float32 [5]",
        "torch.float64 [5]",
        "convert",
    ),
    (
        "row_step",
        {"row_step": torch.zeros(N, dtype=LONG), "drop": "second"},
        "momentum and second beside it",
        "second=None",
        "leave it out",
    ),
    (
        "row_step",
        {"row_step": torch.zeros(N, dtype=LONG), "drop": "momentum"},
        "momentum and second beside it",
        "momentum=None",
        "leave it out",
    ),
]

NOT_TAKEN = {
    "sparse_sgd_": ("second", "row_step"),
    "sparse_adagrad_": ("momentum", "row_step"),
    "sparse_adam_": (),
}

CASES = [("bag_step_", *case) for case in TABLE + BAGS]
CASES += [
    (op, *case)
    for op, without in NOT_TAKEN.items()
    for case in TABLE + ROWS
    if not set(case[1]) & set(without)
]


def good(op: str) -> RowStep:
    if op == "bag_step_":
        step = random_bags("adam", (2, 5, N, D), F32)
        return step.replace(token=torch.tensor([0, 5, -1, 2, 2]), offset=torch.tensor([0, 3, 5]))
    return random_rows({"sparse_sgd_": "momentum"}.get(op, op[7:-1]), (2, N, D), F32)


@pytest.mark.parametrize(
    "op, argument, changed, expected, got, mend",
    CASES,
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_message(
    op: str, argument: str, changed: dict[str, Any], expected: str, got: str, mend: str
) -> None:
    base = good(op)
    step = RowStep(base.rule, dict(base.tensors), dict(base.options))
    for name, value in changed.items():
        if name == "drop":
            del step.tensors[value]
        else:
            (step.tensors if isinstance(value, Tensor) else step.options)[name] = value
    before = {k: v.clone() for k, v in step.tensors.items()}
    positional, named = step.arguments()
    with pytest.raises(InputError) as raised:
        getattr(ops, op)(*positional, **named)
    error = raised.value
    name = "weight" if argument == "param" and op == "bag_step_" else argument
    assert error.where.startswith(f"{op}: argument") and name in error.where
    assert expected in error.expected and error.got.startswith(got) and mend in error.mend
    assert str(error) == f"{error.where}: expected {error.expected}, got {error.got}; {error.mend}"
    assert "\n" not in str(error)
    assert_same_bits(before, step.tensors)


@pytest.mark.parametrize("op", [*NOT_TAKEN, "bag_step_"])
def test_the_good_arguments_are_good(op: str) -> None:
    """So that each message above comes from the one argument that was changed."""
    step = good(op)
    assert not torch.equal(step.run()["param"], step.tensors["param"])
