"""Every op that is timed, found by the names of the modules `benchmarks/cases_NAME.py`.

Closed forms behind the columns `tflops` and `gbps` are in those modules. They are the same for
every implementation of an op, so that both are rates of useful work. Their letters: B, L, D, S, K
as in `benchmarks/shapes.py`, s the bytes of a table element, m of an element of a state (0 without
one), P the number of positives.

The ceiling of a format is torch.mm of n x n matrices: 2 n³ FLOP and 3 s n² bytes.
"""

import difflib
import importlib
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.case import DTYPES, Benchmark, Case
from benchmarks.floors import GOALS
from benchmarks.shapes import Shape
from benchmarks.timing import Step
from xmlkernels import ops
from xmlkernels.errors import InputError

CEILING_SIZE = {"cpu": 2048, "cuda": 8192}  # a GPU would finish 2048³ before its clocks rise
_PREFIX = "cases_"


def find_benchmarks() -> dict[str, Benchmark]:
    """Import every `cases_NAME.py`; those with a figure to reach come first, then by name.

    A run that is cut short has then measured what matters.
    """
    aims = [goal.op for goal in GOALS]
    names = [path.stem.removeprefix(_PREFIX) for path in Path(__file__).parent.glob("cases_*.py")]
    names.sort(key=lambda name: (aims.index(name) if name in aims else len(aims), name))
    modules = {name: importlib.import_module(f"benchmarks.{_PREFIX}{name}") for name in names}
    return {name: module.BENCHMARK for name, module in modules.items()}


BENCHMARKS = find_benchmarks()
"""By op, in the order in which they are measured."""


def build(op: str, shape: Shape, device: str, compiled: bool = True) -> list[Case]:
    """Build the cases of one shape, the op's own first."""
    return BENCHMARKS[op].cases(shape, device, compiled)


def build_for_card(op: str, shape: Shape, device: str, compiled: bool = True) -> list[Case]:
    """Build what a card measures: the cases of both devices, then a card's own.

    Where both lists hold a key, the case of both devices stays.
    """
    found = {case.key: case for case in build(op, shape, device, compiled)}
    more = BENCHMARKS[op].gpu_cases
    for case in more(shape, device) if more else ():
        found.setdefault(case.key, case)
    return list(found.values())


def pick(op: str, name: str | None) -> tuple[Shape, ...]:
    """Return all shapes of an op on a CPU, or the one that is named.

    Raises:
        InputError: the op has no shape of that name.
    """
    shapes = BENCHMARKS[op].shapes
    if name is None:
        return shapes
    names = [shape.name for shape in shapes]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, 0.0)[0]
        raise InputError(
            f"--shape of {op}", f"one of {', '.join(names)}", name, f"did you mean {near}?"
        )
    return (shapes[names.index(name)],)


def ceiling_dtype(dtype: str, device: str) -> str:
    """Return the format whose torch.mm rate bounds a case.

    A CPU widens fp16: its own mm of it has a thousandth of the rate of fp32.
    """
    return "fp32" if dtype == "fp16" and device == "cpu" else dtype


def ceiling(dtype: str, device: str) -> Case:
    """Return torch.mm of n x n matrices in `dtype`."""
    n = CEILING_SIZE[device]

    def make() -> tuple[Tensor, Tensor, Tensor]:
        a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
        return a, b, torch.empty_like(a)

    def start(held: tuple[Tensor, Tensor, Tensor]) -> Step:
        return lambda: torch.mm(held[0], held[1], out=held[2])

    return Case("mm", "ceiling", dtype, 2 * n**3, 3 * DTYPES[dtype].itemsize * n * n, make, start)


def require_op(op: str, device: str) -> None:
    """Refuse an op that cannot be timed.

    Raises:
        InputError: the package lacks the op, torch lacks the device, or no kernel of the op is
            loaded for it.
    """
    absent = [name for name in BENCHMARKS[op].functions if not hasattr(ops, name)]
    if absent:
        there = [o for o, b in BENCHMARKS.items() if all(hasattr(ops, n) for n in b.functions)]
        raise InputError(
            f"--op {op}",
            "an op of this version of xmlkernels",
            f"{', '.join(absent)}, not in xmlkernels.ops",
            f"choose one of {', '.join(there)}",
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device",
            "a device of this machine",
            "cuda, which torch does not find",
            "use --device cpu",
        )
    for name in BENCHMARKS[op].functions:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(
            f"xmlkernels::{name}", device.upper()
        ):
            # A row named xmlkernels that timed the reference would be false.
            raise InputError(
                f"--device {device}",
                f"a kernel of {name} for {device}",
                f"the reference alone ({ops.missing or 'none is built'})",
                "build the native library with `pip install --no-build-isolation -e .`",
            )
