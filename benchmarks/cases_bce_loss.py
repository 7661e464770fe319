"""The cases of `bce_loss`: the loss over all labels, alone and with the gradient of the batch.

FLOP: 2 B L D; backward 6 B L D, the logits twice and dX. Bytes: s L D, twice in the backward; 4 B D
for x, as much for dx; 12 P.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.case import DTYPES, REFERENCE_ELEMENTS, Benchmark, Case
from benchmarks.head import Head, make_head, positives
from benchmarks.shapes import Shape
from benchmarks.timing import Step
from xmlkernels import ops
from xmlkernels.reference import bce_loss as reference


def loss_work(shape: Shape, phase: str, s: int) -> tuple[int, int]:
    """Count FLOP and bytes of one call; s is the bytes of a table element.

    The backward scores again: no logits are kept.
    """
    flops, passes = (6, 2) if phase == "backward" else (2, 1)
    table = shape.L * shape.D
    moved = passes * (s * table + 4 * shape.B * shape.D) + 12 * positives(shape)
    return flops * shape.B * table, moved


def own_loss(head: Head, *, op: Callable[..., Any], phase: str) -> Step:
    """Return `bce_loss`, or its reference.

    A step returns the loss, or in phase backward the gradient of x.
    """
    x = head.x.clone().requires_grad_(phase == "backward")

    def step() -> Tensor:
        loss: Tensor = op(x, head.weight, None, head.pos_row, head.pos_sample)
        return torch.autograd.grad(loss.sum(), x)[0] if phase == "backward" else loss

    return step


def eager_loss(head: Head, *, phase: str) -> Step:
    """Return what a user writes: x W^T and BCEWithLogits(sum) on dense targets.

    The targets are made in the step.
    """
    x = head.x.to(head.weight.dtype).requires_grad_(phase == "backward")

    def step() -> Tensor:
        y = torch.zeros(x.shape[0], head.weight.shape[0], dtype=x.dtype, device=x.device)
        y[head.pos_sample.long(), head.pos_row] = 1
        terms = binary_cross_entropy_with_logits(x @ head.weight.T, y, reduction="none")
        loss = terms.sum(dtype=torch.float32).reshape(1)
        return torch.autograd.grad(loss.sum(), x)[0] if phase == "backward" else loss

    return step


def bce_loss_cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    """Build the cases; none is compiled.

    The compiler takes the products of the eager version from the same libraries.
    """
    cases = []
    inputs = {name: partial(make_head, shape, name, device) for name in ("fp32", "bf16")}

    def add(impl: str, phase: str, dtype: str, start: Callable[[Head], Step]) -> None:
        work = loss_work(shape, phase, DTYPES[dtype].itemsize)
        cases.append(Case(impl, phase, dtype, *work, inputs[dtype], start))

    for name in inputs:
        for phase in ("loss", "backward"):
            add("xmlkernels", phase, name, partial(own_loss, op=ops.bce_loss, phase=phase))
        if shape.L * shape.D <= REFERENCE_ELEMENTS:
            add("reference", "loss", name, partial(own_loss, op=reference.bce_loss, phase="loss"))
    for phase in ("loss", "backward"):
        add("eager", phase, "fp32", partial(eager_loss, phase=phase))
    add("eager", "backward", "bf16", partial(eager_loss, phase="backward"))
    return cases


BENCHMARK = Benchmark(
    functions=("bce_loss",),
    cases=bce_loss_cases,
    shapes=(Shape("B64-L131k", 64, 131_072, 384),),
    gpu_shapes=(Shape("B128-L2.8M-D768", 128, 2_812_281, 768),),
    small_gpu_shapes=(Shape("B128-L131k-D768", 128, 131_072, 768),),
)
