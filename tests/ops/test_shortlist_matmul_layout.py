"""What `shortlist_matmul` and its backward promise torch, the machine and whoever errs: schemas,
memory, messages.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common import DEVICES, DTYPES, huge_table, name_of, needs_kernels, opcheck
from shortlists import BOTH, backward, everything, exact_results, make
from test_instruction_sets import instruction_sets, run_child
from xmlkernels import ops
from xmlkernels.errors import InputError
from xmlkernels.reference.shortlist_matmul import shortlist_backward as reference_backward
from xmlkernels.reference.shortlist_matmul import shortlist_matmul as reference

F32, BF16 = torch.float32, torch.bfloat16
NAMES = ("shortlist_matmul", "shortlist_backward")
shared_or_not = pytest.mark.parametrize("shared", BOTH, ids=["per sample", "shared"])


# 5. opcheck
@pytest.mark.parametrize("device", DEVICES)
@shared_or_not
@pytest.mark.parametrize("grad", BOTH, ids=["no grad", "grad"])
@pytest.mark.parametrize("bias", BOTH, ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_opcheck(dtype: torch.dtype, bias: bool, grad: bool, shared: bool, device: str) -> None:
    t = {k: v.to(device) for k, v in make(5, 7, 20, 9, dtype, shared=shared).items()}
    x, weight, b = (t[k].requires_grad_(grad) for k in ("x", "weight", "bias"))
    opcheck(
        torch.ops.xmlkernels.shortlist_matmul.default, (x, weight, b if bias else None, t["index"])
    )


@pytest.mark.parametrize("device", DEVICES)
@shared_or_not
@pytest.mark.parametrize(
    "needs", [{}, {"need_dx": False, "need_dbias": True}, {"need_dweight": False}], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_opcheck_of_the_backward(
    dtype: torch.dtype, needs: dict[str, bool], shared: bool, device: str
) -> None:
    t = {k: v.to(device) for k, v in make(5, 7, 20, 9, dtype, shared=shared).items()}
    args = tuple(t[k] for k in ("dlogits", "x", "weight", "index"))
    opcheck(torch.ops.xmlkernels.shortlist_backward.default, args, needs)


@needs_kernels
@pytest.mark.parametrize("op", NAMES)
def test_the_native_library_serves_the_op(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"xmlkernels::{op}", "CPU")


def test_shapes_beyond_2_31_on_meta() -> None:
    weight = torch.empty(2**28, 768, dtype=BF16, device="meta")
    index = torch.empty(64, 4096, dtype=torch.int64, device="meta")
    z = ops.shortlist_matmul(torch.empty(64, 768, device="meta"), weight, None, index)
    assert z.shape == (64, 4096) and z.dtype == F32


# 4. Addresses beyond 2^31
ROWS, WIDTH, EDGE = 2**21 + 4096, 1024, 1 << 22
KEPT = EDGE // (2 * WIDTH)  # rows at each end that own their memory


@pytest.fixture
def huge() -> Iterator[Tensor]:
    """A bf16 table of 2^31 + 2^22 numbers; random in its first and last rows, zeros between."""
    if not sys.platform.startswith("linux"):
        pytest.skip("maps one piece of memory many times, as Linux can")
    table = huge_table(ROWS, WIDTH, EDGE)
    for part in (table[:8], table[-8:]):
        part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(len(part))))
    yield table
    del table
    gc.collect()


@needs_kernels
@shared_or_not
def test_beyond_2_31_numbers(huge: Tensor, shared: bool) -> None:
    """As a table of the named rows alone."""
    named = torch.cat(
        [torch.arange(8), torch.arange(2**20, 2**20 + 4), torch.arange(ROWS - 8, ROWS)]
    )
    t = make(3, 300, len(named), WIDTH, BF16, shared=shared)
    small = t | {"weight": huge[named], "bias": torch.zeros(len(named))}
    there = torch.where(t["index"] >= 0, named[t["index"]], -1)
    got = everything(small | {"weight": huge, "bias": torch.zeros(ROWS), "index": there})
    expected = everything(small)
    assert torch.equal(got.pop("rows"), named[expected.pop("rows")])
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


# Memory
GROWTH = """
import json, resource, sys, torch
sys.path.insert(0, sys.argv[1])
from shortlists import backward, forward, make

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def now(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

ballast, grown = [], {}
for shared in False, True:
    t = make(64, 2000, 40_000, 384, torch.bfloat16, shared=shared)
    few = t | {"index": t["index"] % 5}
    for call in forward, backward:
        call(few)  # threads stand before the count begins
        while peak() - now() > 1: ballast.append(torch.ones(1 << 18))  # so that any growth shows
        before = peak()
        held = call(t)
        size = sum(v.nbytes for v in held.values()) if isinstance(held, dict) else held.nbytes
        grown[f"{call.__name__} {shared}"] = peak() - before - size / 2**20
        del held
print(json.dumps(grown))
"""


@needs_kernels
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc")
def test_memory_beyond_the_results_stays_small() -> None:
    """128,000 entries of 384 columns: the gathered rows would be 94 MB in bf16. O(B S) is 6 MB
    here.
    """
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    grown = json.loads(done.stdout)
    assert len(grown) == 4 and {k: v for k, v in grown.items() if v > 24} == {}


# 7. Instruction sets
def by_reference(t: dict[str, Tensor]) -> dict[str, Tensor]:
    found = reference_backward(
        t["dlogits"], t["x"], t["weight"], t["index"], t.get("row_scale"), need_dbias=True
    )
    z = reference(t["x"], t["weight"], t["bias"], t["index"], t.get("row_scale"))
    return {"logits": z} | dict(zip(("dx", "rows", "grad", "dbias"), found, strict=True))


CHILD = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import shortlists, test_shortlist_matmul as numbers
for dtype in numbers.DTYPES:
    for shared in False, True:
        numbers.check_against_exact(shortlists.make(9, 290, 400, 43, dtype, shared=shared), dtype)
print(json.dumps(shortlists.exact_results(shortlists.everything)))
"""


@needs_kernels
@pytest.mark.parametrize(
    "name", instruction_sets()[1:]
)  # the first is in use: all other tests are its own
def test_every_instruction_set(name: str) -> None:
    done = run_child(name, CHILD)
    assert done.returncode == 0, done.stderr[-3000:]
    got, expected = json.loads(done.stdout), exact_results(by_reference)
    assert [k for k in expected if got[k] != expected[k]] == []


# 8. Messages
B, S, N, D = 4, 5, 6, 3
FLOATS = "torch.float32 or torch.bfloat16 or torch.float16"
TABLES = f"{FLOATS} or torch.float8_e4m3fn"
MESSAGES = [
    (
        "weight",
        torch.zeros(N, D).double(),
        f"{TABLES} [any, any] on cpu",
        "torch.float64 [6, 3]",
        "convert",
    ),
    (
        "weight",
        torch.zeros(N),
        f"{TABLES} [any, any] on cpu",
        "torch.float32 [6] on cpu",
        "reshape",
    ),
    (
        "weight",
        torch.zeros(D, N).T,
        "a contiguous tensor",
        "strides (1, 6) for shape [6, 3]",
        "call .contiguous() on it",
    ),
    (
        "weight",
        torch.zeros(N, 0),
        "a table with at least one column",
        "torch.float32 [6, 0]",
        "a width of 1 or more",
    ),
    (
        "weight",
        torch.zeros(N, D).to(torch.float8_e5m2),
        f"a {FLOATS.replace(' or', ',', 1)} table",
        "torch.float8_e5m2 [6, 3] on cpu",
        "convert it",
    ),
    ("row_scale", torch.ones(N, 2), "None for a torch.float32 table", "a tensor", "leave it out"),
    (
        "x",
        torch.zeros(B, D + 1),
        "[any, 3] on cpu",
        "torch.float32 [4, 4] on cpu",
        "convert, reshape or move it",
    ),
    ("x", torch.zeros(B, D).double(), FLOATS, "torch.float64 [4, 3] on cpu", "convert"),
    (
        "x",
        torch.zeros(D, B).T,
        "a contiguous tensor",
        "strides (1, 4) for shape [4, 3]",
        "call .contiguous()",
    ),
    ("x", torch.zeros(B, D, device="meta"), "on cpu", "torch.float32 [4, 3] on meta", "move it"),
    (
        "bias",
        torch.zeros(N, dtype=BF16),
        "torch.float32 [6] on cpu",
        "torch.bfloat16 [6] on cpu",
        "convert",
    ),
    ("bias", torch.zeros(N + 1), "torch.float32 [6] on cpu", "torch.float32 [7] on cpu", "reshape"),
    (
        "index",
        torch.zeros(B, S).int(),
        "torch.int64 [4, any] on cpu",
        "torch.int32 [4, 5] on cpu",
        "convert",
    ),
    (
        "index",
        torch.zeros(B + 1, S).long(),
        "torch.int64 [4, any] on cpu",
        "torch.int64 [5, 5] on cpu",
        "reshape",
    ),
    ("index", torch.zeros(S).int(), "torch.int64 [5] on cpu", "torch.int32 [5] on cpu", "convert"),
    (
        "index",
        torch.zeros(B, S, 1).long(),
        "torch.int64 [4, any] on cpu",
        "torch.int64 [4, 5, 1] on cpu",
        "reshape",
    ),
    ("index", torch.tensor(3), "torch.int64 [4, any] on cpu", "torch.int64 [] on cpu", "reshape"),
    (
        "index",
        torch.zeros(S, B).long().T,
        "a contiguous tensor",
        "strides (1, 4)",
        "call .contiguous()",
    ),
    (
        "index",
        torch.zeros(B, S, device="meta").long(),
        "[4, any] on cpu",
        "torch.int64 [4, 5] on meta",
        "move it",
    ),
    (
        "index",
        torch.full((B, S), N),
        "rows from 0 to 5, or -1 for a pad",
        "entries from 6 to 6",
        "number the rows within",
    ),
    (
        "index",
        torch.tensor([0, -2, 5]),
        "rows from 0 to 5, or -1 for a pad",
        "entries from -2 to 5",
        "pad with -1",
    ),
    (
        "index",
        torch.full((B, S), 2**62),
        "rows from 0 to 5",
        f"entries from {2**62} to {2**62}",
        "within weight",
    ),
]


def good() -> dict[str, Any]:
    return {k: v for k, v in make(B, S, N, D).items() if k != "dlogits"}


@pytest.mark.parametrize(
    "argument, value, expected, got, mend", MESSAGES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_message(argument: str, value: Tensor, expected: str, got: str, mend: str) -> None:
    args = (
        good() | {argument: value} | ({"x": torch.zeros(B, 0)} if value.shape[1:] == (0,) else {})
    )
    with pytest.raises(InputError) as raised:
        ops.shortlist_matmul(**args)
    error = raised.value
    assert error.where == f"shortlist_matmul: argument {argument}"
    assert expected in error.expected and error.got.startswith(got) and mend in error.mend
    assert "\n" not in str(error)


def test_the_good_arguments_are_good() -> None:
    """So that each message above comes from the one argument that was changed."""
    assert ops.shortlist_matmul(**good()).shape == (B, S)


@needs_kernels
@pytest.mark.parametrize("entry", [N, -2, 2**62, -(2**62)])
@shared_or_not
def test_the_kernels_refuse_what_would_corrupt_memory(entry: int, shared: bool) -> None:
    """Called past the checks of `xmlkernels.ops`."""
    t = make(B, S, N, D, shared=shared)
    t["index"].view(-1)[2] = entry
    with pytest.raises(
        RuntimeError, match=f"argument index: expected rows from 0 to 5 or -1, got {entry}"
    ):
        torch.ops.xmlkernels.shortlist_matmul(t["x"], t["weight"], None, t["index"])
    with pytest.raises(
        RuntimeError, match=f"argument index: expected rows from 0 to 5 or -1, got {entry}"
    ):
        backward(t)
    expected = (
        rf"argument dlogits: expected torch.float32 \[{B}, {S}\] on cpu, got torch.float32 \[{B}, "
        rf"{S - 1}\]"
    )
    with pytest.raises(RuntimeError, match=expected):
        backward(make(B, S, N, D, shared=shared) | {"dlogits": torch.zeros(B, S - 1)})
