"""Dropout and attention for training a transformer on a CPU.

Two stock pieces are slow there. `bernoulli_` draws one 53-bit number per element in one thread
(only Intel CPUs get a parallel path), and `scaled_dot_product_attention` with dropout leaves its
fused kernel for a path of small passes, while without dropout its fused backward is slower still at
the lengths of titles. Here an element costs 16 random bits, compared in parallel, and attention is
two batched products around a softmax.

On other devices, and in evaluation, the stock implementations run: torch offers no dispatcher op to
hang this on, so the choice by device stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

_UNIT = 1 << 16


def _keep(shape: torch.Size, dtype: torch.dtype, drop: int) -> torch.Tensor:
    """Draw inverted dropout's factors, 0 and 1/(1 − drop/65,536) (Srivastava et al., 2014)."""
    count = shape.numel()
    # One draw of torch's generator names the whole stream: saving and restoring that generator, as
    # a checkpoint or a second forward pass does, brings the same mask back. It does not depend on
    # the number of threads.
    seed = int(torch.randint(2**62, ()).item())
    bits = np.random.SFC64(seed).random_raw((count + 3) // 4).view(np.int16)[:count]
    keep = torch.empty(count, dtype=dtype)
    # Written as numbers at once: a boolean result converted afterwards takes five times as long.
    torch.ge(torch.from_numpy(bits), drop - _UNIT // 2, out=keep)
    return keep.mul_(_UNIT / (_UNIT - drop)).view(shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, drop: int) -> torch.Tensor:
        keep = _keep(x.shape, x.dtype, drop)
        ctx.save_for_backward(keep)
        return x * keep

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (keep,) = ctx.saved_tensors
        return grad * keep, None


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Drop values of a floating-point tensor: zero with probability p, else x/(1 − p).

    On a CPU, p is rounded to a multiple of 1/65,536, the scale fits the rounded value (so the mean
    stays x), and the mask follows from one draw of torch's default generator. The caller decides
    whether it is training.
    """
    drop = round(p * _UNIT)
    if drop <= 0:
        return x
    if x.device.type != "cpu" or drop >= _UNIT:
        return nn.functional.dropout(x, p)
    dropped: torch.Tensor = _Dropout.apply(x, drop)  # type: ignore[no-untyped-call]
    return dropped


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` over `dropout`; it has no parameters, so state dicts do not change."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Drop values in training; hand the tensor on in evaluation."""
        return dropout(input, self.p) if self.training else input


def training_attention(
    stock: Callable[..., tuple[torch.Tensor, Any]],
) -> Callable[..., tuple[torch.Tensor, Any]]:
    """Make softmax attention in the form that transformers' AttentionInterface calls.

    Source: Vaswani et al., 2017, section 3.2.1.

    Args:
        stock: the SDPA function of transformers. It serves other devices, evaluation, causal
            attention without a mask, grouped keys and position biases.

    Returns:
        A function of (layer, query, key, value [B, heads, T, width of a head], attention_mask bool
        with True = may be attended, broadcast to [B, heads, T, T], or None = all) that gives [B, T,
        heads, width of a head], contiguous, and None for the probabilities, which are not kept.
    """

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, Any]:
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if (
            query.device.type != "cpu"
            # A training pass without a graph (the first of gradient caching) must draw as the one
            # with it does.
            or not (torch.is_grad_enabled() or module.training)
            or query.shape[1] != key.shape[1]
            or (causal and attention_mask is None)
            or (attention_mask is not None and attention_mask.dtype != torch.bool)
            or options.get("position_bias") is not None
        ):
            return stock(module, query, key, value, attention_mask, **options)
        scaling = options.get("scaling")
        scores = torch.matmul(
            query * (query.shape[-1] ** -0.5 if scaling is None else scaling), key.transpose(-1, -2)
        )
        if attention_mask is not None:
            # The smallest number, not -inf: a row that may attend to nothing must give no NaN.
            barred = torch.zeros(attention_mask.shape, dtype=scores.dtype)
            scores = scores + barred.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
        shares = dropout(torch.softmax(scores, dim=-1), options.get("dropout", 0.0))
        return torch.matmul(shares, value).transpose(1, 2).contiguous(), None

    return attention
