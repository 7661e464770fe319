"""What all Triton kernels share: random words, rounding, the sigmoid, the check of the batch.

The generator and the rounding are those of `xmlkernels.reference.rounding`, bit for bit. Every
conversion below fp32 is made of integer operations where the interpreter's own is wrong (fp32 ->
bf16 and e4m3) and of the hardware's elsewhere.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton import ptx

WEIGHT: tl.constexpr = tl.constexpr(0)
MOMENTUM: tl.constexpr = tl.constexpr(1)
SECOND: tl.constexpr = tl.constexpr(2)
RESCALE: tl.constexpr = tl.constexpr(3)

# Contraction to fused multiply-adds is asked for by name: Triton's default changes in 3.10.
LAUNCH = {"enable_fp_fusion": True}


def emulated() -> bool:
    """Return whether kernels run in Triton's interpreter.

    Its bf16 products and conversions need help.
    """
    return bool(triton.knobs.runtime.interpret)


def table_bits(weight: Tensor) -> Tensor:
    """Return the table as kernels take it: e4m3 as its bits, other formats as they are."""
    if weight.dtype != torch.float8_e4m3fn:
        return weight
    if not emulated() and torch.cuda.get_device_capability(weight.device) < (8, 9):
        raise NotImplementedError(
            "xmlkernels: Triton has e4m3 tables from sm_89 on only; use a bf16 table on this card"
        )
    return weight.view(torch.uint8)


def resident(device: torch.device, held: int = 2) -> int:
    """Return how many programs a card holds at a time, `held` on a multiprocessor.

    Two are held of 8 warps and 128 registers. For kernels that share out independent tiles among
    any number of programs: no result depends on it.
    """
    if device.type != "cuda":
        return 3
    return held * torch.cuda.get_device_properties(device).multi_processor_count


def power_of_2(n: int, low: int, high: int) -> int:
    """Return the smallest power of two >= n, within low and high: the side of a block."""
    return min(max(triton.next_power_of_2(max(n, 1)), low), high)


INTERPRETED: tl.constexpr = tl.constexpr(emulated())
FACTOR0, FACTOR1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
# Both halves of a product in one instruction; written in the language, the compiler takes it apart.
MULTIPLY0, MULTIPLY1 = (tl.constexpr(ptx.multiply_wide(f.value)) for f in (FACTOR0, FACTOR1))
ENCODE_E4M3 = tl.constexpr(ptx.encode_e4m3())
ROUND_BF16, ROUND_BF16_ANY = tl.constexpr(ptx.round_bf16(True)), tl.constexpr(ptx.round_bf16(False))
ROUND_FP16 = tl.constexpr(ptx.round_fp16())


@tl.core.builtin
def capability(_semantic: Any = None) -> tl.constexpr:
    """Return what a kernel is compiled for, 80 for sm_80; not in the interpreter."""
    return tl.constexpr(int(_semantic.builder.options.arch[2:].rstrip("a")))


@triton.jit
def multiply_wide(a, FACTOR: tl.constexpr, MULTIPLY: tl.constexpr):
    """Return the low and the high 32 bits of a product of uint32."""
    if INTERPRETED:
        low, high = a * FACTOR, tl.umulhi(a, FACTOR)
    else:
        low, high = tl.inline_asm_elementwise(
            MULTIPLY, "=r,=r,r", [a], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1
        )
    return low, high


@triton.jit
def philox(k0, k1, c0, c1, c2, c3):
    """Philox-4x32-10: four uint32 words for key (k0, k1) and counter (c0, c1, c2, c3).

    The operands are uint32 and broadcast.
    """
    for _ in tl.static_range(10):
        low0, high0 = multiply_wide(c0, FACTOR0, MULTIPLY0)
        low1, high1 = multiply_wide(c2, FACTOR1, MULTIPLY1)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def row_words(seed, step, rows, first_group, GROUPS: tl.constexpr, STREAM: tl.constexpr):
    """Draw four uint32 [R, GROUPS] words of some rows for column groups from first_group on.

    seed, step: int64 scalars. rows: int64 [R], global.
    """
    group = (first_group + tl.arange(0, GROUPS)).to(tl.uint32)[None, :]
    # Full tensors from the start: the high products of a broadcast operand would be of another
    # shape.
    zero = tl.zeros([rows.shape[0], GROUPS], dtype=tl.uint32)
    low = rows.to(tl.uint32)[:, None] + zero
    high = (rows >> 32).to(tl.uint32)[:, None] + zero
    return philox(seed.to(tl.uint32), step.to(tl.uint32), low, high, group + zero, zero + STREAM)


@triton.jit
def random16(seed, step, rows, first_column, COLUMNS: tl.constexpr, STREAM: tl.constexpr):
    """Draw 16 bits per weight, as uint16 [R, COLUMNS].

    first_column and COLUMNS are multiples of 8. One draw serves 8 columns: column c takes half c %
    2 (low first) of word (c % 8) // 2 of draw c // 8.
    """
    w0, w1, w2, w3 = row_words(seed, step, rows, first_column // 8, COLUMNS // 8, STREAM)
    # Last axes: high and low bit of the word's number.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16))
    return tl.reshape(halves, [rows.shape[0], COLUMNS])


@triton.jit
def random32(seed, step, rows, first_column, COLUMNS: tl.constexpr, STREAM: tl.constexpr):
    """Draw 32 bits per weight (e4m3 tables), as uint32 [R, COLUMNS].

    first_column and COLUMNS are multiples of 4. One draw serves 4 columns: column c takes word c %
    4 of draw c // 4.
    """
    w0, w1, w2, w3 = row_words(seed, step, rows, first_column // 4, COLUMNS // 4, STREAM)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(words, [rows.shape[0], COLUMNS])


@triton.jit
def round_stochastic(value, r16, DTYPE: tl.constexpr):
    """Round fp32 to bf16 or fp16 with 16 random bits (uint16).

    Without bias, subnormals included; saturates.
    """
    tl.static_assert(DTYPE == tl.bfloat16 or DTYPE == tl.float16)
    bits = value.to(tl.uint32, bitcast=True)
    if INTERPRETED:
        half = _round_stochastic(bits, r16.to(tl.uint32), DTYPE)
    elif DTYPE == tl.float16:
        half = tl.inline_asm_elementwise(
            ROUND_FP16, "=r,r,r,r", [bits, r16], dtype=tl.uint16, is_pure=True, pack=2
        )
    elif capability() >= 86:
        half = tl.inline_asm_elementwise(
            ROUND_BF16, "=r,r,r,r", [bits, r16], dtype=tl.uint16, is_pure=True, pack=2
        )
    else:
        half = tl.inline_asm_elementwise(
            ROUND_BF16_ANY, "=r,r,r,r", [bits, r16], dtype=tl.uint16, is_pure=True, pack=2
        )
    return half.to(DTYPE, bitcast=True)


@triton.jit
def _round_stochastic(bits, r16, DTYPE: tl.constexpr):
    """Return the same in the language's integers: the bits, from bits and uint32."""
    magnitude, sign = bits & 0x7FFFFFFF, (bits >> 16) & 0x8000
    if DTYPE == tl.bfloat16:
        half = tl.minimum((magnitude + r16) >> 16, 0x7F7F)
    else:
        exponent = (magnitude >> 23).to(tl.int32)
        # Units of 2^-13 of the result's last place. Below 2^-14 that place stays 2^-24, so that
        # more bits fall away; from 27 on they count for less than 2^-16 of it.
        shift = tl.where(exponent >= 113, 0, tl.minimum(113 - exponent, 27)).to(tl.uint32)
        mantissa = tl.where(exponent > 0, (magnitude & 0x7FFFFF) | 0x800000, 0)
        units = (((mantissa << 3) >> shift) + r16) >> 16
        normal = tl.maximum(exponent - 113, 0).to(tl.uint32) << 10
        half = tl.minimum(normal + units, 0x7BFF)
    return (half | sign).to(tl.uint16)


