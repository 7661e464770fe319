"""What the sparse updates and `bag_step_` promise torch and the machine: schemas, memory,
addresses, instruction sets.
"""

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common import (
    DEVICES,
    DTYPES,
    assert_same_bits,
    huge_table,
    make_counter,
    make_hyper,
    name_of,
    needs_kernels,
    opcheck,
)
from sparse_common import RULES, RowStep, dyadic_rows, random_bags, random_rows
from test_instruction_sets import digest, instruction_sets, run_child
from xmlkernels import ops

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("sparse_sgd_", "sparse_adagrad_", "sparse_adam_", "bag_step_")


def cases() -> list[RowStep]:
    """Calls that between them use every argument."""
    out = []
    for rule in RULES:
        out.append(random_rows(rule, (5, 40, 9), F32, fill=2))
        every = {"kahan": True, "row_step": rule == "adam", "lazy": True, "row_offset": 2**33}
        out.append(random_rows(rule, (5, 40, 9), BF16, row_wise=True, grad=F16, **every))
        out.append(random_bags(rule, (5, 30, 40, 9), F32, weights=False))
        out.append(random_bags(rule, (5, 30, 40, 9), BF16, row_wise=True, grad=F16, **every))
    return out


# 5. opcheck
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "step", cases(), ids=lambda s: f"{s.op} {s.rule} {name_of(s.tensors['param'].dtype)}"
)
def test_opcheck(step: RowStep, device: str) -> None:
    positional, named = step.to(device).arguments()
    opcheck(getattr(torch.ops.xmlkernels, step.op).default, positional, named)


@needs_kernels
@pytest.mark.parametrize("op", NAMES)
def test_the_native_library_serves_the_op(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"xmlkernels::{op}", "CPU")


def test_nothing_is_read_on_another_device() -> None:
    """On meta tensors no value can be read: the checks must not try."""
    for step in (random_rows("adam", (5, 40, 9), BF16), random_bags("adam", (5, 30, 40, 9), BF16)):
        step.tensors["param"] = torch.empty(2**28, 768, dtype=BF16, device="meta")
        step.tensors |= {
            k: torch.empty(2**28, 768, dtype=BF16, device="meta") for k in ("momentum", "second")
        }
        step.tensors["grad"] = torch.empty(5, 768)
        positional, named = step.to("meta").arguments()
        assert getattr(ops, step.op)(*positional, **named) is None


# 4. Addresses beyond 2^31
ROWS, WIDTH, EDGE = 2**21 + 4096, 1024, 1 << 22
KEPT = EDGE // (2 * WIDTH)  # rows at each end that own their memory


@pytest.fixture
def huge() -> Iterator[list[torch.Tensor]]:
    """Three bf16 tables of 2^31 + 2^22 numbers, random in their first and last rows."""
    if not sys.platform.startswith("linux"):
        pytest.skip("maps one piece of memory many times, as Linux can")
    tables = [huge_table(ROWS, WIDTH, EDGE) for _ in range(3)]
    g = torch.Generator().manual_seed(0)
    for table in tables:
        for part in (table[:KEPT], table[-KEPT:]):
            part.copy_(torch.rand(part.shape, generator=g))
    yield tables
    tables.clear()
    gc.collect()


@needs_kernels
@pytest.mark.parametrize("op", ["sparse_adam_", "bag_step_"])
def test_beyond_2_31_numbers(op: str, huge: list[torch.Tensor]) -> None:
    """Rows at both ends come out as those of a small table that stands at their place."""
    names = ("param", "momentum", "second")
    rows = torch.tensor([0, 5, KEPT - 1, ROWS - KEPT, ROWS - 1])
    g = torch.Generator().manual_seed(1)
    call = {"grad": torch.randn(5, WIDTH, generator=g), "counter": make_counter()}
    call["hyper"] = make_hyper(0.01, 0.1, 0.9, 0.999, 1e-8)
    bags = {"offset": torch.arange(6)} if op == "bag_step_" else {}

    def make(table: list[torch.Tensor], ids: torch.Tensor, part: slice, offset: int) -> RowStep:
        named = {"token": ids, "offset": torch.arange(ids.shape[0] + 1)} if bags else {"rows": ids}
        tensors = (
            dict(zip(names, table, strict=True))
            | named
            | call
            | {"grad": call["grad"][part].contiguous()}
        )
        return RowStep("adam", tensors, {"row_offset": offset})

    first = make([t[:KEPT].clone() for t in huge], rows[:3], slice(0, 3), 2**32).run()
    start = ROWS - KEPT
    last = make(
        [t[-KEPT:].clone() for t in huge], rows[3:] - start, slice(3, 5), 2**32 + start
    ).run()
    positional, named = make(huge, rows, slice(0, 5), 2**32).arguments()
    getattr(ops, op)(*positional, **named)
    assert_same_bits({k: t[:KEPT] for k, t in zip(names, huge, strict=True)}, first)
    assert_same_bits({k: t[-KEPT:] for k, t in zip(names, huge, strict=True)}, last)


