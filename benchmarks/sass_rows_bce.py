"""The model's rows of `bce_step_`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.case import DTYPES as PLAIN
from benchmarks.cases_bce_step import BENCHMARK, bce_work
from benchmarks.sass_launch import Launch, Trips
from benchmarks.sass_work import Row, Traffic, of_triton

DTYPES = PLAIN | {"fp8": torch.float8_e4m3fn}


def bce_step(batch: int, labels: int, dtype: torch.dtype) -> Callable[[], object]:
    """Return a call of `bce_step_` whose tensors take no memory until they are touched."""
    from xmlkernels.triton.bce_step import bce_step_

    weight, x = torch.empty(labels, 768, dtype=dtype), torch.empty(batch, 768)
    row = torch.empty(5 * batch, dtype=torch.int64)
    sample = torch.empty(5 * batch, dtype=torch.int32)
    hyper, counter = torch.zeros(7), torch.zeros(2, dtype=torch.int64)
    scale = torch.empty(labels, 2) if dtype == torch.float8_e4m3fn else None
    return lambda: bce_step_(weight, x, row, sample, hyper, counter, row_scale=scale)


def loops_of_data(batch: int, labels: int) -> dict[str, Trips]:
    """Return trips that depend on data: five positives a sample, spread evenly."""
    # Labels of a tile, and its columns or samples.
    sides = {
        "score_tiles": ("BLOCK_L", "BLOCK_B", "batch"),
        "update_rows": ("BLOCK_R", "BLOCK_D", "D"),
        "add_dx": ("BLOCK_R", None, None),
        "step_tiles": ("BLOCK_R", None, None),
    }

    def tiles(kernel: str, a: Mapping[str, Any], programs: int) -> float:
        """Tiles of a program, for an average chunk."""
        rows, side, over = sides[kernel]
        of_labels = labels / math.ceil(labels / a["chunk"]) / a[rows]
        return of_labels * (math.ceil(a[over] / a[side]) if over else 1) / programs

    # On the CPU, where launches are recorded, three programs share the tiles that any number may.
    return {
        "subtract_targets: while p < end": lambda a: 5 * batch / labels * a["BLOCK_L"],
        "subtract_targets: for p": lambda a: 5 * batch / labels * a["BLOCK_L"],
        "find_starts: while length > 0": math.ceil(math.log2(5 * batch)) + 1,
        "score_tiles: for tile": lambda a: tiles("score_tiles", a, 3),
        "score_tiles: for tile + score_tiles: for d": lambda a: math.ceil(a["D"] / a["STEP"]),
        "row_gradient: for b": lambda a: math.ceil(a["batch"] / a["STEP"]),
        "update_rows: for tile": lambda a: tiles("update_rows", a, 3),
        "update_rows: for tile + row_gradient: for b": lambda a: (
            math.ceil(a["batch"] / a["STEP"]) if a["PARTS"] > 1 else None
        ),
        "add_dx: for i": lambda a: tiles("add_dx", a, a["partial"].shape[0]),
        "step_tiles: for i": lambda a: tiles("step_tiles", a, a["partial"].shape[0]),
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


def runs_ahead(launch: Launch) -> int:
    """Return the buffers of loads that run on from tile to tile; tests/compile hold them to it."""
    a = launch.arguments
    joined = a.get("PARTS", 2) > 1  # of update_rows alone
    by_tma = not isinstance(a.get("weight"), torch.Tensor | None)
    return launch.options["num_stages"] if by_tma and joined else 0


def row(shape: str, name: str) -> Row:
    """Return the row of plain SGD at a shape of the card's list."""
    (at,) = (s for s in BENCHMARK.gpu_shapes if s.name == shape)
    dtype = DTYPES[name]
    works = of_triton(
        bce_step(at.B, at.L, dtype),
        loops_of_data(at.B, at.L),
        moved(at.L, dtype.itemsize),
        runs_ahead,
    )
    return Row("bce_step", shape, "sgd", name, *bce_work(at, dtype.itemsize), works)


ROWS = (
    row("B128-L2.8M-D768", "bf16"),
    row("B512-L1.3M-D768", "bf16"),
    row("B128-L8.6M-D768", "fp8"),
)
