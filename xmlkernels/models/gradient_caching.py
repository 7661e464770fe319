"""Gradient caching (Gao et al., 2021): a batch's tables see all of it at once, its encoder a few documents at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xmlkernels.errors import InputError
from xmlkernels.models.end_to_end import _generator_at, _generator_state

Parts = list[tuple[Tensor, ...]]
Features = Callable[..., list[Tensor]]


def parts_of(inputs: tuple[Tensor, ...], documents: int, size: int) -> Parts:
    """The encoder's inputs in parts of `size` documents; 0: all at once.

    Raises:
        InputError: the inputs are no rows of documents.
    """
    if size <= 0 or size >= documents:
        return [inputs]
    if any(len(part) != documents for part in inputs):
        raise InputError("micro_batch", "0 for bags of words", str(size), "leave it out: they need no gradient caching")
    return list(zip(*(part.split(size) for part in inputs), strict=True))


@torch.no_grad()
def first_pass(features: Features, parts: Parts) -> tuple[list[Tensor], list[Tensor]]:
    """Features alone, [B, D] per level; and the generator's state before each part, so that the second pass drops the same
    units."""
    out, states = [], []
    for part in parts:
        states.append(_generator_state(part[0].device))
        out.append(features(*part))
    return [torch.cat(level) for level in zip(*out, strict=True)], states


def second_pass(features: Features, parts: Parts, states: list[Tensor], dx: Sequence[Tensor]) -> None:
    """Features again, with a graph, and backward from their gradients dx ([B, D] per level)."""
    start = 0
    for part, state in zip(parts, states, strict=True):
        with _generator_at(part[0].device, state):
            levels = features(*part)
        backward(levels, [d[start : start + len(part[0])] for d in dx])
        start += len(part[0])


def backward(features: Sequence[Tensor], dx: Sequence[Tensor]) -> None:
    """One backward from all levels; those of a frozen encoder have no graph."""
    held = [(f, d) for f, d in zip(features, dx, strict=True) if f.requires_grad]
    if held:
        torch.autograd.backward([f for f, _ in held], [d for _, d in held])
