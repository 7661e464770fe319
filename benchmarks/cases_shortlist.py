"""What is timed of `shortlist_matmul`: scoring alone, and the whole training step of a shortlisted
head.

Closed forms, as in `benchmarks/cases.py`; s is the bytes of a table element, m of an element of one
of Adam's two moments, U = L (1 - (1 - S/L)^B) the number of rows that B lists of S different ones
are expected to name:

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

from benchmarks.case import DTYPES, LR, Case
from benchmarks.shapes import Shape
from benchmarks.timing import Step
from xmlkernels import ops
from xmlkernels.ops import Hyper


@dataclass
class Shortlists:
    """weight [L, D]; x [B, D] fp32; index int64 [B, S], S different rows each; target fp32 [B, S],
    the first of each list 1.
    """

    weight: Tensor
    x: Tensor
    index: Tensor
    target: Tensor


def make_shortlists(shape: Shape, dtype: str, device: str) -> Shortlists:
    """The same numbers in every format and process: N(0, 0.02²) rows, unit-scale embeddings."""
    g = torch.Generator(device).manual_seed(0)
    weight = torch.empty(shape.L, shape.D, dtype=DTYPES[dtype], device=device).normal_(
        0, 0.02, generator=g
    )
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape.B, shape.D, generator=g)
    index = torch.stack(
        [torch.randperm(shape.L, generator=g)[: shape.S or 1] for _ in range(shape.B)]
    )
    target = torch.zeros(index.shape)
    target[:, 0] = 1
    return Shortlists(weight, *(t.to(device) for t in (x, index, target)))


def shortlist_work(
    shape: Shape, phase: str, s: int, m: int, *, fused: bool = False
) -> tuple[int, int]:
    """FLOP and bytes of one call; s and m are the bytes of a table element and of a moment's."""
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
    """Scores, summed BCE, autograd, `sparse_adam_` on the rows named; the moments have the table's
    format.
    """
    # autograd's view of the same memory.
    device = held.weight.device
    table = held.weight.detach().requires_grad_()
    momentum, second = torch.zeros_like(held.weight), torch.zeros_like(held.weight)
    hyper = Hyper(LR, beta1=0.9).tensor(device)
    counter = torch.tensor([1, 0], device=device)
    x = held.x.clone().requires_grad_()

    def step() -> Tensor:
        z = ops.shortlist_matmul(x, table, None, held.index)
        dx, grad = torch.autograd.grad(bce(z, held.target, reduction="sum"), (x, table))
        ops.sparse_adam_(
            held.weight, momentum, second, grad.indices()[0], grad.values(), hyper, counter
        )
        counter[1] += 1
        return dx

    return step


def fused_step(held: Shortlists) -> Step:
    """The same in one call: `cluster_step_` with every label a cluster of its own."""
    device, n = held.weight.device, held.weight.shape[0]
    momentum, second = torch.zeros_like(held.weight), torch.zeros_like(held.weight)
    hyper = Hyper(LR, beta1=0.9).tensor(device)
    counter = torch.tensor([1, 0], device=device)
    row_ptr = torch.arange(n + 1, device=device)
    # The first entry of each list is its positive.
    pos_row, pos_sample = held.index[:, 0].sort(stable=True)
    positives = pos_row, pos_sample.to(torch.int32)

    def step() -> Tensor:
        dx, _, _ = ops.cluster_step_(
            held.weight,
            held.x,
            held.index,
            row_ptr,
            1,
            *positives,
            hyper,
            counter,
            momentum=momentum,
            second=second,
        )
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
    """What a user writes: nn.Embedding(sparse=True), bmm with the gathered rows, summed BCE,
    backward, SparseAdam.
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
    """`compiled` changes nothing: torch's sparse gradients stay outside its compiler. The step
    needs `sparse_adam_`.

    No case of the reference: it holds the gathered rows, half a gigabyte at the smallest of these
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
        if hasattr(ops, "sparse_adam_"):
            add("xmlkernels", "step", name, own_step)
        if hasattr(ops, "cluster_step_"):
            add("fused", "step", name, fused_step)
    for phase in ("forward", "shared"):
        add("eager", phase, "fp32", partial(_eager, shared=phase == "shared"))
    add("eager", "step", "fp32", eager_step)
    return cases
