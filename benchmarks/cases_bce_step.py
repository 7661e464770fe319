"""The cases of `bce_step_`, and its peers' methods written anew from their descriptions.

| phase | FLOP | bytes |
|---|---|---|
| all but skip | 6 B L D: logits, dX and dW | 2 L D (s + m), table and momentum read and written once; 8 B D, x and dx; 12 P |
| skip | 2 B L D and 4 B R D | L D s and R D s, R the rows of groups with positives; the rest as above |
"""  # noqa: E501  (a table row cannot be broken)

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.case import DTYPES, LR, REFERENCE_ELEMENTS, Benchmark, Case
from benchmarks.fp8_head import Fp8Head, make_fp8_head
from benchmarks.head import Head, make_head, positives
from benchmarks.shapes import Shape
from benchmarks.timing import Step
from xmlkernels import native, ops
from xmlkernels.ops import Hyper
from xmlkernels.reference import bce_step as reference

MOMENTUM = 0.9
SMALL = 8_011
"""Labels of the table that two passes are compared on; positives beyond it are fill."""


def bce_work(shape: Shape, s: int, m: int = 0) -> tuple[int, int]:
    """Count FLOP and bytes of one step.

    s and m are the bytes of an element of the table and of the momentum.
    """
    table = shape.L * shape.D
    return 6 * shape.B * table, 2 * table * (s + m) + 8 * shape.B * shape.D + 12 * positives(shape)


def skip_work(shape: Shape, s: int) -> tuple[int, int]:
    """Count the same where every group of 128 rows without a positive is skipped.

    At most one group for each positive is not.
    """
    busy = min(shape.L, reference.GROUP * positives(shape)) * shape.D
    moved = (shape.L * shape.D + busy) * s + 8 * shape.B * shape.D + 12 * positives(shape)
    return 2 * shape.B * shape.L * shape.D + 4 * shape.B * busy, moved


def own_step(
    head: Head, *, op: Callable[..., Any], momentum: bool, need_loss: bool, **options: float
) -> Step:
    """Return `bce_step_`, or its reference; the momentum has the table's format."""
    h, device = head, head.weight.device
    hyper = Hyper(LR, beta1=MOMENTUM if momentum else 0).tensor(device)
    counter = torch.tensor([1, 0], device=device)
    state = torch.zeros_like(h.weight) if momentum else None
    given = {"momentum": state, "need_loss": need_loss} | options

    def step() -> Tensor:
        dx, _ = op(h.weight, h.x, h.pos_row, h.pos_sample, hyper, counter, **given)
        counter[1] += 1
        return dx

    return step


