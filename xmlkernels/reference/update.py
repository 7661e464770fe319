"""The update that every in-place op applies to table rows: SGD, SGD with momentum, or Adam."""

import torch
from torch import Tensor

from xmlkernels.reference.rounding import MOMENTUM, SECOND, WEIGHT, saturate, store


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
) -> list[tuple[Tensor, Tensor]]:
    """New values of table rows, without writing them.

    Args:
        weight: [N, D], the rows to update.
        grad: [N, D] fp32 (or fp64), their gradient.
        hyper: [7] lr, decay, momentum or beta1, beta2, epsilon, scale, dx_scale.
        counter: int64 [2] seed, step (counted from 0).
        rows: int64 [N], their global numbers: they choose the random words.
        momentum: [N, D]; alone it is SGD's momentum (dampening 0, no Nesterov); with `second` it is Adam's first moment.
        second: [N, D], Adam's second moment.
        kahan: [N, D], what rounding left over; given, the store rounds to nearest and keeps the rest.
        decoupled: decay shrinks the weight (AdamW) instead of entering the gradient (L2).

    Returns:
        Pairs (tensor, new value) for each of weight, momentum, second, kahan that is given.
    """
    lr, decay, beta1, beta2, eps = hyper[:5].to(grad.dtype).unbind()
    w = weight.to(grad.dtype)
    if kahan is not None:
        w = w + kahan.to(grad.dtype)
    out = []
    shrunk = w * (1 - lr * decay) if decoupled else w
    if not decoupled:
        grad = grad + decay * w
    if second is not None:
        assert momentum is not None  # checked by the ops
        m = beta1 * momentum.to(grad.dtype) + (1 - beta1) * grad
        v = beta2 * second.to(grad.dtype) + (1 - beta2) * grad * grad
        t = (counter[1] + 1).to(torch.float64)
        c1 = (1 - beta1.to(torch.float64) ** t).to(grad.dtype)
        c2 = (1 - beta2.to(torch.float64) ** t).to(grad.dtype)
        new = shrunk - lr * (m / c1) / ((v / c2).sqrt() + eps)
        out += [(momentum, store(m, momentum.dtype, counter, rows, MOMENTUM))]
        out += [(second, store(v, second.dtype, counter, rows, SECOND))]
    elif momentum is not None:
        m = beta1 * momentum.to(grad.dtype) + grad
        new = shrunk - lr * m
        out += [(momentum, store(m, momentum.dtype, counter, rows, MOMENTUM))]
    else:
        new = shrunk - lr * grad
    if kahan is None:
        return [(weight, store(new, weight.dtype, counter, rows, WEIGHT)), *out]
    limit = torch.finfo(weight.dtype).max
    new = new.clamp(-limit, limit)  # what saturation cuts off must not come back in the next step
    rounded = new.to(weight.dtype)
    rest = saturate(new - rounded.to(new.dtype), kahan.dtype)
    return [(weight, rounded), (kahan, rest), *out]