@triton.jit
def encode_e4m3(value, r32):
    """Round fp32 to the bits of e4m3 (uint8) with 32 random bits (uint32).

    Without bias, subnormals included; saturates at 448. Also returns the magnitude of the bits
    (uint16), whose order is that of sizes.
    """
    bits = value.to(tl.uint32, bitcast=True)
    if INTERPRETED:
        size = _round_e4m3(bits, r32)
        code = (size | ((bits >> 24) & 0x80).to(tl.uint16)).to(tl.uint8)
    else:
        code, size = tl.inline_asm_elementwise(
            ENCODE_E4M3,
            "=r,=r,=r,r,r,r,r,r,r,r,r",
            [bits, r32],
            dtype=(tl.uint8, tl.uint16),
            is_pure=True,
            pack=4,
        )
    return code, size


@triton.jit
def _round_e4m3(bits, r32):
    """Return the magnitude that `encode_e4m3` does, in the language's integers."""
    exponent = ((bits << 1) >> 24).to(tl.int32)
    # In units of the result's last place, 2^-32 of it the last bit: that place stays 2^-9 below
    # 2^-6, and nothing is left of what is 36 places smaller.
    mantissa = ((bits << 7) & 0x3FFFFFFF) | 0x40000000
    right = tl.minimum(tl.maximum(148 - exponent, 27), 63)
    fixed = (mantissa.to(tl.uint64) << 32) >> right.to(tl.uint64)
    units = ((fixed + r32) >> 32).to(tl.int32)
    return tl.minimum(units + (tl.maximum(exponent - 121, 0) << 3), 0x7E).to(tl.uint16)


