"""What the ops promise torch and the machine: schemas, fake kernels, memory, 64-bit addresses."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common import (
    DEVICES,
    DTYPES,
    Step,
    assert_same_bits,
    huge_table,
    make_hyper,
    name_of,
    needs_kernels,
    opcheck,
    random_step,
)
from common_calls import PUBLIC
from common_cluster import random_cluster_step
from xmlkernels import ops

F32, BF16 = torch.float32, torch.bfloat16
ADAM = make_hyper(0.01, 0.1, 0.9, 0.999, 1e-8)
OTHERS = [p for p in Path(__file__).parent.glob("test_*.py") if p.name != "test_layout.py"]
NAMES = ("bce_step_", "bce_loss", "bce_loss_backward", "matmul_topk", "cluster_step_")


def cases() -> list[tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    """op, name, arguments, options of calls that between them use every argument."""
    out = []
    for dtype in DTYPES:
        states = {"bias": F32, "momentum": BF16, "second": F32}
        step = random_step(5, 70, 9, dtype, share=0.1, values=True, states=states)
        t = step.tensors | {"hyper": ADAM}
        call = (t["weight"], t["x"], t["pos_row"], t["pos_sample"], t["hyper"], t["counter"])
        states = {k: t[k] for k in ("pos_value", "bias", "momentum", "second")}
        out.append(("bce_step_", "plain", call, {}))
        every = {"row_offset": 2**33, "rows": 60, "decoupled": True, "need_loss": True}
        out.append(("bce_step_", "all", call, states | every))
        kahan = {"kahan": torch.zeros_like(t["weight"]), "need_loss": True}
        if dtype != F32:
            out.append(("bce_step_", "kahan", call, kahan))
        for grad in (False, True):
            x, w = t["x"].clone().requires_grad_(grad), t["weight"].clone().requires_grad_(grad)
            bias = t["bias"].clone().requires_grad_(grad)
            pos = (t["pos_row"], t["pos_sample"])
            out.append(("bce_loss", f"grad {grad}", (x, w, None, *pos), {}))
            args = (x, w, bias, *pos, t["pos_value"])
            out.append(("bce_loss", f"grad {grad} all", args, {"rows": 60}))
        t |= random_cluster_step(5, [9, 0, 30, 26], 3, 9, dtype, share=0.1, values=True).tensors
        call = (t["weight"], t["x"], t["clusters"], t["row_ptr"], 30, t["pos_row"], t["pos_sample"])
        call = (*call, t["hyper"], t["counter"])
        out.append(("cluster_step_", "plain", call, {}))
        given = {k: t[k] for k in states} | every | {"second": torch.ones(70)}
        out.append(("cluster_step_", "all", call, given))
        kahan = {"kahan": torch.zeros_like(t["weight"]), "need_loss": True}
        if dtype != F32:
            out.append(("cluster_step_", "kahan", call, kahan))
        pos = (t["pos_row"], t["pos_sample"])
        out.append(("bce_loss_backward", "plain", (t["x"], t["weight"], None, *pos), {}))
        every = {"rows": 60, "need_dweight": True, "need_dbias": True}
        args = (t["x"], t["weight"], t["bias"], *pos, t["pos_value"])
        out.append(("bce_loss_backward", "all", args, every))
        out.append(("matmul_topk", "plain", (t["x"], t["weight"], None, 7), {}))
        exclude = torch.tensor([[2**33 + 3, -1]] * 5)
        every = {"exclude": exclude, "row_offset": 2**33, "rows": 60}
        out.append(("matmul_topk", "all", (t["x"], t["weight"], t["bias"], 80), every))
    return out


def to_device(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    return value


# 5. opcheck
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", cases(), ids=lambda c: f"{c[0]} {c[1]} {name_of(c[2][0].dtype)}")
def test_opcheck(case: tuple[str, str, tuple[Any, ...], dict[str, Any]], device: str) -> None:
    op, _, args, options = case
    moved = tuple(to_device(a, device) for a in args)
    named = {k: to_device(v, device) for k, v in options.items()}
    opcheck(getattr(torch.ops.xmlkernels, op).default, moved, named)


def test_every_op_has_a_case() -> None:
    assert {c[0] for c in cases()} == set(NAMES)
    called = "".join(p.read_text("utf-8") for p in OTHERS if "opcheck(" in p.read_text("utf-8"))
    public = set(ops.__all__) - {"missing", "Hyper"}
    assert [op for op in sorted(public - set(NAMES)) if op not in called] == []
    assert public == set(PUBLIC)


@needs_kernels
@pytest.mark.parametrize("op", NAMES)
def test_the_native_library_serves_the_op(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"xmlkernels::{op}", "CPU")


def test_shapes_beyond_2_31_on_meta() -> None:
    """Shapes of results at sizes that no test machine holds."""
    n, d, b = 2**28, 768, 128
    weight = torch.empty(n, d, dtype=BF16, device="meta")
    x = torch.empty(b, d, dtype=BF16, device="meta")
    row = torch.empty(9, dtype=torch.int64, device="meta")
    sample = torch.empty(9, dtype=torch.int32, device="meta")
    hyper, counter = torch.empty(7, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    dx, loss = ops.bce_step_(weight, x, row, sample, hyper, counter, need_loss=True)
    assert (dx.shape, dx.dtype, loss.shape) == ((b, d), F32, (1,))
    assert ops.bce_loss(x, weight, None, row, sample).shape == (1,)
    clusters, row_ptr = (
        torch.empty(*size, dtype=torch.int64, device="meta") for size in ((b, 400), (2**25,))
    )
    dx, scores, loss = ops.cluster_step_(
        weight, x, clusters, row_ptr, 11, row, sample, hyper, counter, need_loss=True
    )
    assert (dx.shape, scores.shape, scores.dtype, loss.shape) == ((b, d), (b, 400, 11), F32, (1,))
    values, rows = ops.matmul_topk(x, weight, None, 100)
    assert (values.shape, values.dtype, rows.dtype) == ((b, 100), F32, torch.int64)


# 4. Addresses beyond 2^31
ROWS, WIDTH, EDGE = 2**21 + 4096, 1024, 1 << 22
KEPT = EDGE // (2 * WIDTH)  # rows at each end that own their memory


@pytest.fixture
def huge() -> Any:
    """A bf16 table of 2^31 + 2^22 numbers; random in its first and last rows, zeros between."""
    if not sys.platform.startswith("linux"):
        pytest.skip("maps one piece of memory many times, as Linux can")
    table = huge_table(ROWS, WIDTH, EDGE)
    g = torch.Generator().manual_seed(0)
    for part in (table[:KEPT], table[-KEPT:]):
        part.copy_(torch.randn(part.shape, generator=g) * 0.03)
    yield table
    del table
    gc.collect()


@needs_kernels
def test_topk_and_loss_beyond_2_31_numbers(huge: torch.Tensor) -> None:
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1)).to(BF16)
    ends = torch.cat([huge[:KEPT], huge[-KEPT:]])
    z = x.double() @ ends.double().T
    values, rows = ops.matmul_topk(x, huge, None, 50, row_offset=2**40)
    best, order = z.topk(50)
    expected = torch.where(order < KEPT, order, order + ROWS - 2 * KEPT) + 2**40
    torch.testing.assert_close(values.double(), best, rtol=1e-5, atol=1e-5)
    assert (rows == expected).double().mean() > 0.98
    row, sample = torch.tensor([3, ROWS - 1]), torch.tensor([1, 0], dtype=torch.int32)
    loss = ops.bce_loss(x, huge, None, row, sample)
    zeros = (ROWS - 2 * KEPT) * 2 * torch.tensor(2.0, dtype=torch.float64).log()
    exact = torch.nn.functional.softplus(z).sum() - z[1, 3] - z[0, -1] + zeros
    assert float(loss) == pytest.approx(float(exact), rel=1e-5)


@needs_kernels
def test_step_beyond_2_31_numbers(huge: torch.Tensor) -> None:
    """Rows are independent, so the rows at both ends must come out as a small table of them
    alone.
    """
    base = random_step(2, 2 * KEPT, WIDTH, BF16, hyper=make_hyper(0.05, 0.01))
    for part, offset in ((slice(0, KEPT), 0), (slice(-KEPT, None), ROWS - KEPT)):
        alone = base.replace(weight=huge[part].clone(), row_offset=offset, need_loss=False)
        alone = alone.replace(
            pos_row=torch.tensor([KEPT - 1]), pos_sample=torch.tensor([1], dtype=torch.int32)
        )
        alone.options["row_offset"] = offset
        base.tensors[f"expected{part.start}"] = alone.run()["weight"]
    t = base.tensors
    row, sample = torch.tensor([KEPT - 1, ROWS - 1]), torch.tensor([1, 1], dtype=torch.int32)
    ops.bce_step_(huge, t["x"], row, sample, t["hyper"], t["counter"])
    assert_same_bits({"first": huge[:KEPT]}, {"first": t["expected0"]})
    assert_same_bits({"last": huge[-KEPT:]}, {"last": t[f"expected{-KEPT}"]})


# Memory
GROWTH = """
import json, resource, torch
from xmlkernels import ops
B, L, D = 128, 200_000, 64
hyper, counter = torch.tensor([.1, .01, .9, .999, 1e-8, 1, 1]), torch.tensor([1, 1])

