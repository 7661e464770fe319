"""The model's row of `sparse_adam_`: CUDA kernels, compiled by nvcc for the card."""

import functools
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import sass
from benchmarks.cases_sparse_update import BENCHMARK, sparse_work, touched_rows
from benchmarks.sass_work import Card, Row, Work

ROOT = Path(__file__).resolve().parents[1]
WARPS, LANES, CHUNK = 4, 32, 8
"""Of a block; that share a row; columns of a lane. `csrc/cuda/stages.cuh` and its sisters."""
FLAGS = 1024
"""Blocks that check the gradient, at most."""
UPDATE = "update_kernelILb1ELb1ELb1ENS0_6FormatILNS_5DTypeE1ELS4_1ELS4_0EEE"
"""Momentum, second moment, 16-byte accesses; table and states bf16, the gradient fp32."""
CHECK = "prepare_kernelILb1E"


def find_nvcc() -> str | None:
    """Return CUDA's compiler, where there is one."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


@functools.cache
def kernels(arch: str) -> dict[str, tuple[sass.Code, sass.Resources]]:
    """Return the machine code of the two kernels, by the beginning of their names.

    Raises:
        RuntimeError: there is no nvcc, or it refuses the source.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("the model of sparse_adam_ needs nvcc")
    source = ROOT / "csrc" / "cuda" / "sparse_update.cu"
    with tempfile.TemporaryDirectory(prefix="xmlkernels-sass-") as folder:
        binary = Path(folder) / "sparse_update.cubin"
        flags = ["-std=c++20", f"-I{ROOT / 'csrc'}", f"-arch={arch}", "-cubin"]
        command = [nvcc, *flags, str(source), "-o", str(binary)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        codes, needs = sass.disassemble(binary), sass.resources(binary)
    found = {}
    for part in (CHECK, UPDATE):
        (name,) = (name for name in codes if part in name)
        found[part] = codes[name], needs[name]
    return found


(AT,) = BENCHMARK.gpu_shapes
TOUCHED, TURNS = touched_rows(AT), math.ceil(AT.D / (LANES * CHUNK))


def works(card: Card) -> Iterator[Work]:
    """Return the check of the gradient and the update; the card's L2 keeps none of it between."""
    rows = math.ceil(TOUCHED / WARPS)
    checking = min(rows, FLAGS)
    # The check has a loop for two bytes and one for four, of three chunks of a row at a time.
    trips: dict[str, sass.Trips] = {
        CHECK: {(0,): TOUCHED / WARPS / checking, (0, 0): 0, (0, 1): TURNS / 3, (1,): 0, (2,): 0},
        UPDATE: {(0,): TURNS},
    }
    gradient, numbers = 4 * TOUCHED * AT.D, 2 * TOUCHED * AT.D
    moved = {CHECK: gradient, UPDATE: gradient + 2 * 3 * numbers}
    for part, (code, needs) in kernels(card.arch).items():
        held = sass.occupancy(needs.registers, needs.shared, WARPS, card.arch)
        blocks = checking + 1 if part == CHECK else rows
        counts = code.count(trips[part])
        if part == CHECK:  # what is left over of a row stands in no loop: nothing, at this width
            counts.bytes["ldg"] = gradient // (blocks * WARPS)
        yield Work(part.partition("IL")[0], counts, WARPS, held, blocks, float(moved[part]))


ROWS = (Row("sparse_update", AT.name, "adam", "bf16", *sparse_work(AT, "adam", 2), works),)
