"""What a call of `cluster_step_` launches on a card, counted without one, and without waiting.

The call runs on torch's meta device, where whatever would read a value raises.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.sass_launch import recorded
from xmlkernels.triton.cluster_step import cluster_step_

pytestmark = pytest.mark.compile
# They allocate, or make views; constants are the launch's own.
NO_LAUNCH = {"empty", "empty_like", "new_empty", "view", "select", "expand", "scalar_tensor"}


class Calls(TorchDispatchMode):
    """Count torch's operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def launches(clusters: int, chosen: int, rows: int) -> tuple[list[str], list[str]]:
    """Return the kernels of Triton and of torch that one step launches; Adam, with its loss."""
    with torch.device("meta"):
        weight = torch.empty(clusters * rows, 64, dtype=torch.bfloat16)
        batch = torch.empty(8, 64), torch.empty(8, chosen, dtype=torch.int64)
        row_ptr = torch.empty(clusters + 1, dtype=torch.int64)
        positives = torch.empty(40, dtype=torch.int64), torch.empty(40, dtype=torch.int32)
        numbers = torch.empty(7), torch.empty(2, dtype=torch.int64)
    states = {"momentum": torch.empty_like(weight), "second": torch.empty_like(weight)}
    calls = Calls()
    with recorded() as kernels, calls:
        cluster_step_(weight, *batch, row_ptr, rows, *positives, *numbers, **states, need_loss=True)
    names = Counter({k: n for k, n in calls.names.items() if k not in NO_LAUNCH})
    return [launch.kernel.__name__ for launch in kernels], sorted(names.elements())


def test_a_step_by_pairs() -> None:
    """Around the sort, which is several inside, there are eight kernels and three small fills."""
    kernels, others = launches(100, 4, 11)
    assert kernels == [
        "_prepare_batch",
        "_correct_biases",
        "_find_rows",
        "_score_slots",
        "_sum_spans",
        "_count_rows",
        "_list_rows",
        "_update_list",
    ]
    assert others == ["cumsum", "sort", "sum", "zeros"]


def test_a_step_by_tiles() -> None:
    kernels, others = launches(1, 1, 100)
    assert kernels == [
        "_prepare_batch",
        "_correct_biases",
        "_find_tiles",
        "_step_tiles",
        "_sum_parts",
    ]
    assert len(others) <= 10 and others.count("sort") == 1