def step(w, x, r, s): ops.bce_step_(w, x, r, s, hyper, counter, need_loss=True)
def loss(w, x, r, s): ops.bce_loss(x, w, None, r, s)
def backward(w, x, r, s): ops.bce_loss(x.clone().requires_grad_(), w, None, r, s).backward()
def topk(w, x, r, s): ops.matmul_topk(x, w, None, 100)
def cluster(w, x, r, s):
    chosen = torch.arange(300).repeat(B, 1) * 7 % (len(w) // 10)
    ops.cluster_step_(w, x, chosen, torch.arange(0, len(w) + 1, 10), 10, r, s, hyper, counter)

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def now(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

row = torch.arange(0, L, 1000)
sample = (row % B).to(torch.int32)
ballast, grown = [], {}
for dtype in torch.float32, torch.bfloat16:
    w, x = torch.randn(L, D).to(dtype), torch.randn(B, D).to(dtype)
    for call in step, loss, backward, topk, cluster:
        call(w[:3000].clone(), x, row[:3], sample[:3])  # threads stand before the count begins
        # Whatever was needed for a moment before: fill up to that peak, so that any growth shows.
        while peak() - now() > 1: ballast.append(torch.ones(1 << 18))
        before = peak()
        call(w, x, row, sample)
        grown[f"{call.__name__} {dtype}"] = peak() - before
print(json.dumps(grown))
"""


@needs_kernels
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc")
def test_memory_beyond_the_table_stays_small() -> None:
    """200,000 labels, batch 128: the logits alone would be 102 MB, a table's gradient 51 MB."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    grown = json.loads(done.stdout)
    assert len(grown) == 10
    assert {k: v for k, v in grown.items() if v > 64} == {}
    print(grown)


@pytest.mark.gpu
def test_memory_beyond_the_table_stays_small_on_the_card() -> None:
    step = random_step(256, 400_000, 64, BF16, share=0.0).to("cuda")
    t = step.tensors
    call = (t["weight"], t["x"], t["pos_row"], t["pos_sample"], t["hyper"], t["counter"])
    ops.bce_step_(*call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.bce_step_(*call)
    assert torch.cuda.max_memory_allocated() - before <= 256 << 20


def test_poisoned_memory_reaches_the_ops() -> None:
    """The fixture that all these tests rely on does what it says inside an op's own allocations."""
    step = Step(random_step(3, 40, 8, F32).tensors, {"rows": 0, "need_loss": True})
    got = step.run()
    assert torch.empty(5).isnan().all()
    assert (got["dx"] == 0).all() and float(got["loss"]) == 0
