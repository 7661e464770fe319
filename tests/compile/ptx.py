"""Runs the pieces of PTX that `xmlkernels.triton.ptx` makes, on tensors of registers.

By the PTX manual, for the instructions that the pieces use and no others. Registers are int64
tensors of 32-bit words, as torch has no unsigned arithmetic.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def as_float(word: Tensor) -> Tensor:
    """Return the fp32 numbers that words stand for, in fp64."""
    signed = torch.where(word >= 1 << 31, word - (1 << 32), word)
    return signed.to(torch.int32).view(torch.float32).double()


def as_word(value: Tensor) -> Tensor:
    """Return the bits of fp64 numbers that fp32 holds; every NaN becomes the canonical one."""
    word = value.float().view(torch.int32).to(torch.int64) & MASK
    return torch.where(value.isnan(), 0x7FFFFFFF, word)


def toward_zero(value: Tensor) -> Tensor:
    """Round fp64 to fp32 toward zero, subnormals included."""
    near = value.float()
    less = torch.nextafter(near, torch.zeros(()))
    return torch.where(near.double().abs() > value.abs(), less, near).double()


def halves(word: Tensor, kind: torch.dtype) -> Tensor:
    """Return a word's two numbers of 16 bits, fp32 [..., 2], low first."""
    both = torch.stack([word & 0xFFFF, word >> 16], -1)
    return both.to(torch.uint16).view(torch.int16).view(kind).float()


def lesser(x: Tensor, y: Tensor) -> Tensor:
    """Return the smaller of two, the other where one is NaN; fmin minds whether a NaN is quiet."""
    return torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.minimum(x, y)))


def lower(a: Tensor, b: Tensor, kind: torch.dtype) -> Tensor:
    """Return pairs of the smaller of two numbers of 16 bits, the other where one is NaN."""
    least = (
        lesser(halves(a, kind), halves(b, kind)).to(kind).view(torch.int16).to(torch.int64) & 0xFFFF
    )
    return least[..., 0] | least[..., 1] << 16


def xorsign(a: Tensor, b: Tensor) -> Tensor:
    """Return min.xorsign.abs.bf16x2."""
    size = lower(a & 0x7FFF7FFF, b & 0x7FFF7FFF, torch.bfloat16)
    return size | ((a ^ b) & 0x80008000)


def permute(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    """Return prmt without modes: byte i of the result is the one that nibble i names."""
    pair, chosen = a | b << 32, int(selector)
    out = torch.zeros_like(a)
    for i in range(4):
        nibble = chosen >> 4 * i & 15
        assert nibble < 8, "a byte's sign is not made"
        # b's highest bit would be the sign of an int64.
        out |= (pair >> 8 * nibble & 0xFF) << 8 * i
    return out


def table(a: Tensor, b: Tensor, c: Tensor, truth: Tensor) -> Tensor:
    """Return lop3: bit by bit, what a truth table says of three."""
    out = torch.zeros_like(a)
    for i in range(8):
        if int(truth) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out & MASK


INSTRUCTIONS: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a,
    "abs.f32": lambda a: as_word(as_float(a).abs()),
    "abs.bf16x2": lambda a: a & 0x7FFF7FFF,
    "min.f32": lambda a, b: as_word(lesser(as_float(a), as_float(b))),
    "mul.rz.f32": lambda a, b: as_word(toward_zero(as_float(a) * as_float(b))),
    # In fp64 the product is exact, and the sum where fp32 has it.
    "fma.rn.f32": lambda a, b, c: as_word(as_float(a) * as_float(b) + as_float(c)),
    "and.b32": lambda a, b: a & b,
    "add.u32": lambda a, b: (a + b) & MASK,
    "mad.lo.u32": lambda a, b, c: (a * b + c) & MASK,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": permute,
    "lop3.b32": table,
    "min.f16x2": lambda a, b: lower(a, b, torch.float16),
    "min.bf16x2": lambda a, b: lower(a, b, torch.bfloat16),
    "min.xorsign.abs.bf16x2": xorsign,
}


def constant(text: str) -> Tensor:
    """Return the word of a number, or of an fp32 number's bits."""
    return torch.tensor(int(text[2:], 16) if text[:2] == "0f" else int(text, 0))


def run(text: str, operands: dict[int, Tensor]) -> dict[int, Tensor]:
    """Run a piece.

    Args:
        text: in braces, with operands $0, $1, ...
        operands: those that it reads, by number.

    Returns:
        All operands by number.
    """
    body = text.strip().removeprefix("{").removesuffix("}")
    lines = [line.strip() for line in body.split(";") if line.strip()]
    like = next(iter(operands.values()))
    registers = {f"${i}": value for i, value in operands.items()}
    names = set(lines.pop(0).removeprefix(".reg .b32 ").split(", "))
    carry = torch.zeros_like(like)
    for line in lines:
        operation, _, rest = line.partition(" ")
        target, *sources = (part.strip() for part in rest.split(","))
        assert target in names or re.fullmatch(r"\$\d+", target), line
        values = [registers[s] if s in registers else constant(s) for s in sources]
        if operation == "add.cc.u32":
            whole = values[0] + values[1]
            registers[target], carry = whole & MASK, whole >> 32
        elif operation == "addc.u32":
            registers[target] = (values[0] + values[1] + carry) & MASK
        else:
            registers[target] = INSTRUCTIONS[operation](*values).broadcast_to(like.shape)
    return {int(name[1:]): value for name, value in registers.items() if name[0] == "$"}
