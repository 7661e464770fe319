"""What is timed of a cascade: the step of all its levels without the encoder, shortlists included.

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

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from benchmarks.case import DTYPES, LR, Case
from benchmarks.cases_cluster import cluster_work
from benchmarks.shapes import Shape
from benchmarks.timing import Step
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.shortlist import candidates, count, select
from xmlkernels.nn.table import RowOptimizer

POSITIVES, GROUP = 5, 8
EPSILON = 1e-16  # SparseAdam adds it elsewhere: too small to matter, the peers do the same


@dataclass
class Levels:
    """heads; x [B, D] fp32 per level; per level row_ptr, most, positives (node, sample), and for
    the peer the candidates int64 [B, S_r] and targets fp32 [B, S_r]."""

    heads: CascadeHeads
    x: list[Tensor]
    row_ptr: list[Tensor]
    most: list[int]
    positives: list[tuple[Tensor, Tensor]]
    index: list[Tensor]
    target: list[Tensor]


def level_shapes(shape: Shape) -> list[Shape]:
    """Each level as a shape of `cluster_step`."""
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
    """The same numbers in every process: unit-scale features, 5 labels per sample."""
    levels = level_shapes(shape)
    rows = levels[2].S // levels[2].K  # type: ignore[operator]
    sizes, most = [level.L for level in levels], [GROUP, rows]
    topk = [level.K or 1 for level in levels[1:]]
    heads = CascadeHeads(
        sizes,
        most,
        shape.D,
        layers=[(1,)] * 3,
        topk=topk,
        dtype=dtype,
        optimizer=RowOptimizer("adam", epsilon=EPSILON, state_dtype=dtype, row_wise=row_wise),
    )
    g = torch.Generator().manual_seed(1)
    x = [torch.randn(shape.B, shape.D, generator=g) for _ in levels]
    label = torch.stack([torch.randperm(shape.L, generator=g)[:POSITIVES] for _ in range(shape.B)])
    keys = [
        (label // size) * shape.B + torch.arange(shape.B)[:, None]
        for size in (GROUP * rows, rows, 1)
    ]
    unique = [key.unique() for key in keys]
    positives = [
        ((u // shape.B).to(device), (u % shape.B).to(torch.int32).to(device)) for u in unique
    ]
    row_ptr = [
        torch.tensor([0, sizes[0]]),
        torch.arange(sizes[0] + 1) * GROUP,
        torch.arange(sizes[1] + 1) * rows,
    ]
    held = Levels(
        heads.to(device),
        [f.to(device) for f in x],
        [p.to(device) for p in row_ptr],
        [sizes[0], *most],
        positives,
        [],
        [],
    )
    clusters = torch.zeros(shape.B, 1, dtype=torch.int64, device=device)
    for r, level in enumerate(levels):
        index = candidates(clusters, held.row_ptr[r], held.most[r])[0].flatten(1)
        true = torch.zeros(shape.B, level.L, device=device)
        true[positives[r][1].long(), positives[r][0]] = 1
        held.index.append(index)
        held.target.append(true.gather(1, index))
        if r < 2:
            scores = heads.levels[r].scores(held.x[r], index)  # type: ignore[operator]
            clusters = select(
                scores.view(*clusters.shape, -1),
                clusters,
                held.row_ptr[r],
                topk[r],
                positives=positives[r],
            )[0]
    return held


def own_step(held: Levels) -> Step:
    """As the model's step: `cluster_step_` on each level, the next shortlist from its scores."""
    start = torch.zeros(held.x[0].shape[0], 1, dtype=torch.int64, device=held.x[0].device)
    # States of its own, so that they count into its memory as the peer's do.
    for level in held.heads.levels:
        level.momentum, level.second = (
            torch.zeros_like(level.momentum),
            torch.zeros_like(level.second),
        )  # type: ignore

    def step() -> list[Tensor]:
        clusters, out = start, []
        for r, level in enumerate(held.heads.levels):
            scale = 1 / count(clusters, held.row_ptr[r]).sum().reshape(1)
            dx, scores, _ = level.step(  # type: ignore[operator]
                held.x[r],
                clusters,
                held.row_ptr[r],
                held.most[r],
                held.positives[r],
                lr=LR,
                beta1=None,
                scale=scale,
                dx_scale=1.0,
                need_loss=False,
            )
            out.append(dx)
            if r < 2:
                k = held.heads.topk[r]
                clusters, _, _ = select(
                    scores, clusters, held.row_ptr[r], k, positives=held.positives[r]
                )
        return out

    return step


def eager_step(held: Levels) -> Step:
    """What a user writes; see above."""
    tables = [
        nn.Embedding(*level.weight.shape, sparse=True, _weight=level.weight)
        for level in held.heads.levels
    ]  # type: ignore[misc, arg-type]
    biases = [
        nn.Embedding(t.num_embeddings, 1, sparse=True, _weight=torch.zeros_like(t.weight[:, :1]))
        for t in tables
    ]
    optimizer = torch.optim.SparseAdam(
        [p for e in (*tables, *biases) for p in e.parameters()], lr=LR, eps=EPSILON
    )
    x = [f.clone().requires_grad_() for f in held.x]

    def step() -> list[Tensor]:
        for f in x:
            f.grad = None
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=x[0].device)
        for f, table, bias, index, target in zip(
            x, tables, biases, held.index, held.target, strict=True
        ):
            scores = torch.bmm(table(index), f[:, :, None])[:, :, 0] + bias(index)[:, :, 0]
            total = total + bce(scores, target)
        total.backward()
        optimizer.step()
        return [f.grad for f in x if f.grad is not None]

    return step


def cascade_cases(shape: Shape, device: str) -> list[Case]:
    cases: list[Case] = []

    def add(impl: str, dtype: str, start: Callable[[Levels], Step], row_wise: bool) -> None:
        size = DTYPES[dtype].itemsize
        # Four passes over a moment count two whole ones; with a row-wise second there is one.
        work = [
            cluster_work(level, size, size // 2 if row_wise else size)
            for level in level_shapes(shape)
        ]
        flops, moved = (sum(part) for part in zip(*work, strict=True))
        cases.append(
            Case(
                impl,
                "cascade",
                dtype,
                flops,
                moved,
                partial(make_levels, shape, dtype, device),
                start,
            )
        )

    for dtype in ("fp32", "bf16"):
        add("xmlkernels", dtype, own_step, True)
    add("eager", "fp32", eager_step, False)
    return cases
