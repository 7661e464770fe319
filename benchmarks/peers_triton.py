"""The ELMO-like peer's update on a card, as one pass over the table; needs triton."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _sgd(weight, grad, counter, lr, size, chunk, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    # One whole draw for each element, three of its four words unused: as the peer does it.
    noise = tl.randint(tl.load(counter) * 4096 + chunk, at).to(tl.uint32) & 0xFFFF
    slope = tl.load(grad + at, mask=inside).to(tl.float32)
    value = tl.load(weight + at, mask=inside).to(tl.float32) - lr * slope
    bits = value.to(tl.uint32, bitcast=True) + noise
    tl.store(weight + at, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)


def stochastic_sgd(weight: Tensor, grad: Tensor, lr: float, counter: Tensor, chunk: int) -> None:
    """Subtract lr * grad from weight, rounded stochastically to bf16.

    Args:
        weight, grad: bf16 [C, D], contiguous, fewer than 2³¹ elements: the peer's chunks are, and
            its offsets are 32 bits.
        lr: learning rate.
        counter: int64 [1], on their device; with `chunk` it makes the seed.
        chunk: number of the chunk, below 4096.
    """
    size = weight.numel()
    _sgd[(triton.cdiv(size, _BLOCK),)](weight, grad, counter, lr, size, chunk, BLOCK=_BLOCK)
