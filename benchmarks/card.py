"""The card at hand, and which shapes it is asked for."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import cases, floors, shapes, timing
from xmlkernels.errors import InputError


@dataclass
class Card:
    """machine: its name in file names; memory: bytes; device: as torch names it."""

    machine: str
    memory: int
    device: str = "cuda"


def find() -> Card:
    """Return the card at hand.

    Raises:
        InputError: torch finds no CUDA device.
    """
    if not torch.cuda.is_available():
        raise InputError(
            "gpu_report",
            "a CUDA device",
            f"none that torch {torch.__version__} finds",
            "run it on a machine with one",
        )
    return Card(timing.machine_name("cuda"), torch.cuda.get_device_properties(0).total_memory)


def trial() -> Card:
    """Return this machine's CPU in a card's place, to try a report; its rows are no results."""
    return Card(f"trial-{timing.machine_name('cpu')}", 1 << 40, "cpu")


def check_out(out: Path) -> None:
    """Refuse a folder without room for files before minutes are spent; make it if need be.

    Raises:
        InputError: no file can be written there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(
            "--out",
            "a folder that can be written",
            f"{out} ({error.strerror})",
            "give another folder",
        ) from None


def fits(op: str, shape: shapes.Shape, memory: int) -> bool:
    """Say whether the narrowest table of a full-label op fits.

    1 GiB is left to the context and the batch.
    """
    aims = [goal for goal in floors.GOALS if goal.shape == shape.name]
    narrowest = min((1 if goal.dtype == "fp8" else 2 for goal in aims), default=2)
    return shape.L * shape.D * narrowest + (1 << 30) <= memory


def plan(
    ops: Sequence[str], memory: int, say: Callable[[str], None]
) -> list[tuple[str, shapes.Shape]]:
    """Return what to measure, in order: every op's first shape, then every op's second.

    Small shapes take the place of those that do not fit.
    """
    lists: list[list[tuple[str, shapes.Shape]]] = []
    for op in ops:
        benchmark = cases.BENCHMARKS[op]
        large = benchmark.gpu_shapes
        if not large:
            lists.append([(op, shape) for shape in benchmark.for_card()])
            continue
        good = [shape for shape in large if fits(op, shape, memory)]
        for shape in large:
            if shape not in good:
                size = f"{memory / 2**30:.0f} GiB"
                say(f"  {op} {shape.name} is left out: its table does not fit {size}")
        small = benchmark.small_gpu_shapes if len(good) < len(large) else ()
        lists.append([(op, shape) for shape in (*good, *small)])
    longest = max(map(len, lists), default=0)
    return [found[i] for i in range(longest) for found in lists if i < len(found)]
