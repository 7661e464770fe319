"""The cases of `cluster_step_`: the training step of one level of a cascade, or of all levels.

Clusters have M = S / K rows; each sample selects K of the C = L / M clusters at random, so that S
rows are its candidates and U = L (1 - (1 - K / C)^B) different rows are expected to be touched. Of
Adam's two moments, m is the bytes of an element of one (0 in phase sgd). All levels: see
`benchmarks/cascade.py`.

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

from benchmarks.cascade import cascade_cases
from benchmarks.case import DTYPES, LR, REFERENCE_ELEMENTS, Benchmark, Case
from benchmarks.cluster_work import cluster_work, sizes
from benchmarks.head import make_table
from benchmarks.shapes import Shape
from benchmarks.timing import Step
from xmlkernels import ops
from xmlkernels.ops import Hyper
from xmlkernels.reference.cluster_step import cluster_step_ as reference

POSITIVES = 5
# Larger tables in fp32 are left to the peer: table and moments of both would take 12 GB.
_FP32_ELEMENTS = 1 << 28


@dataclass
class Level:
    """A table and a batch.

    Attributes:
        weight: [L, D].
        x: [B, D] fp32.
        clusters: int64 [B, K].
        row_ptr: int64 [C + 1].
        pos_row, pos_sample: the positives, as the op takes them.
        index, target: the same for the peers, int64 and fp32 [B, S].
    """

    weight: Tensor
    x: Tensor
    clusters: Tensor
    row_ptr: Tensor
    pos_row: Tensor
    pos_sample: Tensor
    index: Tensor
    target: Tensor


def make_level(shape: Shape, dtype: str, device: str) -> Level:
    """Make unit-scale embeddings with positives in the shortlist.

    The numbers are the same in every format and process.
    """
    k, m, count = sizes(shape)
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
    batch = (t.to(device) for t in (x, clusters, row_ptr, pos_row, pos_sample, index, target))
    return Level(make_table(shape, dtype, device), *batch)


def own_step(held: Level, *, op: Callable[..., Any], adam: bool) -> Step:
    """Return `cluster_step_`, or its reference; the moments have the table's format."""
    h, device, rows = held, held.weight.device, int(held.row_ptr[1])
    hyper = Hyper(LR, beta1=0.9 if adam else 0).tensor(device)
    counter = torch.tensor([1, 0], device=device)
    states = {k: torch.zeros_like(held.weight) for k in (("momentum", "second") if adam else ())}
    batch = h.x, h.clusters, h.row_ptr, rows, h.pos_row, h.pos_sample

    def step() -> Tensor:
        dx, *_ = op(h.weight, *batch, hyper, counter, **states)
        counter[1] += 1
        return dx

    return step


def full_step(held: Level) -> Step:
    """Return `bce_step_`, which does the same where one cluster holds all rows."""
    hyper = Hyper(LR).tensor(held.weight.device)
    counter = torch.tensor([1, 0], device=held.weight.device)

    def step() -> Tensor:
        dx, _ = ops.bce_step_(held.weight, held.x, held.pos_row, held.pos_sample, hyper, counter)
        counter[1] += 1
        return dx

    return step


def eager_step(held: Level, *, adam: bool) -> Step:
    """Return what a user writes.

    nn.Embedding(sparse=True), bmm with the gathered rows, summed BCE, backward, SparseAdam or SGD.
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


def level_cases(shape: Shape, device: str) -> list[Case]:
    """Build the cases of one level."""
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
            if shape.L * shape.D <= REFERENCE_ELEMENTS:
                add("reference", phase, name, partial(own, op=reference))
        if sizes(shape)[2] == 1:
            add("bce_step", "sgd", name, full_step)
    for phase in ("sgd", "adam"):
        add("eager", phase, "fp32", partial(eager_step, adam=phase == "adam"))
    return cases


def cluster_step_cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    """Build the cases; none is compiled, as sparse gradients stay outside torch's compiler."""
    whole = shape.name.endswith("cascade")
    return cascade_cases(shape, device) if whole else level_cases(shape, device)


BENCHMARK = Benchmark(
    functions=("cluster_step_",),
    cases=cluster_step_cases,
    shapes=(  # K clusters of S / K rows for each sample
        Shape("B64-L1k-level0", 64, 1_024, 384, S=1_024, K=1),  # one cluster of all rows
        # The second level: most rows have several samples.
        Shape("B64-L8k-S1024", 64, 8_192, 384, S=1_024, K=128),
        Shape("B64-L131k-S1024", 64, 131_072, 384, S=1_024, K=128),
        Shape("B64-L670k-S4400", 64, 670_000, 384, S=4_400, K=400),
        Shape("B64-L670k-S4400-D768", 64, 670_000, 768, S=4_400, K=400),
        Shape("B64-L131k-cascade", 64, 131_072, 384, S=4_096, K=256),  # all levels
    ),
    gpu_shapes=(Shape("B64-K400-L670k-D768", 64, 670_091, 768, S=4400, K=400),),  # 11 rows each
    syncing=frozenset({("eager", "adam")}),  # the number of distinct rows
)