# Memory
GROWTH = """
import json, resource, torch
from xmlkernels import ops
n, d, bags, count = 200_000, 256, 64, 40_000
hyper, counter = torch.tensor([.1, .01, .9, .999, 1e-8, 1, 1]), torch.tensor([1, 1])
weight, rows, grad = torch.zeros(n, d), torch.arange(0, n, 4), torch.ones(n // 4, d)
m, v = torch.zeros(n, d), torch.zeros(n, d)
token, offset = torch.randint(0, n, (count,)), torch.arange(bags + 1) * (count // bags)

def adam(k): ops.sparse_adam_(weight, m, v, rows[:k], grad[:k], hyper, counter)
def bag(k):
    at = offset.clamp(max=k)
    ops.bag_step_(weight, grad[:bags], token, at, hyper, counter, momentum=m, second=v)

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def now(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

ballast, grown = [], {}
for t in weight, m, v: t.fill_(0.5)
for call in adam, bag:
    call(300)  # threads stand before the count begins
    while peak() - now() > 1: ballast.append(torch.ones(1 << 18))
    before = peak()
    call(count)
    grown[call.__name__] = peak() - before
print(json.dumps(grown))
"""


@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_memory_beyond_the_table_stays_small() -> None:
    """A copy of the touched rows would be 41 to 51 MB, a dense gradient 205 MB; sorting takes 48
    bytes an occurrence.
    """
    done = run_child("", GROWTH)
    assert done.returncode == 0, done.stderr[-2000:]
    grown = json.loads(done.stdout)
    assert grown.keys() == {"adam", "bag"}
    assert {k: v for k, v in grown.items() if v > 8} == {}


# Instruction sets: all that this processor can run give the reference's bits.
def results(reference: bool) -> dict[str, str]:
    """One digest for each of some calls whose fp32 results are exact."""
    from test_bag_step import dyadic_bags

    out = {}
    for rule in RULES:
        for dtype in DTYPES:
            for step in (
                dyadic_rows(rule, (40, 70, 7), dtype, state=BF16),
                dyadic_rows(rule, (130, 200, 130), dtype, state=F16, row_wise=True),
                dyadic_bags(rule, dtype, (30, 900, 150, 70)),
            ):
                name = f"{step.op} {rule} {dtype} {step.tensors['param'].shape}"
                out[name] = digest(list(step.run(reference=reference).values()))
    return out


CHILD = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import sparse_common, test_sparse_layout as t
from test_sparse_update import check_against_exact
for rule in t.RULES:
    for dtype in t.DTYPES:
        rows = sparse_common.random_rows(rule, (9, 40, 70), dtype, grad=t.BF16, lazy=True)
        check_against_exact(rows)
        bags = sparse_common.random_bags(rule, (9, 90, 40, 7), dtype, grad=t.F16, row_wise=True)
        check_against_exact(bags)
print(json.dumps(t.results(False)))
"""


@needs_kernels
@pytest.mark.parametrize(
    "name", instruction_sets()[1:]
)  # the first is in use: all other tests are its own
def test_every_instruction_set(name: str) -> None:
    done = run_child(name, CHILD)
    assert done.returncode == 0, done.stderr[-3000:]
    got, expected = json.loads(done.stdout), results(True)
    assert [k for k in expected if got[k] != expected[k]] == []


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_the_kernels_refuse_tensors_of_two_cards() -> None:
    """Called past the checks of `xmlkernels.ops`."""
    table = torch.zeros(4, 8, device="cuda:0")
    rows = torch.arange(2, device="cuda:0")
    grad = torch.ones(2, 8, device="cuda:1")
    steer = torch.zeros(7, device="cuda:0"), torch.zeros(2, dtype=torch.int64, device="cuda:0")
    with pytest.raises(
        RuntimeError, match=r"argument grad: expected .* on cuda:0, got .* on cuda:1"
    ):
        torch.ops.xmlkernels.sparse_sgd_(table, None, rows, grad, *steer)
