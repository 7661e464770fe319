"""8. Every argument of `cluster_step_` that does not fit is told in one sentence; nothing is
changed.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from common import assert_same_bits
from test_arguments import POSITIVES, STEP, TABLE, B, D, N, good, ints
from xmlkernels.errors import InputError
from xmlkernels.ops import cluster_step_, missing

INT = torch.int32


def clusters(*values: list[int]) -> Tensor:
    return torch.tensor(values)


def good_step() -> dict[str, Any]:
    chosen = clusters([0, -1], [2, 0], [-1, -1], [1, 2])
    return good() | {"clusters": chosen, "row_ptr": ints(0, 2, 3, 6), "cluster_rows": 3}


CLUSTERS = [
    (
        "clusters",
        {"clusters": clusters([0], [2], [1], [1]).to(INT)},
        "torch.int64 [4, any] on cpu",
        "torch.int32 [4, 1] on cpu",
        "convert, reshape or move it",
    ),
    (
        "clusters",
        {"clusters": clusters([0], [1])},
        "torch.int64 [4, any] on cpu",
        "torch.int64 [2, 1] on cpu",
        "reshape",
    ),
    (
        "clusters",
        {"clusters": clusters([0, 1, 2, -1], [0, 1, 2, -1]).T},
        "a contiguous tensor",
        "strides (1, 4)",
        "call .contiguous() on it",
    ),
    (
        "clusters",
        {"clusters": clusters([0], [3], [1], [1])},
        "clusters from 0 to 2, or -1 for none",
        "values from 0 to 3",
        "number clusters as row_ptr does",
    ),
    (
        "clusters",
        {"clusters": clusters([0], [-2], [1], [1])},
        "clusters from 0 to 2, or -1 for none",
        "values from -2 to 1",
        "number clusters as row_ptr does",
    ),
    (
        "clusters",
        {"clusters": clusters([0, 1, 2], [-1, 1, -1], [2, 0, 2], [0, 1, 0])},
        "each cluster at most once in a sample",
        "cluster 2 twice in sample 2",
        "drop duplicates in the shortlist",
    ),
    (
        "row_ptr",
        {"row_ptr": ints(0, 2, 3, 6, dtype=INT)},
        "torch.int64 [any] on cpu",
        "torch.int32 [4] on cpu",
        "convert",
    ),
    (
        "row_ptr",
        {"row_ptr": ints(0, 2, 3, 6)[:0]},
        "int64 [C + 1], at least one entry",
        "torch.int64 [0] on cpu",
        "give the first row of each cluster, and the end of the last",
    ),
    (
        "row_ptr",
        {"row_ptr": ints(0, 3, 2, 6)},
        "ascending rows from 0 to 6, the rows of weight",
        "first 0, last 6, smallest step -1",
        "number clusters in the order of their rows",
    ),
    (
        "row_ptr",
        {"row_ptr": ints(0, 2, 3, 7)},
        "ascending rows from 0 to 6",
        "first 0, last 7, smallest step 1",
        "number",
    ),
    (
        "row_ptr",
        {"row_ptr": ints(-1, 2, 3, 6)},
        "ascending rows from 0 to 6",
        "first -1, last 6, smallest step 1",
        "number",
    ),
    (
        "cluster_rows",
        {"cluster_rows": 2},
        "3 or more, the size of the largest cluster",
        "2",
        "raise it",
    ),
    (
        "cluster_rows",
        {"cluster_rows": -1},
        "0 or more",
        "-1",
        "pass the size of the largest cluster",
    ),
]
CASES = TABLE + CLUSTERS + POSITIVES + STEP


@pytest.mark.parametrize(
    "argument, changed, expected, got, mend", CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_message(
    argument: str, changed: dict[str, Any], expected: str, got: str, mend: str
) -> None:
    args = good_step() | changed
    before = {
        k: v.clone() for k, v in args.items() if isinstance(v, Tensor) and v.device.type == "cpu"
    }
    with pytest.raises(InputError) as raised:
        cluster_step_(**args)
    error = raised.value
    assert error.where.startswith("cluster_step_: argument") and argument in error.where
    assert expected in error.expected
    assert error.got.startswith(got) if "samples" not in got else got in error.got
    assert mend in error.mend
    assert str(error) == f"{error.where}: expected {error.expected}, got {error.got}; {error.mend}"
    assert "\n" not in str(error)
    assert_same_bits(before, {k: args[k] for k in before})


def test_the_good_arguments_are_good() -> None:
    """So that each message above comes from the one argument that was changed; a row-wise second
    moment is good too.
    """
    states = {"momentum": torch.zeros(N, D), "second": torch.zeros(N)}
    dx, scores, loss = cluster_step_(**good_step(), **states)
    assert (dx.shape, scores.shape, loss.shape) == ((B, D), (B, 2, 3), (0,))


def test_a_row_wise_second_moment_of_another_length_is_refused() -> None:
    states = {"momentum": torch.zeros(N, D), "second": torch.zeros(N + 1)}
    with pytest.raises(
        InputError, match=r"argument second: expected torch.float32 .* \[6\] on cpu, got .* \[7\]"
    ):
        cluster_step_(**good_step(), **states)


def test_a_table_in_autograd_is_refused_and_dx_stays_out_of_it() -> None:
    arguments = good_step()
    arguments["x"].requires_grad_()
    dx, scores, _ = cluster_step_(**arguments)
    assert not dx.requires_grad and not scores.requires_grad
    arguments["weight"].requires_grad_()
    with pytest.raises(
        InputError, match="argument weight: expected a tensor that requires no gradient"
    ):
        cluster_step_(**arguments)


@pytest.mark.skipif(missing is not None, reason="checks of the native library")
@pytest.mark.parametrize(
    "changed",
    [
        {"clusters": clusters([0], [3], [1], [1])},
        {"clusters": clusters([0], [-2], [1], [1])},
        {"clusters": clusters([0])},
        {"row_ptr": ints(0, 3, 2, 6)},
        {"row_ptr": ints(0, 2, 3, 7)},
        {"row_ptr": ints(-1, 2, 3, 6)},
        {"cluster_rows": 2},
        {"second": torch.zeros(N, D)},
        {"momentum": torch.zeros(N), "second": torch.zeros(N)},
    ],
)
def test_the_kernel_itself_refuses_what_would_corrupt_memory(changed: dict[str, Any]) -> None:
    """Called through torch.ops, without the checks of the public function."""
    with pytest.raises(RuntimeError, match="argument"):
        torch.ops.xmlkernels.cluster_step_(**(good_step() | changed))
