"""Compiles a Triton kernel for a card that is not here, and reads what the compiler says of it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import sass
from benchmarks.sass_launch import compile_here

ARCHES = {"sm_80": 80, "sm_90a": 90}
E4M3_ARCHES = {"sm_89": 89, "sm_90a": 90}  # Triton has no e4m3 below sm_89
NEWER = {"sm_100a": 100}  # compiled, so that such cards are not refused; not tuned for
# Shared memory of one block, in bytes: sm_86 and sm_89 have the least of those served, sm_90 the
# most.
SMALL, LARGE = 99 << 10, 227 << 10
POINTER = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


@dataclass
class Compiled:
    """What one kernel needs on one architecture."""

    arch: str
    warps: int
    registers: int
    stack: int
    local: int
    shared: int  # bytes, static and dynamic
    ptx: str
    cubin: bytes

    @cached_property
    def code(self) -> sass.Code:
        """Its machine code."""
        (code,) = sass.disassemble(self.cubin).values()
        return code

    @property
    def occupancy(self) -> int:
        """Blocks that a multiprocessor holds at a time."""
        return sass.occupancy(self.registers, self.shared, self.warps, self.arch)

    def count(self, trips: sass.Trips | None = None) -> sass.Counts:
        """What one warp executes, loops weighted by their trips."""
        return self.code.count(trips)

    @property
    def wgmma(self) -> bool:
        """Whether its products run on the tensor cores of sm_90a."""
        return "wgmma" in self.ptx

    @property
    def mma(self) -> bool:
        """Whether its products run on any tensor cores."""
        return self.wgmma or "mma.sync" in self.ptx


def compile_kernel(
    kernel: Any,
    arch: str,
    arguments: dict[str, torch.dtype | str | None],
    constants: dict[str, Any],
    *,
    divisible: tuple[str, ...] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    **options: Any,
) -> Compiled:
    """Compiles for one architecture, as the launcher would for such arguments.

    Args:
        kernel: a @triton.jit function.
        arch: "sm_80", "sm_89", "sm_90a" or "sm_100a".
        arguments: by name, in any order: a dtype for a pointer to it, "i32", "i64" or "fp32" for a
            number, None for an absent tensor.
        constants: the constexpr arguments.
        divisible: numbers that are multiples of 16; every pointer is, as torch allocates.
    """
    absent = {name for name, kind in arguments.items() if kind is None}
    signature = {
        n: "constexpr" if n in constants or n in absent else POINTER.get(arguments[n], arguments[n])
        for n in kernel.arg_names
    }
    pointers = {n for n, kind in signature.items() if kind.startswith("*")}
    attributes = {
        (kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in pointers | set(divisible)
    }
    source = ASTSource(kernel, signature, constants | dict.fromkeys(absent), attributes)
    options |= {"num_warps": num_warps, "num_stages": num_stages}
    key = (source.hash(), arch, str(sorted(options.items())))
    if key not in _compiled:
        _compiled[key] = _build(source, arch, options)
    return _compiled[key]


_compiled: dict[tuple[str, str, str], Compiled] = {}  # of this process: some tests ask alike


def _build(source: ASTSource, arch: str, options: dict[str, Any]) -> Compiled:
    target = GPUTarget("cuda", (ARCHES | E4M3_ARCHES | NEWER)[arch], 32)
    built = compile_here(source, target, options)
    needs = sass.resources(built.asm["cubin"])
    assert needs, "no kernel in the cubin"
    worst = {
        key: max(getattr(n, key) for n in needs.values())
        for key in ("registers", "stack", "local", "shared")
    }
    worst["shared"] = max(worst["shared"], built.metadata.shared)
    return Compiled(
        arch, options["num_warps"], **worst, ptx=built.asm["ptx"], cubin=built.asm["cubin"]
    )
