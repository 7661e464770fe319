"""Methods of peers that a card alone measures, written anew from their descriptions.

Each function takes what a caller holds anyway and returns the call to time. Where a peer waits for
the device in the middle of its step, the wait that its method does not need is left out, in its
favour; what then differs is said at the function.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.case import LR
from benchmarks.head import Head
from benchmarks.timing import Step

ELMO_ROWS = 351_536
"""Labels of one chunk: a table of 2.8 million in eight, as published for Amazon-3M."""
SOFTMAX = {
    "liger": "liger_kernel",
    "cut-cross-entropy": "cut_cross_entropy",
    "quack": "quack",
    "torch-linear-cross-entropy": "torch",
}
"""Peers of another loss, by the package that must be installed for them."""


def installed(impl: str) -> bool:
    """Say whether the package of a peer of another loss is installed, and has it."""
    if SOFTMAX[impl] == "torch":
        return hasattr(nn.functional, "linear_cross_entropy")  # since torch 2.13
    return importlib.util.find_spec(SOFTMAX[impl]) is not None


def stochastic_sgd(weight: Tensor, grad: Tensor, lr: float, counter: Tensor, chunk: int) -> None:
    """Subtract lr * grad, rounded stochastically to bf16, by torch's own functions.

    `peers_triton` has the one-pass form.
    """
    g = torch.Generator(weight.device).manual_seed(int(counter) * 4096 + chunk)
    noise = torch.randint(65536, weight.shape, dtype=torch.int32, device=weight.device, generator=g)
    bits = weight.float().add_(grad.float(), alpha=-lr).view(torch.int32)
    weight.view(torch.int16).copy_((bits + noise) >> 16)


def elmo_step(head: Head, *, rows: int = ELMO_ROWS) -> Step:
    """Return a step after ELMO (ICML 2025), its bf16 path, from the description.

    Label chunks one after another: bf16 logits; in place sigmoid, then minus one at the positives;
    the chunk's share of dX added in fp32; dW written out in bf16; SGD without momentum or decay
    that rounds stochastically. The original finds each chunk's positives by a boolean mask, which
    waits for the device; here they are found once, before the step.
    """
    weight, device = head.weight, head.weight.device
    update: Callable[..., None] = stochastic_sgd
    if device.type == "cuda":
        from benchmarks.peers_triton import stochastic_sgd as update
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    pieces = []
    for start in range(0, weight.shape[0], rows):
        stop = min(start + rows, weight.shape[0])
        first, last = (int(torch.searchsorted(head.pos_row, row)) for row in (start, stop))
        places = head.pos_sample[first:last].long(), head.pos_row[first:last] - start
        pieces.append((weight[start:stop], places))

    def step() -> Tensor:
        x = head.x.to(torch.bfloat16)
        dx = torch.zeros_like(head.x, dtype=torch.float32)
        for chunk, (table, places) in enumerate(pieces):
            grad = (x @ table.T).sigmoid_()
            grad[places] -= 1
            dx += grad @ table
            update(table, grad.T @ x, LR, counter, chunk)
        counter.add_(1)
        return dx

    return step


def topk_step(head: Head, *, k: int) -> Step:
    """Return the score matrix in the table's format, then `torch.topk` of it."""
    return lambda: torch.topk(head.x.to(head.weight.dtype) @ head.weight.T, k)


def softmax_step(head: Head, *, impl: str) -> Step:
    """Return forward and backward of a fused linear cross-entropy over all labels.

    Another loss (softmax) on one label for each sample, and no update of the table: its gradient is
    a whole `L x D` tensor.

    Args:
        head: its table becomes a leaf of autograd; the first positive of each sample is its label.
        impl: a key of `SOFTMAX`; the package must be installed.
    """
    weight = nn.Parameter(head.weight)
    x = head.x.to(weight.dtype).requires_grad_()
    target = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    target[head.pos_sample.long().flip(0)] = head.pos_row.flip(0)
    loss: Callable[[], Tensor]
    if impl == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        criterion = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        loss = lambda: criterion(weight, x, target)  # noqa: E731
    elif impl == "quack":
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as chunked

        loss = lambda: chunked(x, weight, target, reduction="sum")  # noqa: E731
    elif impl == "torch-linear-cross-entropy":
        whole = nn.functional.linear_cross_entropy  # type: ignore[attr-defined]
        loss = lambda: whole(x, weight, target, reduction="sum")  # noqa: E731
    else:
        from cut_cross_entropy import linear_cross_entropy

        loss = lambda: linear_cross_entropy(x, weight, target, reduction="sum")  # noqa: E731

    def step() -> Tensor:
        x.grad = weight.grad = None
        loss().backward()
        assert x.grad is not None
        return x.grad

    return step
