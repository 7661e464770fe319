"""The cases of `matmul_topk`: the best K of all labels.

FLOP: 2 B L D. Bytes: s L D, the table; 4 B D, x; 12 B K, values and rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import peers
from benchmarks.case import DTYPES, REFERENCE_ELEMENTS, Benchmark, Case
from benchmarks.head import Head, make_head
from benchmarks.shapes import Shape
from benchmarks.timing import Step
from xmlkernels import ops
from xmlkernels.reference import matmul_topk as reference


def topk_work(shape: Shape, s: int) -> tuple[int, int]:
    """Count FLOP and bytes of one search; s is the bytes of a table element."""
    table, k = shape.L * shape.D, shape.K or 1
    return 2 * shape.B * table, s * table + 4 * shape.B * shape.D + 12 * shape.B * k


def _own_topk(head: Head, *, op: Callable[..., Any], k: int) -> Step:
    return lambda: op(head.x, head.weight, None, k)


def _eager_topk(head: Head, *, k: int) -> Step:
    return lambda: torch.topk(head.x @ head.weight.T, k)


def _matmul(head: Head) -> Step:
    return lambda: head.x @ head.weight.T


def matmul_topk_cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    """Build the cases; none is compiled.

    The compiler takes both calls of the eager version from the same libraries.
    """
    k, cases = shape.K or 1, []
    inputs = {name: partial(make_head, shape, name, device) for name in ("fp32", "bf16")}

    def add(impl: str, phase: str, dtype: str, start: Callable[[Head], Step]) -> None:
        work = topk_work(shape, DTYPES[dtype].itemsize)
        cases.append(Case(impl, phase, dtype, *work, inputs[dtype], start))

    for name in inputs:
        add("xmlkernels", "topk", name, partial(_own_topk, op=ops.matmul_topk, k=k))
        if shape.L * shape.D <= REFERENCE_ELEMENTS:
            add("reference", "topk", name, partial(_own_topk, op=reference.matmul_topk, k=k))
    add("eager", "topk", "fp32", partial(_eager_topk, k=k))
    add("matmul", "product", "fp32", _matmul)
    return cases


def gpu_cases(shape: Shape, device: str) -> list[Case]:
    """Build what a card measures besides: the eager version in bf16."""
    inputs = partial(make_head, shape, "bf16", device)
    start = partial(peers.topk_step, k=shape.K or 1)
    return [Case("eager", "topk", "bf16", *topk_work(shape, 2), inputs, start)]


BENCHMARK = Benchmark(
    functions=("matmul_topk",),
    cases=matmul_topk_cases,
    shapes=(
        Shape("B32-L4k", 32, 4_271, 384, K=10),
        Shape("B64-L131k", 64, 131_072, 384, K=100),
        Shape("B1-L670k", 1, 670_000, 384, K=10),  # one query: bound by reading the table
        Shape("B256-L670k", 256, 670_000, 384, K=100),
    ),
    gpu_shapes=(Shape("B512-L2.8M-D768", 512, 2_812_281, 768, K=100),),
    small_gpu_shapes=(Shape("B512-L131k-D768", 512, 131_072, 768, K=100),),
    gpu_cases=gpu_cases,
)
