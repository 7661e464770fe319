"""The race record of the emulated card: no load or store of the CUDA kernels meets one that it is
not ordered with; and planted races are found.
"""

import pytest
import torch

from common import DTYPES
from cuda_arithmetic import call, races, recorded, run_on_host
from nvcc import need_nvcc
from sparse_common import RULES, RowStep, random_bags, random_rows

pytestmark = pytest.mark.compile
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

PLANTED = {
    "blocks_write_one_place": "two writes of global memory, blocks 0 and 1",
    "block_reads_what_another_writes": "a read and a write of global memory, blocks 0 and 1",
    "no_barrier": "a write and a read of shared memory, blocks 0 and 0",
    "no_barrier_before_the_next_turn": "a read and a write of shared memory, blocks 0 and 0",
    "barrier_of_a_warp": "a write and a read of shared memory, blocks 0 and 0",
    "barrier_of_half_a_warp": "a write and a read of shared memory, blocks 0 and 0",
    "atomic_and_plain": "of global memory, blocks 0 and 0",
}


@pytest.fixture(autouse=True)
def compiler() -> None:
    need_nvcc()


@pytest.mark.parametrize("kernel", PLANTED)
def test_a_planted_race_is_found(kernel: str) -> None:
    which = list(PLANTED).index(kernel)
    for fault in (0, 1):
        report: list[str] = []
        with recorded(report):
            call("planted_races", which, fault)
        counts, found = races(report)
        assert counts[kernel] == 1 and counts["accesses"] >= 2 * 64
        assert any(PLANTED[kernel] in line for line in found) == bool(fault), report
        assert bool(found) == bool(fault), found


def steps() -> list[RowStep]:
    """Between them every kernel, of every rule, layout and format."""
    out = []
    for rule in RULES:
        second = "second" in RULES[rule]
        for dtype in DTYPES:
            states = DTYPES if RULES[rule] else (dtype,)
            out += [random_rows(rule, (21, 60, 264), dtype, state=s, fill=2) for s in states]
            out.append(random_rows(rule, (150, 300, 16), dtype, grad=dtype))
            out.append(random_bags(rule, (9, 200, 40, 64), dtype))
        out.append(random_rows(rule, (70, 300, 37), BF16, row_wise=second, lazy=True))
        out.append(random_rows(rule, (70, 300, 72), F16, row_wise=second, kahan=True))
        out.append(random_bags(rule, (9, 200, 40, 30), BF16, row_wise=second))
        # Long runs, of 70 columns: two blocks for each.
        out += [random_bags(rule, (40, 700, 3, width), BF16) for width in (70, 72)]
    out.append(random_rows("adam", (70, 300, 72), BF16, row_step=True, lazy=True))
    broken = random_bags("adam", (9, 200, 40, 64), BF16, weights=True)
    broken.tensors["token_weight"][::7] = torch.nan  # many write that it is not finite
    return [*out, broken]


def test_no_kernel_races() -> None:
    report: list[str] = []
    with recorded(report):
        all_steps = steps()
        for step in all_steps:
            run_on_host(step)
    counts, found = races(report)
    assert not found, found
    bags = sum("token" in step.tensors for step in all_steps)
    rows = len(all_steps) - bags
    assert counts["check"] == rows + bags
    assert counts["key_kernel"] == counts["bags"] == bags
    assert counts["update"] == rows + counts["sum"] and counts["sum"] >= 8
    accesses = counts.pop("accesses")
    assert accesses > 1_000_000
    print(f"\nCUDA kernels, races: 0 in {sum(counts.values())} launches, {accesses:,} accesses")
