"""The cases of a whole cascade: the step of all levels, shortlists included, without the encoder.

A shape says B, L, D, and of the last level S candidates in K clusters of M = S / K labels. The tree
above is fixed: C = L / M clusters in groups of 8, so levels of C / 8, C and L nodes; K / 2 groups
and K clusters are kept. With L = 131,072 and M = 16 these are 2^10 and 2^13. Closed forms: the sum
of those of `cluster_step` over the levels, the second moment row-wise.

Ours keeps Adam's second moment row-wise, as training does. The peer, with the whole one, is what a
user composes: each level a sparse nn.Embedding for rows and one for biases, bmm with the gathered
rows, mean BCE, one backward for all levels, SparseAdam. It is handed its shortlists and targets;
ours makes its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from benchmarks.case import DTYPES, LR, Case
from benchmarks.cluster_work import cluster_work
from benchmarks.shapes import Shape
from benchmarks.timing import Step
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.shortlist import candidates, count, select
from xmlkernels.nn.table import RowOptimizer

POSITIVES, GROUP = 5, 8
EPSILON = 1e-16  # SparseAdam adds it elsewhere: too small to matter, the peers do the same


@dataclass
class Levels:
    """The levels' tables and a batch.

    Attributes:
        heads: the tables.
        x: per level [B, D] fp32.
        row_ptr, most: per level the clusters' rows, and the most rows of one.
        positives: per level (node, sample).
        index, target: per level the peer's candidates int64 [B, S_r], and targets fp32 [B, S_r].
    """

    heads: CascadeHeads
    x: list[Tensor]
    row_ptr: list[Tensor]
    most: list[int]
    positives: list[tuple[Tensor, Tensor]]
    index: list[Tensor]
    target: list[Tensor]


def level_shapes(shape: Shape) -> list[Shape]:
    """Return each level as a shape of `cluster_step`."""
    k = shape.K or 2
    rows = (shape.S or shape.L) // k
    clusters = shape.L // rows
    groups = clusters // GROUP
    return [
        Shape("", shape.B, groups, shape.D, S=groups, K=1),
        Shape("", shape.B, clusters, shape.D, S=k // 2 * GROUP, K=k // 2),
        Shape("", shape.B, shape.L, shape.D, S=k * rows, K=k),
    ]


def make_levels(shape: Shape, dtype: str, device: str, row_wise: bool = True) -> Levels:
    """Make unit-scale features with 5 labels per sample, the same in every process."""
    levels = level_shapes(shape)
    rows = levels[2].S // levels[2].K  # type: ignore[operator]
    sizes, most = [level.L for level in levels], [GROUP, rows]
    topk = [level.K or 1 for level in levels[1:]]
    optimizer = RowOptimizer("adam", epsilon=EPSILON, state_dtype=dtype, row_wise=row_wise)
    layers = [(1,)] * 3
    heads = CascadeHeads(
        sizes, most, shape.D, layers=layers, topk=topk, dtype=dtype, optimizer=optimizer
    )
    g = torch.Generator().manual_seed(1)
    x = [torch.randn(shape.B, shape.D, generator=g) for _ in levels]
    label = torch.stack([torch.randperm(shape.L, generator=g)[:POSITIVES] for _ in range(shape.B)])
    sample = torch.arange(shape.B)[:, None]
    keys = [(label // size) * shape.B + sample for size in (GROUP * rows, rows, 1)]
    unique = [key.unique() for key in keys]
    positives = [(u // shape.B, (u % shape.B).to(torch.int32)) for u in unique]
    positives = [(node.to(device), sample.to(device)) for node, sample in positives]
    row_ptr = [
        torch.tensor([0, sizes[0]]),
        torch.arange(sizes[0] + 1) * GROUP,
        torch.arange(sizes[1] + 1) * rows,
    ]
    x, row_ptr = ([t.to(device) for t in tensors] for tensors in (x, row_ptr))
    held = Levels(heads.to(device), x, row_ptr, [sizes[0], *most], positives, [], [])
    clusters = torch.zeros(shape.B, 1, dtype=torch.int64, device=device)
    for r, level in enumerate(levels):
        index = candidates(clusters, held.row_ptr[r], held.most[r])[0].flatten(1)
        true = torch.zeros(shape.B, level.L, device=device)
        true[positives[r][1].long(), positives[r][0]] = 1
        held.index.append(index)
        held.target.append(true.gather(1, index))
        if r < 2:
            scores = heads.levels[r].scores(held.x[r], index)  # type: ignore[operator]
            scores = scores.view(*clusters.shape, -1)
            clusters = select(
                scores, clusters, held.row_ptr[r], topk[r], positives=positives[r]
            ).nodes
    return held


def own_step(held: Levels) -> Step:
    """Return the model's step.

    `cluster_step_` on each level; its scores give the next shortlist.
    """
    start = torch.zeros(held.x[0].shape[0], 1, dtype=torch.int64, device=held.x[0].device)
    # States of its own, so that they count into its memory as the peer's do.
    for level in held.heads.levels:
        level.momentum = torch.zeros_like(level.momentum)
        level.second = torch.zeros_like(level.second)

    options: dict[str, Any] = {"lr": LR, "beta1": None, "dx_scale": 1.0, "need_loss": False}

    def step() -> list[Tensor]:
        clusters, out = start, []
        for r, level in enumerate(held.heads.levels):
            row_ptr, positives = held.row_ptr[r], held.positives[r]
            scale = 1 / count(clusters, row_ptr).sum().reshape(1)
            dx, scores, _ = level.step(  # type: ignore[operator]
                held.x[r], clusters, row_ptr, held.most[r], positives, scale=scale, **options
            )
            out.append(dx)
            if r < 2:
                k = held.heads.topk[r]
                clusters = select(scores, clusters, row_ptr, k, positives=positives).nodes
        return out

    return step


def eager_step(held: Levels) -> Step:
    """Return what a user writes; see above."""
    weights: list[Tensor] = [level.weight for level in held.heads.levels]  # type: ignore[misc]
    tables = [nn.Embedding(*w.shape, sparse=True, _weight=w) for w in weights]
    zeros = [torch.zeros_like(table.weight[:, :1]) for table in tables]
    biases = [nn.Embedding(len(zero), 1, sparse=True, _weight=zero) for zero in zeros]
    parameters = [p for e in (*tables, *biases) for p in e.parameters()]
    optimizer = torch.optim.SparseAdam(parameters, lr=LR, eps=EPSILON)
    x = [f.clone().requires_grad_() for f in held.x]

    def step() -> list[Tensor]:
        for f in x:
            f.grad = None
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=x[0].device)
        levels = zip(x, tables, biases, held.index, held.target, strict=True)
        for f, table, bias, index, target in levels:
            scores = torch.bmm(table(index), f[:, :, None])[:, :, 0] + bias(index)[:, :, 0]
            total = total + bce(scores, target)
        total.backward()
        optimizer.step()
        return [f.grad for f in x if f.grad is not None]

    return step


def cascade_cases(shape: Shape, device: str) -> list[Case]:
    """Build the cases of all levels together."""
    cases: list[Case] = []

    def add(impl: str, dtype: str, start: Callable[[Levels], Step], row_wise: bool) -> None:
        size = DTYPES[dtype].itemsize
        # Four passes over a moment count two whole ones; with a row-wise second there is one.
        moment = size // 2 if row_wise else size
        work = [cluster_work(level, size, moment) for level in level_shapes(shape)]
        flops, moved = (sum(part) for part in zip(*work, strict=True))
        inputs = partial(make_levels, shape, dtype, device)
        cases.append(Case(impl, "cascade", dtype, flops, moved, inputs, start))

    for dtype in ("fp32", "bf16"):
        add("xmlkernels", dtype, own_step, True)
    add("eager", "fp32", eager_step, False)
    return cases
