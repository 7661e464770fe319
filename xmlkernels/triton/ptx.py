"""Pieces of PTX for what Triton's language cannot say in as few instructions.

Each is told of one element, or of the two or four that share a register; `tests/compile/ptx.py`
runs the same text on numbers and compares it with the references.
"""


def _block(names: str, *lines: str) -> str:
    """Return a block with 32-bit registers of its own, in the braces of a template."""
    return "{ .reg .b32 " + names + "; " + " ".join(line + ";" for line in lines) + " }"


def multiply_wide(factor: int) -> str:
    """Return the product of a uint32 and a constant, as low half and high half."""
    return f"{{ .reg .u64 wide; mul.wide.u32 wide, $2, {factor:#x}; mov.b64 {{$0, $1}}, wide; }}"


def _split(i: int, value: str, scale: int, fraction: int) -> list[str]:
    """Return |value| in units of a format's last place: p{i}, and what is left of it, f{i}.

    A product with 2^-scale puts the format's subnormals among those of fp32, so that the multiplier
    aligns both, and cuts off what is too small. What it cut off is exact, and counts `fraction`
    bits of a subnormal's unit once it is a subnormal as well.
    """
    down, up = (127 - scale) << 23, (127 + scale) << 23 | 1 << 31
    rest = (127 - 149 + fraction) << 23
    return [
        f"mul.rz.f32 p{i}, {value}, 0f{down:08X}",
        f"fma.rn.f32 f{i}, p{i}, 0f{up:08X}, {value}",
        f"mul.rz.f32 f{i}, f{i}, 0f{rest:08X}",
    ]


def encode_e4m3() -> str:
    """Return four fp32 ($3 to $6) as e4m3 in $0, with 32 random bits each ($7 to $10).

    $1 and $2 get the magnitudes of their bits, as pairs of 16.
    """
    lines = []
    for i in range(4):
        lines += [f"abs.f32 a{i}, ${3 + i}", *_split(i, f"a{i}", 120, 41)]
        lines += [
            # 20 bits of the fraction, 12 more, and the random ones: their sum's carry counts.
            f"mad.lo.u32 f{i}, p{i}, 4096, f{i}",
            f"add.cc.u32 f{i}, f{i}, ${7 + i}",
            f"shr.u32 p{i}, p{i}, 20",
            f"addc.u32 p{i}, p{i}, 0",
        ]
    lines += [
        # As fp16, whose order is that of integers, NaN and infinity of fp32 are subnormals, too.
        *("mov.b32 s0, 0x007E007E", "prmt.b32 $1, p0, p1, 0x5410", "min.f16x2 $1, $1, s0"),
        *("prmt.b32 $2, p2, p3, 0x5410", "min.f16x2 $2, $2, s0", "prmt.b32 $0, $1, $2, 0x6420"),
        *("prmt.b32 s0, $3, $4, 0x0073", "prmt.b32 s1, $5, $6, 0x0073"),
        *("prmt.b32 s0, s0, s1, 0x5410", "lop3.b32 $0, s0, 0x80808080, $0, 0xEA"),
    ]
    names = ", ".join(f"{name}{i}" for name in "apf" for i in range(4)) + ", s0, s1"
    return _block(names, *lines)


def round_bf16(xorsign: bool) -> str:
    """Return two fp32 ($1, $2) as bf16 in $0, with 16 random bits each in $3.

    xorsign: from sm_86 on alone, one instruction less.
    """
    lines = [
        *("and.b32 a, $3, 0xFFFF", "add.u32 a, a, $1", "shr.u32 b, $3, 16", "add.u32 b, b, $2"),
        # The sum carries into the sign of a NaN alone.
        *("prmt.b32 $0, a, b, 0x7632", "mov.b32 a, 0x7F7F7F7F"),
    ]
    if xorsign:
        lines += ["min.xorsign.abs.bf16x2 $0, $0, a"]
    else:
        lines += ["abs.bf16x2 b, $0", "min.bf16x2 b, b, a", "lop3.b32 $0, $0, 0x80008000, b, 0xEA"]
    return _block("a, b", *lines)


def round_fp16() -> str:
    """Return two fp32 ($1, $2) as fp16 in $0, with 16 random bits each in $3."""
    lines = []
    for i in range(2):
        lines += [f"abs.f32 a{i}, ${1 + i}", f"min.f32 a{i}, a{i}, 0f477FE000"]
        lines += [*_split(i, f"a{i}", 112, 40), f"mad.lo.u32 p{i}, p{i}, 8, f{i}"]
    lines += [
        *("and.b32 f0, $3, 0xFFFF", "add.u32 p0, p0, f0"),
        *("shr.u32 f1, $3, 16", "add.u32 p1, p1, f1"),
        *("prmt.b32 p0, p0, p1, 0x7632", "prmt.b32 f0, $1, $2, 0x7632"),
        "lop3.b32 $0, f0, 0x80008000, p0, 0xEA",
    ]
    return _block("a0, a1, p0, p1, f0, f1", *lines)
