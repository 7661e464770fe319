"""The update that in-place ops apply to table rows: SGD, SGD with momentum, Adagrad, Adam."""

import torch
from torch import Tensor

from xmlkernels.reference.hyper import BETA1, BETA2, DECAY, EPSILON, LR
from xmlkernels.reference.rounding import MOMENTUM, SECOND, WEIGHT, decode, encode, saturate, store

Writes = list[tuple[Tensor, Tensor]]


def update_rows(
    weight: Tensor,
    grad: Tensor,
    hyper: Tensor,
    counter: Tensor,
    rows: Tensor,
    momentum: Tensor | None,
    second: Tensor | None,
    kahan: Tensor | None,
    decoupled: bool,
    *,
    row_step: Tensor | None = None,
    row_decay: Tensor | None = None,
    decay_sum: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Writes:
    """Return new values of table rows, without writing them.

    Args:
        weight: [N, D], the rows to update.
        grad: [N, D] fp32 (or fp64), their gradient.
        hyper: [7], see `xmlkernels.ops.Hyper`; scale and dx_scale are the caller's.
        counter: int64 [2] seed, step (counted from 0).
        rows: int64 [N], their global numbers: they choose the random words.
        momentum: [N, D]; alone it is SGD's momentum (dampening 0, no Nesterov); with `second` it is
            Adam's first moment.
        second: [N, D], or row-wise [N] (from the mean over D of the squared gradient): Adam's
            second moment; alone, Adagrad's sum of squares.
        kahan: [N, D], what rounding left over; given, the store rounds to nearest and keeps the
            rest.
        decoupled: decay shrinks the weight (AdamW) instead of entering the gradient (L2).
        row_step: int64 [N], updates that each row has had; in place of the counter's step in the
            bias correction.
        row_decay, decay_sum: [N] and [1], sums of log1p(-lr decay) that the row has had and should
            have: the row is shrunk by exp of the difference in place of 1 - lr decay. With
            `decoupled` only.
        row_scale: [N, 2] for e4m3 rows: scale and largest |value| so far. Without kahan.

    Returns:
        Pairs (tensor, new value) for each of weight and the states that is given.
    """
    wide = hyper.to(grad.dtype)
    lr, decay, beta1, beta2 = wide[LR], wide[DECAY], wide[BETA1], wide[BETA2]
    eps = wide[EPSILON]
    w = decode(weight, row_scale).to(grad.dtype)
    if kahan is not None:
        w = w + kahan.to(grad.dtype)
    out: Writes = []
    keep = 1 - lr * decay
    if row_decay is not None and decay_sum is not None:
        keep = (decay_sum.double() - row_decay.double()).exp().to(grad.dtype)[:, None]
        out += [(row_decay, decay_sum.to(row_decay.dtype).expand_as(row_decay))]
    steps = counter[1] + 1 if row_step is None else (row_step + 1)[:, None]
    if row_step is not None:
        out += [(row_step, row_step + 1)]
    shrunk = w * keep if decoupled else w
    if not decoupled:
        grad = grad + decay * w
    direction, states = _direction(grad, beta1, beta2, eps, steps, momentum, second)
    for state, value, stream in states:
        # A row-wise state draws like column 0 of the row.
        wide = value[:, None] if value.dim() == 1 else value
        out += [(state, store(wide, state.dtype, counter, rows, stream).reshape(state.shape))]
    new = shrunk - lr * direction
    if row_scale is not None:
        code, largest = encode(new, row_scale, counter, rows, WEIGHT)
        return [
            (weight, code),
            (row_scale, torch.stack([row_scale[:, 0], row_scale[:, 1].maximum(largest)], 1)),
            *out,
        ]
    if kahan is None:
        return [(weight, store(new, weight.dtype, counter, rows, WEIGHT)), *out]
    return [*_compensated(new, weight, kahan), *out]


def _compensated(new: Tensor, weight: Tensor, kahan: Tensor) -> Writes:
    limit = torch.finfo(weight.dtype).max
    new = new.clamp(-limit, limit)  # what saturation cuts off must not come back in the next step
    rounded = new.to(weight.dtype)
    return [(weight, rounded), (kahan, saturate(new - rounded.to(new.dtype), kahan.dtype))]


def _direction(
    grad: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: Tensor,
    steps: Tensor,
    momentum: Tensor | None,
    second: Tensor | None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor, int]]]:
    """Return what lr multiplies [N, D], and each state with its new value and stream."""
    m, v, states = grad, None, []
    if momentum is not None:
        m = beta1 * momentum.to(grad.dtype) + (grad if second is None else (1 - beta1) * grad)
        states += [(momentum, m, MOMENTUM)]
    if second is None:
        return m, states
    square = grad * grad if second.dim() == 2 else (grad * grad).mean(1)
    if momentum is None:
        v = second.to(grad.dtype) + square
        c1 = c2 = torch.ones_like(beta1)
    else:
        v = beta2 * second.to(grad.dtype) + (1 - beta2) * square
        c1, c2 = ((1 - beta.double() ** steps.double()).to(grad.dtype) for beta in (beta1, beta2))
    states += [(second, v, SECOND)]
    wide = v if v.dim() == 2 else v[:, None]
    return m / c1 / ((wide / c2).sqrt() + eps), states


def update_rows_at_(
    weight: Tensor,
    rows: Tensor,
    grad: Tensor,
    hyper: Tensor,
    counter: Tensor,
    apply: Tensor,
    *,
    momentum: Tensor | None = None,
    second: Tensor | None = None,
    kahan: Tensor | None = None,
    row_step: Tensor | None = None,
    row_decay: Tensor | None = None,
    decay_sum: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_offset: int = 0,
    decoupled: bool = False,
) -> None:
    """Update rows of a table [n, D] from their gradient [N, D].

    Args:
        weight, momentum, second, kahan, row_step, row_decay, row_scale: whole, as long as the
        table. rows: int64 [N], unique; those from n on are fill. grad: [N, D] fp32 (or fp64).
        hyper, counter, decay_sum, row_offset, decoupled: as in `update_rows`. apply: bool []; False
        leaves every tensor as it was.
    """
    real = rows < weight.shape[0]
    rows, grad = rows[real], grad[real]
    whole = (momentum, second, kahan, row_step, row_decay, row_scale)
    w, parts = weight[rows], [None if s is None else s[rows] for s in whole]
    m, v, k, t, r, s = parts
    writes = update_rows(
        w,
        grad,
        hyper,
        counter,
        rows + row_offset,
        m,
        v,
        k,
        decoupled,
        row_step=t,
        row_decay=r,
        decay_sum=decay_sum,
        row_scale=s,
    )
    value = {id(old): new for old, new in writes}
    for state, old in zip((weight, *whole), (w, *parts), strict=True):
        if state is not None and old is not None:
            state[rows] = torch.where(apply, value[id(old)], old)
