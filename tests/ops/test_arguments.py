"""What the ops refuse, and the message that says so."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from common import assert_same_bits, make_counter, make_hyper
from good_arguments import INT, LONG, B, D, N, call, good, ints
from xmlkernels.errors import InputError

F64, F16, BF16 = torch.float64, torch.float16, torch.bfloat16

WEIGHTS = (
    "torch.float32 or torch.bfloat16 or torch.float16 or torch.float8_e4m3fn [any, any] on cpu"
)

TABLE = [
    (
        "weight",
        {"weight": torch.zeros(N, D, dtype=F64)},
        WEIGHTS,
        "torch.float64 [6, 3] on cpu",
        "convert, reshape or move it",
    ),
    (
        "weight",
        {"weight": torch.zeros(N)},
        WEIGHTS,
        "torch.float32 [6] on cpu",
        "convert, reshape or move it",
    ),
    (
        "weight",
        {"weight": torch.zeros(D, N).T},
        "a contiguous tensor",
        "strides (1, 6) for shape [6, 3]",
        "call .contiguous() on it",
    ),
    (
        "weight",
        {"weight": torch.zeros(N, D).to(torch.float8_e5m2)},
        "a torch.float32, torch.bfloat16 or torch.float16 table",
        "torch.float8_e5m2 [6, 3] on cpu",
        "convert it: of the 8-bit formats, tables take torch.float8_e4m3fn alone",
    ),
    (
        "row_scale",
        {"weight": torch.zeros(N, D).to(torch.float8_e4m3fn)},
        "torch.float32 [6, 2] beside an 8-bit table",
        "None",
        "pass each row's scale",
    ),
    (
        "x",
        {"x": torch.zeros(B, D + 1)},
        "[any, 3] on cpu",
        "torch.float32 [4, 4] on cpu",
        "convert, reshape or move it",
    ),
    (
        "x",
        {"x": torch.zeros(B, D, dtype=F64)},
        "torch.float32 or torch.bfloat16 or torch.float16",
        "torch.float64 [4, 3] on cpu",
        "convert, reshape or move it",
    ),
    (
        "x",
        {"x": torch.zeros(D, B).T},
        "a contiguous tensor",
        "strides (1, 4) for shape [4, 3]",
        "call .contiguous()",
    ),
    ("x", {"x": torch.zeros(D)}, "[any, 3]", "torch.float32 [3] on cpu", "reshape"),
    (
        "x",
        {"x": torch.zeros(B, D, device="meta")},
        "on cpu",
        "torch.float32 [4, 3] on meta",
        "move it",
    ),
    (
        "bias",
        {"bias": torch.zeros(N, dtype=BF16)},
        "torch.float32 [6] on cpu",
        "torch.bfloat16 [6] on cpu",
        "convert",
    ),
    (
        "bias",
        {"bias": torch.zeros(N - 1)},
        "torch.float32 [6] on cpu",
        "torch.float32 [5] on cpu",
        "reshape",
    ),
    (
        "rows",
        {"rows": N + 1},
        "-1 (all) or a number from 0 to 6, the rows of weight",
        "7",
        "pass the number of real labels",
    ),
    (
        "rows",
        {"rows": -2},
        "-1 (all) or a number from 0 to 6",
        "-2",
        "pass the number of real labels",
    ),
]

POSITIVES = [
    (
        "pos_row",
        {"pos_row": ints(1, 1, 4, dtype=INT)},
        "torch.int64 [any] on cpu",
        "torch.int32 [3] on cpu",
        "convert",
    ),
    (
        "pos_row",
        {"pos_row": ints(1, 1, 4).reshape(3, 1)},
        "torch.int64 [any] on cpu",
        "torch.int64 [3, 1] on cpu",
        "reshape",
    ),
    (
        "pos_sample",
        {"pos_sample": ints(0, 3, 2)},
        "torch.int32 [3] on cpu",
        "torch.int64 [3] on cpu",
        "convert",
    ),
    (
        "pos_sample",
        {"pos_sample": ints(0, 3, dtype=INT)},
        "torch.int32 [3] on cpu",
        "torch.int32 [2] on cpu",
        "reshape",
    ),
    (
        "pos_value",
        {"pos_value": torch.ones(3, dtype=F64)},
        "torch.float32 [3] on cpu",
        "torch.float64 [3] on cpu",
        "convert",
    ),
    (
        "pos_value",
        {"pos_value": torch.ones(2)},
        "torch.float32 [3] on cpu",
        "torch.float32 [2] on cpu",
        "reshape",
    ),
    (
        "pos_sample",
        {"pos_sample": ints(0, B, 2, dtype=INT)},
        "samples from 0 to 3",
        "samples from 0 to 4",
        "number samples within the batch",
    ),
    (
        "pos_sample",
        {"pos_sample": ints(-1, 3, 2, dtype=INT)},
        "samples from 0 to 3",
        "samples from -1 to 3",
        "number samples within the batch",
    ),
    ("pos_row", {"pos_row": ints(-1, 1, 4)}, "rows from 0", "first row -1", "rows within weight"),
    (
        "pos_row",
        {"pos_row": ints(1, 4, 2)},
        "unique pairs sorted by row, then sample",
        "(2, 2) after (4, 3) at 2",
        "sort the pairs",
    ),
    (
        "pos_sample",
        {"pos_sample": ints(3, 0, 2, dtype=INT)},
        "unique pairs sorted by row, then sample",
        "(1, 0) after (1, 3) at 1",
        "sort the pairs and drop duplicates",
    ),
    (
        "pos_sample",
        {"pos_sample": ints(3, 3, 2, dtype=INT)},
        "unique pairs",
        "(1, 3) after (1, 3) at 1",
        "drop duplicates",
    ),
]

STEP = [
    (
        "hyper",
        {"hyper": make_hyper().double()},
        "torch.float32 [7] on cpu",
        "torch.float64 [7] on cpu",
        "convert",
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
        "counter",
        {"counter": ints(1)},
        "torch.int64 [2] on cpu",
        "torch.int64 [1] on cpu",
        "reshape",
    ),
    (
        "momentum",
        {"momentum": torch.zeros(N, D + 1)},
        "[6, 3] on cpu",
        "torch.float32 [6, 4] on cpu",
        "reshape",
    ),
    (
        "momentum",
        {"momentum": torch.zeros(N, D, dtype=F64)},
        "torch.float32 or torch.bfloat16 or torch.float16 [6, 3]",
        "torch.float64 [6, 3] on cpu",
        "convert",
    ),
    (
        "second",
        {"momentum": torch.zeros(N, D), "second": torch.zeros(N, 1)},
        "[6, 3] on cpu",
        "torch.float32 [6, 1] on cpu",
        "reshape",
    ),
    (
        "second",
        {"second": torch.zeros(N, D)},
        "momentum beside it",
        "momentum=None",
        "pass momentum too",
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
        {"weight": torch.zeros(N, D, dtype=BF16), "kahan": torch.zeros(N, D, dtype=F16)},
        "torch.bfloat16 [6, 3] on cpu",
        "torch.float16 [6, 3] on cpu",
        "convert",
    ),
    (
        "row_scale",
        {"row_scale": torch.ones(N)},
        "None for a torch.float32 table",
        "a tensor",
        "leave it out",
    ),
    ("row_offset", {"row_offset": -1}, "0 or more", "-1", "pass the global row of weight[0]"),
]

SKIP = [
    (
        "skip_below",
        {"skip_below": -1e-3},
        "a finite number from 0",
        "-0.001",
        "a fraction of the table's unit",
    ),
    (
        "skip_below",
        {"skip_below": math.nan},
        "a finite number from 0",
        "nan",
        "a fraction of the table's unit",
    ),
    (
        "skip_below",
        {"skip_below": math.inf},
        "a finite number from 0",
        "inf",
        "a fraction of the table's unit",
    ),
    ("skipped", {"skipped": ints(0, 0)}, "skip_below above 0 beside it", "0", "leave it out"),
    (
        "skipped",
        {"skipped": ints(0, 0).int(), "skip_below": 1.0},
        "torch.int64 [2] on cpu",
        "torch.int32 [2] on cpu",
        "convert",
    ),
]

TOPK = [
    ("k", {"k": 0}, "1 or more", "0", "ask for at least one label"),
    ("row_offset", {"row_offset": -3}, "0 or more", "-3", "pass the global row"),
    (
        "exclude",
        {"exclude": torch.zeros(B, 2, dtype=INT)},
        "torch.int64 [4, any] on cpu",
        "torch.int32 [4, 2] on cpu",
        "convert",
    ),
    (
        "exclude",
        {"exclude": torch.zeros(B + 1, 2, dtype=LONG)},
        "torch.int64 [4, any] on cpu",
        "torch.int64 [5, 2] on cpu",
        "reshape",
    ),
]

CASES = (
    [("bce_step_", *c) for c in TABLE + POSITIVES + STEP + SKIP]
    + [("bce_loss", *c) for c in TABLE + POSITIVES]
    + [("matmul_topk", *c) for c in TABLE + TOPK]
)


@pytest.mark.parametrize(
    "op, argument, changed, expected, got, mend",
    CASES,
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_message(
    op: str, argument: str, changed: dict[str, Any], expected: str, got: str, mend: str
) -> None:
    args = good() | ({"k": 2} if op == "matmul_topk" else {}) | changed
    before = {
        k: v.clone() for k, v in args.items() if isinstance(v, Tensor) and v.device.type == "cpu"
    }
    with pytest.raises(InputError) as raised:
        call(op, args)
    error = raised.value
    assert error.where.startswith(f"{op}: argument") and argument in error.where
    assert expected in error.expected
    assert error.got.startswith(got) if "samples" not in got else got in error.got
    assert mend in error.mend
    assert str(error) == f"{error.where}: expected {error.expected}, got {error.got}; {error.mend}"
    assert "\n" not in str(error)
    assert_same_bits(before, {k: args[k] for k in before})


@pytest.mark.parametrize("op", ["bce_step_", "bce_loss", "matmul_topk"])
def test_the_good_arguments_are_good(op: str) -> None:
    """So that each message above comes from the one argument that was changed."""
    call(op, good() | ({"k": 2} if op == "matmul_topk" else {}))