def eager_step(head: Head, *, compiled: bool) -> Step:
    """Return what a user writes.

    Linear, BCEWithLogitsLoss(sum) on dense targets, backward with dx, SGD with momentum. The dense
    targets are made in the step, from the sparse positives that every implementation is given.
    """
    linear = nn.Linear(head.weight.shape[1], head.weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(head.weight)  # in place of a second table
    criterion = nn.BCEWithLogitsLoss(reduction="sum")
    optimizer = torch.optim.SGD(linear.parameters(), lr=LR, momentum=MOMENTUM)
    x = head.x.clone().requires_grad_()

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return criterion(linear(x), y)

    if compiled:
        import torch._inductor.config as inductor

        inductor.compile_threads = 1  # a pool of compiler processes would stay beside the timing
        forward = torch.compile(forward, dynamic=False)

    def step() -> Tensor:
        x.grad = None
        optimizer.zero_grad(set_to_none=True)
        y = torch.zeros(x.shape[0], head.weight.shape[0], device=x.device)
        y[head.pos_sample.long(), head.pos_row] = 1
        forward(x, y).backward()
        optimizer.step()
        assert x.grad is not None
        return x.grad

    return step


def renee_step(head: Head, *, low: str) -> Step:
    """Return a step after Renee (Jain et al., MLSys 2023, section 4), from the description.

    fp32 master and momentum; a low-precision copy of the table each step; all logits in one
    low-precision buffer, turned in place into sigmoid minus targets; dE and dW as low-precision
    products, widened; SGD with momentum.
    """
    dtype = DTYPES[low]
    master, momentum = head.weight, torch.zeros_like(head.weight)
    table = master if low == "fp32" else torch.empty_like(master, dtype=dtype)
    logits = torch.empty(head.x.shape[0], master.shape[0], dtype=dtype, device=master.device)
    places = (head.pos_sample.long(), head.pos_row)
    minus_one = torch.full((len(head.pos_row),), -1, dtype=dtype, device=master.device)

    def step() -> Tensor:
        if table is not master:
            table.copy_(master)
        e = head.x.to(dtype)
        torch.mm(e, table.T, out=logits)
        logits.sigmoid_().index_put_(places, minus_one, accumulate=True)
        dx = (logits @ table).float()
        momentum.mul_(MOMENTUM).add_((logits.T @ e).float())
        master.add_(momentum, alpha=-LR)
        return dx

    return step


def own_fp8_step(head: Fp8Head) -> Step:
    """Return `bce_step_` on a table in e4m3, SGD."""
    h, device = head, head.weight.device
    hyper = Hyper(LR).tensor(device)
    counter = torch.tensor([1, 0], device=device)
    batch = h.x, h.pos_row, h.pos_sample

    def step() -> Tensor:
        dx, _ = ops.bce_step_(h.weight, *batch, hyper, counter, row_scale=h.row_scale)
        counter[1] += 1
        return dx

    return step


def pass_is_built(device: str) -> bool:
    """Say whether a card has the second pass of csrc/cuda/sm90.

    The library may be built while this process runs: then it is loaded now.
    """
    if torch.device(device).type != "cuda":
        return False
    from xmlkernels.triton import bce_pass

    native.load_late()
    return bce_pass.missing(torch.device(device)) is None


def pass_step(head: Head) -> Step:
    """Return `bce_step_` with the second pass of csrc/cuda/sm90, a peer of our own.

    Raises:
        RuntimeError: a step on a small table is not what Triton's pass makes of it.
    """
    from xmlkernels.triton import bce_pass

    own = partial(own_step, op=ops.bce_step_, momentum=False, need_loss=False)
    found = []
    for choice in (contextlib.nullcontext, bce_pass.chosen):
        small = replace(head, weight=head.weight[:SMALL].clone())
        step = own(small)
        with choice():
            found.append((step(), small.weight))
    (dx, table), (its_dx, its_table) = found
    error, alike = float((its_dx - dx).norm() / dx.norm()), (its_table == table).double().mean()
    if not error < 1e-5 or not alike > 0.999:
        differing = f"dx is {error:.1e} from Triton's, {float(alike):.2%} of the table alike"
        raise RuntimeError(differing)
    timed = own(head)

    def step_by_pass() -> Any:
        with bce_pass.chosen():
            return timed()

    return step_by_pass


def bce_step_cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    """Build the cases of both devices."""
    cases = []
    inputs = {name: partial(make_head, shape, name, device) for name in DTYPES}

    def add(impl: str, phase: str, dtype: str, start: Callable[[Head], Step], m: int = 0) -> None:
        """Add a case; m is the bytes of a momentum element. A peer keeps its table in fp32."""
        table = "fp32" if impl == "renee" else dtype
        work = bce_work(shape, DTYPES[table].itemsize, m)
        cases.append(Case(impl, phase, dtype, *work, inputs[table], start))

    for name, dtype in DTYPES.items():
        own = partial(own_step, op=ops.bce_step_, momentum=False, need_loss=False)
        add("xmlkernels", "sgd", name, own)
        add("xmlkernels", "momentum", name, partial(own, momentum=True), dtype.itemsize)
        add("xmlkernels", "loss", name, partial(own, need_loss=True))
        if shape.L * shape.D <= REFERENCE_ELEMENTS:
            add("reference", "sgd", name, partial(own, op=reference.bce_step_))
    # The most that skipping saves: whatever has no positive is skipped.
    skips = partial(own_step, op=ops.bce_step_, momentum=False, need_loss=False, skip_below=1e30)
    cases.append(Case("xmlkernels", "skip", "bf16", *skip_work(shape, 2), inputs["bf16"], skips))
    add("eager", "momentum", "fp32", partial(eager_step, compiled=False), 4)
    if compiled:
        add("compile", "momentum", "fp32", partial(eager_step, compiled=True), 4)
    # fp16 as published; a CPU multiplies it slowly.
    for low in ("fp32", "bf16") if device == "cpu" else ("fp16",):
        add("renee", "momentum", low, partial(renee_step, low=low), 4)
    return cases


def gpu_cases(shape: Shape, device: str) -> list[Case]:
    """Build what a card measures besides: the 8-bit table, and peers of `benchmarks/peers.py`."""
    work, fp8 = bce_work(shape, 2), partial(make_fp8_head, shape, device)
    inputs = partial(make_head, shape, "bf16", device)
    cases = [
        Case("xmlkernels", "sgd", "fp8", *bce_work(shape, 1), fp8, own_fp8_step),
        Case("elmo", "sgd", "bf16", *work, inputs, peers.elmo_step),
    ]
    if 64 < shape.B <= 128 and pass_is_built(device):
        cases.append(Case("cutlass", "sgd", "bf16", *work, inputs, pass_step))
    phase = "softmax of one label, no update"
    for impl in filter(peers.installed, peers.SOFTMAX):
        start = partial(peers.softmax_step, impl=impl)
        cases.append(Case(impl, phase, "bf16", *work, inputs, start))
    return cases


BENCHMARK = Benchmark(
    functions=("bce_step_",),
    cases=bce_step_cases,
    shapes=(
        Shape("B32-L4k", 32, 4_271, 384),  # the labels of EURLEX57K: a table that fits the caches
        Shape("B64-L16k", 64, 16_384, 384),
        Shape("B64-L131k", 64, 131_072, 384),
        Shape("B256-L131k", 256, 131_072, 384),
        Shape("B64-L131k-D768", 64, 131_072, 768),
        Shape("B64-L1M-D64", 64, 1_000_000, 64),  # shows that memory does not grow with L
    ),
    gpu_shapes=(
        Shape("B128-L2.8M-D768", 128, 2_812_281, 768),  # the labels of Amazon-3M
        Shape("B512-L1.3M-D768", 512, 1_305_265, 768),  # LF-AmazonTitles-1.3M: bound by arithmetic
        # LF-Paper2Keywords: fp8 fits where fp32 with its states does not.
        Shape("B128-L8.6M-D768", 128, 8_623_847, 768),
    ),
    small_gpu_shapes=(
        Shape("B128-L131k-D768", 128, 131_072, 768),
        Shape("B512-L131k-D768", 512, 131_072, 768),
    ),
    gpu_cases=gpu_cases,
)