@triton.jit
def decode_e4m3(code, HARDWARE: tl.constexpr = True):
    """Convert the bits of e4m3 (uint8) to fp32, exactly; no code is NaN.

    HARDWARE: from sm_89 on alone.
    """
    if INTERPRETED or not HARDWARE:
        c = code.to(tl.int32)
        exponent = (c >> 3) & 15
        normal = ((exponent + 120) << 23) | ((c & 7) << 20)
        small = ((c & 7).to(tl.float32) * 0.001953125).to(tl.int32, bitcast=True)
        # The sign as a bit: negation is 0 - x, which loses it at 0.
        out = tl.where(exponent > 0, normal, small) | ((c & 0x80) << 24)
        out = out.to(tl.float32, bitcast=True)
    else:
        out = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return out


@triton.jit
def settle(value):
    """Return a tile [R, C] in a layout in which a thread holds four columns of a row or more."""
    R: tl.constexpr = value.shape[0]
    C: tl.constexpr = value.shape[1]
    even, odd = tl.split(tl.reshape(value, [R, C // 4, 2, 2]))
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), [R, C])


@triton.jit
def inverse(scale):
    """Return 1 / scale for powers of two in fp32, exactly; both are normal numbers."""
    return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def operand(value, KIND: tl.constexpr, EMULATED: tl.constexpr):
    """Return a loaded piece of a table as operand of a product.

    e4m3 (uint8 bits) becomes KIND, exactly; the others stay as they are.
    """
    if value.dtype == tl.uint8:
        if EMULATED:
            out = round_nearest(decode_e4m3(value), KIND, True)
        elif capability() >= 90:
            out = value.to(tl.float8e4nv, bitcast=True).to(KIND)
        else:  # by way of fp32, as no card below converts fp16 to bf16
            out = decode_e4m3(value).to(KIND)
    else:
        out = value
    return out


@triton.jit
def scaled(value, unit, KIND: tl.constexpr, EMULATED: tl.constexpr):
    """Return the same, with e4m3 rows [R, ...] times their scales unit [R]: exact, too.

    unit is None for other formats.
    """
    out = operand(value, KIND, EMULATED)
    if unit is not None:
        out = round_nearest(widen(out) * unit[:, None], KIND, EMULATED)
    return out


@triton.jit
def widen(value):
    """Convert bf16, fp16 or fp32 to fp32, exactly.

    The interpreter's own conversion loses subnormals of bf16.
    """
    if value.dtype == tl.bfloat16:
        out = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        out = value.to(tl.float32)
    return out


@triton.jit
def largest(DTYPE: tl.constexpr):
    """Return the largest finite number of a format."""
    if DTYPE == tl.bfloat16:
        return 3.3895313892515355e38
    elif DTYPE == tl.float16:
        return 65504.0
    else:
        return 3.4028234663852886e38


@triton.jit
def round_nearest(value, DTYPE: tl.constexpr, EMULATED: tl.constexpr):
    """fp32 to bf16, fp16 or fp32, to nearest (ties to even), saturating."""
    limit = largest(DTYPE)
    value = tl.minimum(tl.maximum(value, -limit), limit)
    if DTYPE == tl.bfloat16 and EMULATED:
        bits = value.to(tl.uint32, bitcast=True)
        out = (
            ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        )
    else:
        out = value.to(DTYPE)
    return out


@triton.jit
def to_stored(
    value,
    seed,
    step,
    rows,
    first_column,
    COLUMNS: tl.constexpr,
    STREAM: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Round fp32 [R, COLUMNS] to a table's format: below fp32 without bias; saturated.

    rows: int64 [R], global.
    """
    if DTYPE == tl.float32:
        out = tl.minimum(tl.maximum(value, -largest(tl.float32)), largest(tl.float32))
    else:
        out = round_stochastic(
            value, random16(seed, step, rows, first_column, COLUMNS, STREAM), DTYPE
        )
    return out


@triton.jit
def dot(a, b, acc, EMULATED: tl.constexpr):
    """Return acc + a b in fp32.

    fp32 operands are multiplied as fp32, not tf32; the interpreter multiplies bf16 as fp32.
    """
    if EMULATED and a.dtype == tl.bfloat16:
        acc = tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    elif a.dtype == tl.float32:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def sigmoid_and_tail(z):
    """(sigmoid(z), exp(-|z|)): exact at 0, no overflow anywhere."""
    tail = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, tail) / (1.0 + tail), tail


@triton.jit
def softplus(z, tail):
    """log(1 + exp(z)) with tail = exp(-|z|); relative precision where it is small, too."""
    one = 1.0 + tail
    # log(1 + t) = log(u) t / (u - 1) for u = 1 + t as rounded: the rounding error of u cancels.
    log = tl.where(one == 1.0, tail, tl.log(one) * (tail / tl.where(one == 1.0, 1.0, one - 1.0)))
    return tl.maximum(z, 0.0) + log


@triton.jit
def _prepare_batch(
    x, out, flag, count, COPY: tl.constexpr, EMULATED: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = widen(tl.load(x + at, mask=at < count, other=0.0))
    finite = (value.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000
    # Programs that store all store the same value.
    tl.store(flag, 1, mask=tl.min(finite.to(tl.int32), 0) == 0)
    if COPY:
        tl.store(out + at, round_nearest(value, out.dtype.element_ty, EMULATED), mask=at < count)


def prepare_batch(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the batch in a product's format, and whether it may be used; no host sync.

    Args:
        x: [B, D] fp32, bf16 or fp16, contiguous.
        dtype: the format of the result; x is rounded to nearest and saturated. Where formats agree
            x itself is returned.

    Returns:
        x: [B, D] of `dtype`.
        flag: int32 [1], 0 when every value of x is finite, else 1; kernels read it on the device.
    """
    flag = torch.zeros(1, dtype=torch.int32, device=x.device)
    out = x if x.dtype == dtype else torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        grid = (triton.cdiv(x.numel(), 1024),)
        _prepare_batch[grid](
            x, out, flag, x.numel(), COPY=out is not x, EMULATED=emulated(), BLOCK=1024, **LAUNCH
        )
    return out, flag
