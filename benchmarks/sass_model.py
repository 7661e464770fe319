"""A model of the GPU kernels, from the machine code of the launches that the ops really make.

    python benchmarks/sass_model.py [--card H200]

The launchers run on CPU tensors that are never touched; each distinct launch is compiled as Triton
would for the card, and its instructions are counted, loops by trips that follow from the shape. A
resource's time is what all blocks ask of it, spread over the card. "largest" is the longest of
them; "expected" adds half of the others, divided by the blocks that a multiprocessor holds, which
is how much of them such kernels leave uncovered. Of what TMA moves, the bytes are in no column;
neither are latencies and the gaps between launches. Nothing here is measured: all are a model.
"""

import argparse
import ast
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import sass


@dataclass(frozen=True)
class Card:
    """What a card does in a second, as read on such cards or published by NVIDIA.

    Attributes:
        multiprocessors, hertz: of the card. products: multiply-adds in bf16 of one multiprocessor
            and cycle (data sheets). memory: bytes of a large copy (H200: 4.3e12 seen; A100, H100:
            nine tenths of the data sheet). cache: bytes from L2 to all multiprocessors (published
            measurements of the H100: 5.5e12 to 9e12).
    """

    arch: str
    multiprocessors: int
    hertz: float
    products: int
    memory: float
    cache: float
    matmul: float


CARDS = {
    "H200": Card("sm_90a", 132, 1.7e9, 2048, 4.3e12, 7e12, 790e12),
    "H100": Card("sm_90a", 132, 1.7e9, 2048, 3.0e12, 7e12, 790e12),
    "A100": Card("sm_80", 108, 1.41e9, 1024, 1.8e12, 4e12, 250e12),
}
KINDS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
Trips = float | Callable[[Mapping[str, Any]], float]
"""Trips of a loop, or a function of the kernel's arguments that gives them."""
Traffic = Callable[[Mapping[str, Any]], tuple[float, float]]
"""Bytes of one launch between memory and L2, and of those that TMA moves from L2 and to it."""
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
    import triton
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
    return triton.compile(source, target=target, options=launch.options)


def find_trips(
    code: sass.Code, launch: Launch, given: Mapping[str, Trips]
) -> dict[str | tuple[int, ...], float]:
    """Return the trips of every loop: given ones, or those of a range over the arguments.

    Raises:
        ValueError: a loop's trips are not given, and its range is not of the arguments alone.
    """
    out: dict[str | tuple[int, ...], float] = {}
    numbers = {k: v for k, v in launch.arguments.items() if isinstance(v, int)}
    for loop in code.loops:
        statement = loop.statement or ""
        if statement in given:
            told = given[statement]
            out[statement] = told(launch.arguments) if callable(told) else told
        elif loop.source is not None and (trips := _range_of(loop.source, numbers)) is not None:
            out[statement] = trips
        else:
            raise ValueError(f"{code.name}: no trips for {statement or loop.path!r}")
    return out


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


@dataclass
class Line:
    """The model of all launches of one kernel: milliseconds by resource."""

    kernel: str
    launches: int
    occupancy: int
    times: dict[str, float]

    @property
    def largest(self) -> float:
        """The longest of the times."""
        return max(self.times.values())

    @property
    def expected(self) -> float:
        """The longest of a multiprocessor's, and half of its others over the blocks held.

        Memory's is a bound of it: loads are under way while blocks compute.
        """
        own = {name: t for name, t in self.times.items() if name != "memory"}
        longest = max(own.values())
        others = sum(t for name, t in own.items() if name != "ALU") - longest
        return max(longest + max(others, 0.0) / 2 / self.occupancy, self.times["memory"])


