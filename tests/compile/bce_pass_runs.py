"""Steps of bce_pass.cu on the emulated card: `python bce_pass_runs.py all|one LIBRARY …`.

Each library has a process of its own, since the emulation ends that of a kernel whose threads wait
for ever. It prints what is wrong, and at last the exit status of each: 0 where all results are
right to the bit.
"""

import ctypes
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "ops")]

import torch
from patience import status_of
from torch import Tensor

from common import bits, make_counter, make_hyper
from xmlkernels.reference.hyper import SCALE
from xmlkernels.reference.update import update_rows

BF16, PITCH = torch.bfloat16, 128
# Samples, rows, width, rows of a chunk, splits, row offset, decoupled, the other order of threads:
# tiles and columns that are not full, more tiles than stages, splits without a tile, two chunks.
RUNS = (
    (128, 130, 128, 256, 1, 0, False, False),
    (100, 700, 200, 256, 2, 2**33 + 5, True, True),
    (65, 64, 72, 128, 3, 0, False, False),
    (128, 1025, 264, 1152, 1, 7, False, True),
    (128, 700, 136, 768, 1, 7, False, False),
)
TILE, COLUMNS, THREADS = 64, 128, 128


def multiples(*shape: int, most: int, of: float, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(-most, most + 1, shape, generator=g) * of).to(BF16)


def step(
    library: ctypes.CDLL,
    batch: int,
    rows: int,
    width: int,
    chunk: int,
    splits: int,
    row_offset: int,
    decoupled: bool,
    reverse: bool,
    *,
    finite: bool = True,
) -> list[str]:
    """What is wrong with a step whose sums are exact."""
    x = multiples(batch, width, most=31, of=1 / 16, seed=0)
    weight = multiples(rows, width, most=63, of=1 / 64, seed=1)
    hyper, counter = make_hyper(2.0**-8, 2.0**-4, scale=0.5), make_counter()
    chunks, table = range(0, rows, chunk), weight.clone()
    gradient = torch.zeros(len(chunks) * chunk, PITCH, dtype=BF16)
    gradient[:rows, :batch] = multiples(rows, batch, most=3, of=1 / 4, seed=2)
    partial = torch.full((splits, batch, width), torch.nan)
    flag = torch.tensor([not finite], dtype=torch.int32)
    counts = torch.zeros(3, dtype=torch.int64)
    for first in chunks:
        told = torch.zeros(3, dtype=torch.int64)
        part = gradient[first : first + chunk]
        tensors = (x, part, table, partial, hyper, counter, flag)
        sizes = (batch, PITCH, rows, width, first, chunk, splits)
        numbers = (*sizes, row_offset, decoupled, reverse)
        library.bce_pass_host(
            (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors)),
            (ctypes.c_int64 * len(numbers))(*numbers),
            ctypes.c_void_p(told.data_ptr()),
        )
        counts += told
    if not finite:
        untouched = torch.equal(table, weight) and bool(partial.isnan().all())
        return [] if untouched and not counts.any() else ["something was done"]
    g = gradient[:rows, :batch].float()
    numbers = row_offset + torch.arange(rows)
    grad, states = hyper[SCALE] * (g @ x.float()), (None, None, None)
    ((_, new),) = update_rows(weight, grad, hyper, counter, numbers, *states, decoupled)
    slices = -(-width // COLUMNS)
    tiles = slices * sum(-(-min(chunk, rows - first) // TILE) for first in chunks)
    # For each tile 8 products of the rows' gradient, and 4 of dX for twice as many samples; two
    # boxes of the table and of the gradient are loaded, and two stored; of x two for each block.
    loads = 4 * tiles + 2 * slices * splits * len(chunks)
    found = {
        "dx": torch.equal(partial.sum(0), g.T @ weight.float()),
        "table": torch.equal(bits(table), bits(new)) and not torch.equal(table, weight),
        "work": counts.tolist() == [16 * THREADS * tiles, loads, 2 * tiles],
    }
    return [name for name, right in found.items() if not right]


def check(path: str, runs: tuple[tuple[int, int, int, int, int, int, bool, bool], ...]) -> int:
    library = ctypes.CDLL(path)
    wrong = [(run, what) for run in runs if (what := step(library, *run))]
    wrong += [(runs[0], what) for what in step(library, *runs[0], finite=False)]
    print(f"{len(runs) + 1} steps, wrong: {wrong}", flush=True)
    return 1 if wrong else 0


def main() -> int:
    statuses = []
    for path in sys.argv[2:]:
        print(f"== {path}", flush=True)
        os.dup2(1, 2)  # one stream, in the order of time
        # Nothing is computed before: the child has no threads to miss.
        child = os.fork()
        if child == 0:
            os._exit(check(path, RUNS if sys.argv[1] == "all" else RUNS[-1:]))
        statuses.append(status_of(child))
    print(f"== {statuses}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
