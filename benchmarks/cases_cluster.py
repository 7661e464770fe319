"""What is timed of `cluster_step_`: the whole training step of one level of a cascade.

Clusters have M = S / K rows; each sample selects K of the C = L / M clusters at random, so that S
rows are its candidates and U = L (1 - (1 - K / C)^B) different rows are expected to be touched.
Closed forms, as in `benchmarks/cases.py`; s is the bytes of a table element, m of an element of one
of Adam's two moments (0 in phase sgd).

FLOP: 6 B S D (scores, dX and dW). Bytes: U D (2 s + 4 m), each touched row of table and moments
read and written once; 4 B S, scores; 8 B K; 8 B D.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from benchmarks.case import DTYPES, LR, Case
from benchmarks.shapes import Shape
from benchmarks.timing import Step
from xmlkernels import ops
from xmlkernels.ops import Hyper
from xmlkernels.reference.cluster_step import cluster_step_ as reference

POSITIVES = 5
_REFERENCE_ELEMENTS = 1 << 23  # above, the reference's dense gradient would not fit common memories
# above, tables in fp32 are left to the peer: table and moments of both would take 12 GB.
_FP32_ELEMENTS = 1 << 28


@dataclass
class Level:
    """weight [L, D]; x [B, D] fp32; clusters int64 [B, K]; row_ptr int64 [C + 1]; positives as the
    op takes them; and for the peers the same as index int64 [B, S] and target fp32 [B, S]."""

    weight: Tensor
    x: Tensor
    clusters: Tensor
    row_ptr: Tensor
    pos_row: Tensor
    pos_sample: Tensor
    index: Tensor
    target: Tensor


def sizes(shape: Shape) -> tuple[int, int, int]:
    """K, M and C."""
    k = shape.K or 1
    m = (shape.S or shape.L) // k
    return k, m, shape.L // m


def make_level(shape: Shape, dtype: str, device: str) -> Level:
    """The same numbers in every format and process: N(0, 0.02²) rows, unit-scale embeddings,
    positives in the shortlist.
    """
    k, m, count = sizes(shape)
    g = torch.Generator(device).manual_seed(0)
    weight = torch.empty(shape.L, shape.D, dtype=DTYPES[dtype], device=device).normal_(
        0, 0.02, generator=g
    )
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape.B, shape.D, generator=g)
    clusters = torch.stack([torch.randperm(count, generator=g)[:k] for _ in range(shape.B)])
    index = (clusters[:, :, None] * m + torch.arange(m)).flatten(1)
    target = torch.zeros(index.shape)
    places = torch.stack([torch.randperm(k * m, generator=g)[:POSITIVES] for _ in range(shape.B)])
    target.scatter_(1, places, 1)
    sample, place = target.nonzero(as_tuple=True)
    row = index[sample, place]
    order = torch.argsort(row * shape.B + sample)
    pos_row, pos_sample = row[order], sample[order].to(torch.int32)
    row_ptr = torch.arange(count + 1) * m
    return Level(
        weight, *(t.to(device) for t in (x, clusters, row_ptr, pos_row, pos_sample, index, target))
    )


def cluster_work(shape: Shape, s: int, m: int = 0) -> tuple[int, int]:
    """FLOP and bytes of one call; s and m are the bytes of a table element and of a moment's."""
    b, d = shape.B, shape.D
    k, rows, count = sizes(shape)
    touched = round(count * rows * (1 - (1 - k / count) ** b))
    return 6 * b * k * rows * d, touched * d * (2 * s + 4 * m) + 4 * b * k * rows + 8 * b * (k + d)


def own_step(held: Level, *, op: Callable[..., Any], adam: bool) -> Step:
    """`cluster_step_`, or its reference. The moments have the table's format."""
    device, rows = held.weight.device, int(held.row_ptr[1])
    hyper = Hyper(LR, beta1=0.9 if adam else 0).tensor(device)
    counter = torch.tensor([1, 0], device=device)
    states = {k: torch.zeros_like(held.weight) for k in (("momentum", "second") if adam else ())}
    h = held

    def step() -> Tensor:
        dx, *_ = op(
            h.weight,
            h.x,
            h.clusters,
            h.row_ptr,
            rows,
            h.pos_row,
            h.pos_sample,
            hyper,
            counter,
            **states,
        )
        counter[1] += 1
        return dx

    return step


def full_step(held: Level) -> Step:
    """`bce_step_`, which does the same where one cluster holds all rows."""
    hyper = Hyper(LR).tensor(held.weight.device)
    counter = torch.tensor([1, 0], device=held.weight.device)

    def step() -> Tensor:
        dx, _ = ops.bce_step_(held.weight, held.x, held.pos_row, held.pos_sample, hyper, counter)
        counter[1] += 1
        return dx

    return step


def eager_step(held: Level, *, adam: bool) -> Step:
    """What a user writes: nn.Embedding(sparse=True), bmm with the gathered rows, summed BCE,
    backward, SparseAdam or SGD.
    """
    table = nn.Embedding(*held.weight.shape, sparse=True, _weight=held.weight)
    kind = torch.optim.SparseAdam if adam else torch.optim.SGD
    optimizer = kind(list(table.parameters()), lr=LR)
    x = held.x.clone().requires_grad_()

    def step() -> Tensor:
        x.grad = None
        optimizer.zero_grad(set_to_none=True)
        scores = torch.bmm(table(held.index), x[:, :, None])[:, :, 0]
        bce(scores, held.target, reduction="sum").backward()
        optimizer.step()
        assert x.grad is not None
        return x.grad

    return step


def cluster_step_cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    """`compiled` changes nothing: torch's sparse gradients stay outside its compiler."""
    cases: list[Case] = []
    inputs = {name: partial(make_level, shape, name, device) for name in ("fp32", "bf16")}

    def add(impl: str, phase: str, dtype: str, start: Callable[[Level], Step]) -> None:
        size = DTYPES[dtype].itemsize
        work = cluster_work(shape, size, size if phase == "adam" else 0)
        cases.append(Case(impl, phase, dtype, *work, inputs[dtype], start))

    for name in inputs:
        if name == "fp32" and shape.L * shape.D > _FP32_ELEMENTS:
            continue
        for phase in ("sgd", "adam"):
            own = partial(own_step, adam=phase == "adam")
            add("xmlkernels", phase, name, partial(own, op=ops.cluster_step_))
            if shape.L * shape.D <= _REFERENCE_ELEMENTS:
                add("reference", phase, name, partial(own, op=reference))
        if sizes(shape)[2] == 1:
            add("bce_step", "sgd", name, full_step)
    for phase in ("sgd", "adam"):
        add("eager", phase, "fp32", partial(eager_step, adam=phase == "adam"))
    return cases