def model(
    call: Callable[[], object],
    card: Card,
    trips: Mapping[str, Trips] | None = None,
    traffic: Mapping[str, Traffic] | None = None,
) -> list[Line]:
    """Model what a call launches, kernel by kernel.

    Args:
        call: runs an op on CPU tensors.
        card: what it would run on.
        trips: of loops whose number of trips no argument tells; see `sass.Trips`.
        traffic: by kernel; one that is not named moves what its instructions do, through L2 alone.

    Raises:
        ValueError: a loop has no trips.
    """
    with recorded(card.arch) as launches:
        call()
    built: dict[str, tuple[sass.Counts, int, int]] = {}
    lines: dict[str, Line] = {}
    for launch in launches:
        name = launch.kernel.__name__
        shown = {
            k: str(v.dtype) if isinstance(v, torch.Tensor) else v
            for k, v in launch.arguments.items()
            if k not in ("first", "begin", "start")
        }
        key = f"{name} {shown} {launch.options}"
        if key not in built:
            binary = build(launch, card.arch)
            (code,) = sass.disassemble(binary.asm["cubin"]).values()
            (needs,) = sass.resources(binary.asm["cubin"]).values()
            warps, shared = binary.metadata.num_warps, binary.metadata.shared
            counts = code.count(find_trips(code, launch, trips or {}))
            held = sass.occupancy(needs.registers, shared, warps, card.arch)
            built[key] = counts, warps, held
        counts, warps, held = built[key]
        line = lines.setdefault(name, Line(name, 0, held, {}))
        line.launches += 1
        for resource, seconds in _times(counts, warps, card).items():
            total = line.times.get(resource, 0.0) + seconds * launch.blocks * 1e3
            line.times[resource] = total
        memory, cache = (traffic or {}).get(name, lambda _: (0.0, 0.0))(launch.arguments)
        line.times["memory"] = line.times.get("memory", 0.0) + memory / card.memory * 1e3
        line.times["L2"] += cache / card.cache * 1e3
    return list(lines.values())


def _times(counts: sass.Counts, warps: int, card: Card) -> dict[str, float]:
    """Seconds of the card that one block takes of each resource.

    A multiprocessor issues an instruction of four warps per cycle, half as many of integers, and
    moves 128 bytes of shared memory.
    """
    cycle = 1 / card.hertz / card.multiprocessors
    shared = sum(counts.bytes[kind] for kind in ("lds", "sts", "ldgsts")) + counts.operand_bytes
    cache = sum(counts.bytes[kind] for kind in ("ldg", "stg", "ldgsts"))
    return {
        "issue": counts.issue * warps / 4 * cycle,
        "ALU": counts.kinds["alu"] * 2 * warps / 4 * cycle,
        "tensor": counts.multiplications * warps / card.products * cycle,
        "shared": shared * warps / 128 * cycle,
        "L2": cache * warps / card.cache,
    }


def table(lines: list[Line]) -> list[str]:
    """Return the lines of a table, milliseconds; every one of them a model."""
    names = ("issue", "ALU", "tensor", "shared", "L2", "memory", "largest", "expected")
    out = [f"{'model, ms':24s} launches held " + " ".join(f"{n:>8s}" for n in names)]
    for line in lines:
        cells = [*(line.times[n] for n in names[:6]), line.largest, line.expected]
        shown = " ".join(f"{c:8.3f}" for c in cells)
        out.append(f"{line.kernel:24s} {line.launches:8d} {line.occupancy:4d} {shown}")
    return out


def bce_step(batch: int, labels: int, dtype: torch.dtype) -> Callable[[], object]:
    """Return a call of `bce_step_` whose tensors take no memory until they are touched."""
    from xmlkernels.triton.bce_step import bce_step_

    weight, x = torch.empty(labels, 768, dtype=dtype), torch.empty(batch, 768)
    row = torch.empty(5 * batch, dtype=torch.int64)
    sample = torch.empty(5 * batch, dtype=torch.int32)
    hyper, counter = torch.zeros(7), torch.zeros(2, dtype=torch.int64)
    scale = torch.empty(labels, 2) if dtype == torch.float8_e4m3fn else None
    return lambda: bce_step_(weight, x, row, sample, hyper, counter, row_scale=scale)


SHAPES = {
    "bce_step bf16 B128 L2.8M": (128, 2_812_281, torch.bfloat16),
    "bce_step bf16 B512 L1.3M": (512, 1_305_265, torch.bfloat16),
    "bce_step fp8 B128 L8.6M": (128, 8_623_847, torch.float8_e4m3fn),
}


