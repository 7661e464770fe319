"""Launches that ops really make, recorded without a card and compiled as Triton would for one.

The launchers run on CPU tensors that are never touched. Trips of loops follow from the arguments
of a launch where the source says so, and are given by name where they do not.
"""

import ast
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import sass
from benchmarks.sass_loops import branches_of

CACHE = Path(__file__).resolve().parents[1] / "build" / "triton"
KINDS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
Trips = float | Callable[[Mapping[str, Any]], float | None]
"""Trips of a loop, or a function of the kernel's arguments that gives them; None: not so."""
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


@dataclass
class Launch:
    """One launch of a Triton kernel: its arguments by name, options and grid."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    blocks: int


@contextmanager
def recorded(arch: str = "sm_90a") -> Iterator[list[Launch]]:
    """Record launches instead of making them, as on a card of an architecture."""
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        named = {p.name: given.get(p.name, p.default) for p in self.params}
        options = {k: v for k, v in kwargs.items() if k in OPTIONS and k not in named}
        size = grid(named) if callable(grid) else grid
        found.append(Launch(self, named, options, math.prod(size)))

    version = divmod(int(arch[3:].rstrip("a")), 10)
    capability = mock.patch.object(torch.cuda, "get_device_capability", lambda *a: version)
    with mock.patch.object(JITFunction, "run", run), capability:
        yield found


def build(launch: Launch, arch: str) -> Any:
    """Compile a launch as Triton would: numbers 1 and multiples of 16 are specialized."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], multiple = "*" + KINDS[value.dtype], value.data_ptr()
        elif isinstance(value, TensorDescriptor):
            kind = KINDS[value.base.dtype]
            signature[name], multiple = f"tensordesc<{kind}{list(value.block_shape)}>", 1
        elif isinstance(value, int):
            signature[name], multiple = "i32" if abs(value) < 1 << 31 else "i64", value
        else:
            signature[name], multiple = "fp32", 1
        if multiple % 16 == 0:
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", int(arch[3:].rstrip("a")), 32)
    return compile_here(source, target, launch.options)


def compile_here(source: Any, target: Any, options: dict[str, Any]) -> Any:
    """Compile for a card, with a cache of this tree alone.

    Loops are known by their lines: what a user's cache holds may be compiled from another copy of
    the sources, which it names and which may be gone.
    """
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(CACHE)
        return triton.compile(source, target=target, options=options)


def find_trips(
    code: sass.Code, launch: Launch, given: Mapping[str, Trips]
) -> dict[str | tuple[int, ...], float]:
    """Return the trips of every loop: given ones, or those of a range over the arguments.

    Where the compiler made one loop of two, both stand in a key; see `sass.Trips`. With them stand
    the given shares of the branches that the code has.

    Raises:
        ValueError: a loop's trips are not given, and its range is not of the arguments alone.
    """
    out: dict[str | tuple[int, ...], float] = {}
    numbers = {k: v for k, v in launch.arguments.items() if isinstance(v, int)}

    def told(key: str) -> float | None:
        trips = given.get(key)
        return trips(launch.arguments) if callable(trips) else trips

    left = {loop.statement or "" for loop in code.loops}
    for key in (key for key in given if " + " in key):
        pair = key.split(" + ")
        if len(left.intersection(pair)) == 1 and (inner := told(key)) is not None:
            out |= {key: inner, pair[0]: told(pair[0]) or 0.0}
            left.difference_update(pair)
    for loop in (loop for loop in code.loops if (loop.statement or "") in left):
        statement = loop.statement or ""
        trips = told(statement)
        if trips is None and loop.source is not None:
            trips = _range_of(loop.source, numbers)
        if trips is None:
            raise ValueError(f"{code.name}: no trips for {statement or loop.path!r}")
        out[statement] = trips
    branches = {key for i in code.instructions for key in branches_of(i.source)}
    return out | {key: told(key) or 0.0 for key in given if key in branches}


def _range_of(source: tuple[str, str, int], numbers: Mapping[str, int]) -> int | None:
    with open(source[0], encoding="utf-8") as file:
        nodes = ast.walk(ast.parse(file.read()))
    at = [n for n in nodes if isinstance(n, ast.For) and n.lineno == source[2]]
    if not at or not isinstance(at[0].iter, ast.Call) or ast.unparse(at[0].iter.func) != "range":
        return None
    try:
        bounds = [
            eval(compile(ast.Expression(a), "range", "eval"), {}, dict(numbers))
            for a in at[0].iter.args
        ]
    except (NameError, AttributeError, TypeError):
        return None
    return len(range(*bounds))
