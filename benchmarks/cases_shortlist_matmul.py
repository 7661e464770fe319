"""The cases of `shortlist_matmul`: scoring alone, and the training step of a shortlisted head.

m is the bytes of an element of one of Adam's two moments; B lists of S different rows are expected
to name U = L (1 - (1 - S/L)^B) of them.

| phase | FLOP | bytes |
|---|---|---|
| forward | 2 B S D | B S D s, every gathered row read once; 12 B S, index and logits; 4 B D, x |
| shared | 2 B S D | S D s; 8 S; 4 B S; 4 B D |
| step | 6 B S D | B S D s; U D (2 s + 4 m), each named row of table and moments read and written once; 12 B S; 8 B D |
| step, fused | 6 B S D | as step, without the B S D s: a row that is read to be updated is scored on the way |
"""  # noqa: E501  (a table row cannot be broken)

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from benchmarks.case import DTYPES, LR, Benchmark, Case
from benchmarks.head import make_table
from benchmarks.shapes import Shape
from benchmarks.timing import Step
from xmlkernels import ops
from xmlkernels.ops import Hyper


@dataclass
class Shortlists:
    """A table and a batch.

    Attributes:
        weight: [L, D].
        x: [B, D] fp32.
        index: int64 [B, S], S different rows each.
        target: fp32 [B, S], the first of each list 1.
    """

    weight: Tensor
    x: Tensor
    index: Tensor
    target: Tensor


def make_shortlists(shape: Shape, dtype: str, device: str) -> Shortlists:
    """Make unit-scale embeddings and random lists, the same in every format and process."""
    g, size = torch.Generator().manual_seed(1), shape.S or 1
    x = torch.randn(shape.B, shape.D, generator=g)
    index = torch.stack([torch.randperm(shape.L, generator=g)[:size] for _ in range(shape.B)])
    target = torch.zeros(index.shape)
    target[:, 0] = 1
    batch = (t.to(device) for t in (x, index, target))
    return Shortlists(make_table(shape, dtype, device), *batch)


def shortlist_work(
    shape: Shape, phase: str, s: int, m: int, *, fused: bool = False
) -> tuple[int, int]:
    """Count FLOP and bytes of one call.

    s and m are the bytes of an element of the table and of a moment.
    """
    b, size, d = shape.B, shape.S or 1, shape.D
    if phase == "shared":
        return 2 * b * size * d, size * d * s + 8 * size + 4 * b * (size + d)
    scores = (0 if fused else b * size * d * s) + 12 * b * size
    if phase == "forward":
        return 2 * b * size * d, scores + 4 * b * d
    named = round(shape.L * (1 - (1 - size / shape.L) ** b))
    return 6 * b * size * d, scores + named * d * (2 * s + 4 * m) + 8 * b * d


def _own(held: Shortlists, *, shared: bool) -> Step:
    index = held.index[0].clone() if shared else held.index
    return lambda: ops.shortlist_matmul(held.x, held.weight, None, index)


def own_step(held: Shortlists) -> Step:
    """Return scores, summed BCE, autograd, and `sparse_adam_` on the rows named.

    The moments have the table's format.
    """
    device = held.weight.device
    # Autograd's view of the same memory.
    table = held.weight.detach().requires_grad_()
    momentum, second = torch.zeros_like(held.weight), torch.zeros_like(held.weight)
    hyper = Hyper(LR, beta1=0.9).tensor(device)
    counter = torch.tensor([1, 0], device=device)
    x = held.x.clone().requires_grad_()

    def step() -> Tensor:
        z = ops.shortlist_matmul(x, table, None, held.index)
        dx, grad = torch.autograd.grad(bce(z, held.target, reduction="sum"), (x, table))
        rows, values = grad.indices()[0], grad.values()
        ops.sparse_adam_(held.weight, momentum, second, rows, values, hyper, counter)
        counter[1] += 1
        return dx

    return step


def fused_step(held: Shortlists) -> Step:
    """Return the same in one call: `cluster_step_` with every label a cluster of its own."""
    device, n = held.weight.device, held.weight.shape[0]
    states = {name: torch.zeros_like(held.weight) for name in ("momentum", "second")}
    hyper = Hyper(LR, beta1=0.9).tensor(device)
    counter = torch.tensor([1, 0], device=device)
    row_ptr = torch.arange(n + 1, device=device)
    # The first entry of each list is its positive.
    pos_row, pos_sample = held.index[:, 0].sort(stable=True)
    batch = held.x, held.index, row_ptr, 1, pos_row, pos_sample.to(torch.int32)

    def step() -> Tensor:
        dx, _, _ = ops.cluster_step_(held.weight, *batch, hyper, counter, **states)
        counter[1] += 1
        return dx

    return step


def _gathered_scores(x: Tensor, rows: Tensor) -> Tensor:
    return torch.bmm(rows, x[:, :, None])[:, :, 0]


def _eager(held: Shortlists, *, shared: bool) -> Step:
    if shared:
        return lambda: held.x @ held.weight[held.index[0]].T
    return lambda: _gathered_scores(held.x, held.weight[held.index])


def eager_step(held: Shortlists) -> Step:
    """Return what a user writes.

    nn.Embedding(sparse=True), bmm with the gathered rows, summed BCE, backward, SparseAdam.
    """
    table = nn.Embedding(*held.weight.shape, sparse=True, _weight=held.weight)
    optimizer = torch.optim.SparseAdam(list(table.parameters()), lr=LR)
    x = held.x.clone().requires_grad_()

    def step() -> Tensor:
        x.grad = None
        optimizer.zero_grad(set_to_none=True)
        bce(_gathered_scores(x, table(held.index)), held.target, reduction="sum").backward()
        optimizer.step()
        assert x.grad is not None
        return x.grad

    return step


def shortlist_cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    """Build the cases; none is compiled, as sparse gradients stay outside torch's compiler.

    The reference has none: it holds the gathered rows, half a gigabyte at the smallest of these
    shapes.
    """
    cases: list[Case] = []
    inputs = {name: partial(make_shortlists, shape, name, device) for name in ("fp32", "bf16")}

    def add(impl: str, phase: str, dtype: str, start: Callable[[Shortlists], Step]) -> None:
        size = DTYPES[dtype].itemsize
        work = shortlist_work(shape, phase, size, size, fused=impl == "fused")
        cases.append(Case(impl, phase, dtype, *work, inputs[dtype], start))

    for name in inputs:
        for phase in ("forward", "shared"):
            add("xmlkernels", phase, name, partial(_own, shared=phase == "shared"))
        add("xmlkernels", "step", name, own_step)
        add("fused", "step", name, fused_step)
    for phase in ("forward", "shared"):
        add("eager", phase, "fp32", partial(_eager, shared=phase == "shared"))
    add("eager", "step", "fp32", eager_step)
    return cases


BENCHMARK = Benchmark(
    functions=("shortlist_matmul",),
    cases=shortlist_cases,
    shapes=(
        Shape("B64-S1024-L131k", 64, 131_072, 384, S=1024),
        Shape("B64-S4096-L670k", 64, 670_000, 384, S=4096),
    ),
    # CascadeXML's lists for Amazon-670K.
    gpu_shapes=(Shape("B64-S4400-L670k-D768", 64, 670_091, 768, S=4400),),
    # The number of distinct rows.
    syncing=frozenset({("xmlkernels", "step"), ("eager", "step")}),
)
