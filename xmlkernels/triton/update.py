"""The update of table rows on the GPU; see `xmlkernels.reference.update`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton import common
from xmlkernels.triton.hyper import BETA1, BETA2, DECAY, EPSILON, LR

# A card's own approximations, to 2^-22.9 of their values (PTX ISA).
_RECIPROCAL = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
_INVERSE_ROOT = tl.constexpr("rsqrt.approx.ftz.f32 $0, $1;")


@triton.jit
def _correct_biases(hyper, counter, out):
    """Write the numbers of `bias_corrections`."""
    beta1, beta2 = tl.load(hyper + BETA1).to(tl.float64), tl.load(hyper + BETA2).to(tl.float64)
    power1, power2 = beta1, beta2
    left = tl.load(counter + 1)  # powers of t + 1: the first factor is there
    while left > 0:
        odd = left % 2 == 1
        power1, power2 = (
            tl.where(odd, power1 * beta1, power1),
            tl.where(odd, power2 * beta2, power2),
        )
        beta1, beta2 = beta1 * beta1, beta2 * beta2
        left = left // 2
    lr = tl.load(hyper + LR).to(tl.float64)
    tl.store(out, (lr / (1.0 - power1)).to(tl.float32))
    tl.store(out + 1, (1.0 / tl.sqrt(1.0 - power2)).to(tl.float32))


def bias_corrections(hyper: Tensor, counter: Tensor) -> Tensor:
    """Return what Adam's bias corrections make of a step, fp32 [2], without a host sync.

    lr / (1 - beta1^t), and 1 / sqrt(1 - beta2^t): no weight divides by them. In float64, as the
    reference does, and in one launch.
    """
    out = torch.empty(2, dtype=torch.float32, device=hyper.device)
    _correct_biases[(1,)](hyper, counter, out, num_warps=1, **common.LAUNCH)
    return out


@triton.jit
def _approximation(x, INSTRUCTION: tl.constexpr):
    """Return what one of the card's approximations gives for x."""
    return tl.inline_asm_elementwise(
        INSTRUCTION, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def reciprocal(x):
    """Return about 1 / x."""
    if common.INTERPRETED:
        out = 1.0 / x
    else:
        out = _approximation(x, _RECIPROCAL)
    return out


@triton.jit
def inverse_root(x):
    """Return about 1 / sqrt(x)."""
    if common.INTERPRETED:
        out = 1.0 / tl.sqrt(x)
    else:
        out = _approximation(x, _INVERSE_ROOT)
    return out


@triton.jit
def divide(a, b, inverse):
    """Return a / b from about 1 / b: within 0.51 units, and exactly where fp32 holds it.

    It has a third of the instructions of a division that rounds as IEEE does.
    """
    q = a * inverse
    return tl.fma(tl.fma(q * -1.0, b, a), inverse, q)


@triton.jit
def refine_root(x, inverse):
    """Return sqrt(x) from about 1 / sqrt(x), as precise as `divide`."""
    s = x * inverse
    return tl.fma(tl.fma(s * -1.0, s, x), 0.5 * inverse, s)


@triton.jit
def root_of(x):
    """Return sqrt(x) of a second moment x >= 0, which may have overflowed.

    Below the normal numbers, where the root is under 1.1e-19, it is only small.
    """
    x = tl.minimum(x, common.largest(tl.float32))
    return refine_root(x, inverse_root(tl.maximum(x, 1.1754943508222875e-38)))


@triton.jit
def put(target, at, mask, place, column, value):
    """Store a tile: where mask is true, or by a descriptor from (place, column) on."""
    if place is None:
        tl.store(target + at, value, mask=mask)
    else:
        target.store([place, column], value)


@triton.jit
def load_numbers(hyper, counter, correction):
    """Load the numbers of a step: see `update_tile`; the last four are for Adam."""
    seed, step = tl.load(counter), tl.load(counter + 1)
    lr, decay, beta1 = tl.load(hyper + LR), tl.load(hyper + DECAY), tl.load(hyper + BETA1)
    beta2, eps, rate, unbias = 0.0, 0.0, 0.0, 0.0
    if correction is not None:
        beta2, eps = tl.load(hyper + BETA2), tl.load(hyper + EPSILON)
        rate, unbias = tl.load(correction), tl.load(correction + 1)
    return seed, step, lr, decay, beta1, beta2, eps, rate, unbias


@triton.jit
def update_tile(
    weight,
    momentum,
    second,
    kahan,
    row_scale,
    hyper,
    counter,
    correction,
    at,
    mask,
    row_mask,
    grad,
    rows,
    first_column,
    COLUMNS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    EMULATED: tl.constexpr,
    row_moment=None,
    loaded=None,
    place=None,
    numbers=None,
):
    """Update a tile of table rows in place from its gradient.

    weight, momentum, second, kahan: pointers to which the offsets `at` [R, COLUMNS] are added;
        absent ones are None.
    grad: fp32 [R, COLUMNS], already scaled. rows: int64 [R], global; first_column: a multiple of 8.
    row_scale: pointers [R] to the rows' scales (e4m3 tables, without kahan), powers of two from
        2^-100 to 2^100; behind each stands the largest |value| stored. grad is 0 in columns where
        mask is false.
    correction: fp32 [2] of `bias_corrections`, with `second` alone. row_moment: fp32 [R], the
    rows' second moments after this step, where `second` has one for each row: the caller has formed
    and stored them. Nothing is read or written where mask is false, nor at row_scale where row_mask
    is. loaded: the weights [R, COLUMNS], where the caller has read them. place: None, or the first
    row, with `weight` a descriptor of tiles. numbers: of `load_numbers`, by a caller whose loop has
    stores that the compiler takes no load out of.
    """
    if loaded is None:
        loaded = tl.load(weight + at, mask=mask, other=0)
    kind_of_weight: tl.constexpr = loaded.dtype
    if numbers is None:
        numbers = load_numbers(hyper, counter, correction)
    seed, step, lr, decay, beta1, beta2, eps, rate, unbias = numbers
    keep = 1.0 - lr * decay
    if kind_of_weight != tl.float32:
        grad = common.settle(grad)
    if row_scale is not None:
        # In units of the row's scale, a power of two: what is multiplied by it is not rounded.
        unit = tl.load(row_scale, mask=row_mask, other=1.0)
        inverse = common.inverse(unit)[:, None]
        w, lr, decay = common.decode_e4m3(loaded), lr * inverse, decay * unit[:, None]
        if second is not None:
            rate *= inverse
    else:
        w = common.widen(loaded)
    if kahan is not None:
        w += common.widen(tl.load(kahan + at, mask=mask, other=0.0))
    if DECOUPLED:
        shrunk = w * keep
    else:
        shrunk = w
        grad += decay * w
    if second is not None:
        m = (
            beta1 * common.widen(tl.load(momentum + at, mask=mask, other=0.0))
            + (1.0 - beta1) * grad
        )
        if row_moment is None:
            v = (
                beta2 * common.widen(tl.load(second + at, mask=mask, other=0.0))
                + (1.0 - beta2) * grad * grad
            )
        else:
            v = row_moment[:, None]
        divisor = root_of(v) * unbias + eps
        new = shrunk - rate * divide(m, divisor, reciprocal(divisor))
        if row_moment is None:
            stored = common.to_stored(
                v,
                seed,
                step,
                rows,
                first_column,
                COLUMNS,
                common.SECOND,
                second.dtype.element_ty,
            )
            tl.store(second + at, stored, mask=mask)
        kind = momentum.dtype.element_ty
        stored = common.to_stored(m, seed, step, rows, first_column, COLUMNS, common.MOMENTUM, kind)
        tl.store(momentum + at, stored, mask=mask)
    elif momentum is not None:
        m = beta1 * common.widen(tl.load(momentum + at, mask=mask, other=0.0)) + grad
        kind = momentum.dtype.element_ty
        stored = common.to_stored(m, seed, step, rows, first_column, COLUMNS, common.MOMENTUM, kind)
        tl.store(momentum + at, stored, mask=mask)
        new = shrunk - lr * m
    else:
        new = shrunk - lr * grad
    if row_scale is not None:
        r32 = common.random32(seed, step, rows, first_column, COLUMNS, common.WEIGHT)
        code, size = common.encode_e4m3(new, r32)
        put(weight, at, mask, place, first_column, code)
        if second is not None:
            size = tl.where(mask, size, 0)  # 0 / 0 beyond the columns, where epsilon is 0
        largest = common.decode_e4m3(tl.max(size, 1).to(tl.uint8)) * unit
        # A row's columns are several programs': the maximum is the same in any order.
        grows = row_mask & (largest > tl.load(row_scale + 1, mask=row_mask, other=0.0))
        tl.atomic_max(row_scale + 1, largest, mask=grows, sem="relaxed")
    elif kahan is not None:
        limit = common.largest(kind_of_weight)
        # What saturation cuts off must not come back in the next step.
        new = tl.minimum(tl.maximum(new, -limit), limit)
        rounded = common.round_nearest(new, kind_of_weight, EMULATED)
        rest = common.round_nearest(new - common.widen(rounded), kahan.dtype.element_ty, EMULATED)
        tl.store(kahan + at, rest, mask=mask)
        put(weight, at, mask, place, first_column, rounded)
    else:
        stored = common.to_stored(
            new, seed, step, rows, first_column, COLUMNS, common.WEIGHT, kind_of_weight
        )
        put(weight, at, mask, place, first_column, stored)
