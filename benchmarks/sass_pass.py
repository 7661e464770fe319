"""A model of the second pass of `bce_step_` in CUTLASS, from the machine code of its object file.

    python benchmarks/sass_pass.py OBJECT [--card H200 | H100]

OBJECT is csrc/cuda/sm90/bce_pass.cu compiled for sm_90a, alone or in the CUDA library. The shape is
that of the figure to reach, and the arithmetic that of `sass_work.py`; the two warpgroups that take
tiles in turns cover each other as two blocks of a multiprocessor do. Nothing here is measured.
"""

import argparse
import inspect
import math
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import sass
from benchmarks.cases_bce_step import BENCHMARK
from benchmarks.sass_work import CARDS, Line, Work, lines_of, table
from benchmarks.shapes import Shape

LABELS, COLUMNS, SAMPLES = 64, 128, 128  # of a tile, as the kernel has them
TURNS = 2  # warpgroups that take them, each with four warps
STAGES = 5  # buffers of their loads


def turn(code: sass.Code) -> sass.Loop:
    """Return the loop over tiles of the warps that multiply."""
    (found,) = (at for at in code.loops if any(_multiplies(code, i) for i in at.inside))
    return found


def _multiplies(code: sass.Code, i: int) -> bool:
    return code.instructions[i].kind == "mma"


def works(code: sass.Code, shape: Shape) -> Iterable[Work]:
    """Return what the launches of a step ask of a card, a chunk of average size each."""
    from xmlkernels.triton.bce_plan import make_plan

    plan = make_plan(shape.B, shape.D, torch.bfloat16)
    chunks, slices = math.ceil(shape.L / plan.chunk), math.ceil(shape.D / COLUMNS)
    labels = shape.L / chunks
    loop = turn(code)
    trips: dict[str | tuple[int, ...], float] = {at.path: 1 for at in code.loops}
    trips[loop.path] = labels / LABELS / plan.splits / TURNS
    # The table is read and written, the gradient read by every slice of columns.
    moved, gradient = 4 * labels * shape.D, 2 * labels * SAMPLES
    counts, blocks = code.count(trips), slices * plan.splits
    bytes_ = moved + gradient, moved + slices * gradient
    for _ in range(chunks):
        yield Work("bce_pass", counts, 4 * TURNS, TURNS, blocks, *bytes_, STAGES // TURNS)


def model(binary: Path, card: str = "H200") -> Line:
    """Return the model of all launches of a step at the shape of the figure to reach."""
    codes = {n: c for n, c in sass.disassemble(binary).items() if "bce_pass_kernel" in n}
    (shape,) = (s for s in BENCHMARK.gpu_shapes if s.name == "B128-L2.8M-D768")
    # Decay in the gradient, as bce_step_ has it by itself.
    (code,) = (c for n, c in codes.items() if "ILb0E" in n)
    (line,) = lines_of(works(code, shape), CARDS[card])
    return line


def main() -> None:
    """Print the model's table."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(main))
    parser.add_argument("object", type=Path)
    parser.add_argument("--card", choices=("H200", "H100"), default="H200")
    given = parser.parse_args()
    print("bce_pass bf16 B128-L2.8M-D768: a model, nothing is measured")
    print(*table([model(given.object, given.card)]), sep="\n")


if __name__ == "__main__":
    main()
