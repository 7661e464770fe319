"""The cases of `bce_loss`: the loss over all labels without training, and with the gradient of the
batch; see cases.py for the closed forms."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.case import DTYPES, REFERENCE_ELEMENTS, Case
from benchmarks.head import Head, make_head, positives
from benchmarks.shapes import Shape
from benchmarks.timing import Step
from xmlkernels import ops
from xmlkernels.reference import bce_loss as reference


def loss_work(shape: Shape, phase: str, s: int) -> tuple[int, int]:
    """FLOP and bytes of one call; s is the bytes of a table element. The backward scores again: no
    logits are kept.
    """
    table, backward = shape.L * shape.D, phase == "backward"
    passes = 2 if backward else 1
    return (6 if backward else 2) * shape.B * table, passes * (
        s * table + 4 * shape.B * shape.D
    ) + 12 * positives(shape)


def own_loss(head: Head, *, op: Callable[..., Any], phase: str) -> Step:
    """`bce_loss`, or its reference; with phase "backward" the gradient of x too. Returns the loss,
    or dx.
    """
    x = head.x.clone().requires_grad_(phase == "backward")

    def step() -> Tensor:
        loss: Tensor = op(x, head.weight, None, head.pos_row, head.pos_sample)
        return torch.autograd.grad(loss.sum(), x)[0] if phase == "backward" else loss

    return step


def eager_loss(head: Head, *, phase: str) -> Step:
    """What a user writes: x W^T and BCEWithLogits(sum) on dense targets, which are made in the
    step.
    """
    x = head.x.to(head.weight.dtype).requires_grad_(phase == "backward")

    def step() -> Tensor:
        y = torch.zeros(x.shape[0], head.weight.shape[0], dtype=x.dtype, device=x.device)
        y[head.pos_sample.long(), head.pos_row] = 1
        loss = (
            binary_cross_entropy_with_logits(x @ head.weight.T, y, reduction="none")
            .sum(dtype=torch.float32)
            .reshape(1)
        )
        return torch.autograd.grad(loss.sum(), x)[0] if phase == "backward" else loss

    return step


def bce_loss_cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    """`compiled` changes nothing: the compiler takes the products of the eager version from the
    same libraries.
    """
    cases = []
    inputs = {name: partial(make_head, shape, name, device) for name in ("fp32", "bf16")}

    def add(impl: str, phase: str, dtype: str, start: Callable[[Head], Step]) -> None:
        cases.append(
            Case(
                impl,
                phase,
                dtype,
                *loss_work(shape, phase, DTYPES[dtype].itemsize),
                inputs[dtype],
                start,
            )
        )

    for name in inputs:
        for phase in ("loss", "backward"):
            add("xmlkernels", phase, name, partial(own_loss, op=ops.bce_loss, phase=phase))
        if shape.L * shape.D <= REFERENCE_ELEMENTS:
            add("reference", "loss", name, partial(own_loss, op=reference.bce_loss, phase="loss"))
    for phase in ("loss", "backward"):
        add("eager", phase, "fp32", partial(eager_loss, phase=phase))
    add("eager", "backward", "bf16", partial(eager_loss, phase="backward"))
    return cases