def loops_of_data(batch: int, labels: int) -> dict[str, Trips]:
    """Return trips that depend on data: five positives a sample, spread evenly."""
    labels_of = {"score_tiles": "BLOCK_L", "add_dx": "BLOCK_R", "step_tiles": "BLOCK_R"}

    def tiles(kernel: str, a: Mapping[str, Any]) -> float:
        """Tiles of an average chunk."""
        return labels / math.ceil(labels / a["chunk"]) / a[labels_of[kernel]]

    return {
        "subtract_targets: for p": 5 * batch / labels * 128,
        "find_starts: while length > 0": math.ceil(math.log2(5 * batch)) + 1,
        # On the CPU, where launches are recorded, three programs share the tiles.
        "score_tiles: for tile": lambda a: (
            tiles("score_tiles", a) * math.ceil(a["batch"] / a["BLOCK_B"]) / 3
        ),
        "row_gradient: for b": lambda a: math.ceil(a["batch"] / a["STEP"]),
        "add_dx: for i": lambda a: tiles("add_dx", a) / a["partial"].shape[0],
        "step_tiles: for i": lambda a: tiles("step_tiles", a) / a["partial"].shape[0],
    }


def moved(labels: int, element: int) -> dict[str, Traffic]:
    """Return what the kernels of the full-label ops move, a chunk of average size a launch.

    element: bytes of a number of the table; the gradient has two.
    """

    def with_tma(of: Callable[[Mapping[str, Any], float, float], tuple[float, float]]) -> Traffic:
        def told(a: Mapping[str, Any]) -> tuple[float, float]:
            share = labels / math.ceil(labels / a["chunk"])
            gradient = 2 * share * math.ceil(a["batch"] / a["BLOCK_B"]) * a["BLOCK_B"]
            memory, cache = of(a, share * a["D"], gradient)
            by_tma = not isinstance(a["weight"], torch.Tensor)
            return memory, cache if by_tma else 0.0

        return told

    def score(a: Mapping[str, Any], n: float, gradient: float) -> tuple[float, float]:
        blocks = math.ceil(a["batch"] / a["BLOCK_B"])
        batch = 2 * n / a["BLOCK_L"] * a["BLOCK_B"] * blocks
        return n * element + gradient, blocks * n * element + batch + gradient

    def dx(a: Mapping[str, Any], n: float, gradient: float) -> tuple[float, float]:
        blocks, columns = math.ceil(a["batch"] / a["BLOCK_B"]), math.ceil(a["D"] / a["BLOCK_D"])
        return n * element + gradient, blocks * n * element + columns * gradient

    def update(a: Mapping[str, Any], n: float, gradient: float) -> tuple[float, float]:
        columns = math.ceil(a["D"] / a["BLOCK_D"])
        batch = 2 * n / a["BLOCK_R"] * a["batch"]
        return 2 * n * element + gradient, 2 * n * element + columns * gradient + batch

    def step(a: Mapping[str, Any], n: float, gradient: float) -> tuple[float, float]:
        columns = math.ceil(a["D"] / a["BLOCK_D"])
        return 2 * n * element + gradient, 2 * n * element + columns * gradient

    kernels = {"score_tiles": score, "add_dx": dx, "update_rows": update, "step_tiles": step}
    return {name: with_tma(of) for name, of in kernels.items()}


def main() -> None:
    """Print the tables of the full-label shapes."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(main))
    parser.add_argument("--card", choices=CARDS, default="H200")
    card = CARDS[parser.parse_args().card]
    for name, (batch, labels, dtype) in SHAPES.items():
        print(f"\n{name}, {card.arch}: a model, nothing is measured")
        loops, traffic = loops_of_data(batch, labels), moved(labels, dtype.itemsize)
        lines = model(bce_step(batch, labels, dtype), card, loops, traffic)
        print("\n".join(table(lines)))
        tables, products = 2 * labels * 768 * dtype.itemsize, 6 * batch * labels * 768
        floor = max(tables / card.memory, products / card.matmul) * 1e3
        total = sum(line.expected for line in lines)
        print(f"expected {total:.2f} ms, floor {floor:.2f} ms, {total / floor:.1f} x floor (model)")


if __name__ == "__main__":
    main()
