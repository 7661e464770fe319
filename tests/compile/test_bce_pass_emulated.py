"""csrc/cuda/sm90/bce_pass.cu, whole, on the emulated card: who waits for whom, what lies outside,
and every bit of the results. CUTLASS's headers are not needed: emulated_sm90.h has their place.
"""

import ast
import functools
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nvcc import FLAGS, ROOT, folder, need_nvcc, run

pytestmark = pytest.mark.compile
HERE = Path(__file__).parent
SOURCE = ROOT / "csrc" / "cuda" / "sm90" / "bce_pass.cu"
LOST, WRONG = "wait for others that do not come", r"wrong: \[\("
# name: (what stands in the source, what is put in its place, how the run ends)
FAULTS = {
    "a stage is given back before dX has read it": (
        "    warpgroup_wait<0>();\n    warpgroup_fence_operand(dx);\n",
        "",
        "before its work has",
    ),
    "rounding does not wait for its gradient": ("warpgroup_wait<1>();", "", WRONG),
    "what leaves is overwritten before it has left": (
        "tma_store_wait<0>();",
        "",
        "before its work",
    ),
    "a stage is never given back": ("s.empty[stage.index].arrive();", "", LOST),
    "a stage that is in use is filled": ("s.empty[stage.index].wait(stage.parity ^ 1);", "", LOST),
    "the first turn is nobody's": (
        "if (which == 1 && split < tiles) NamedBarrier::arrive(2 * kGroup, kTurn);",
        "",
        LOST,
    ),
    "a turn is handed on that nobody takes": (
        "if (i + a.splits < tiles) NamedBarrier::arrive",
        "NamedBarrier::arrive",
        "have arrived at a barrier",
    ),
    "the sums of dX do not wait for each other": (
        "NamedBarrier::sync(2 * kGroup, kSummed);",
        "",
        WRONG,
    ),
}


@functools.cache
def part(name: str, room: Path | None = None) -> str:
    """A file of the emulation as an object, with the kernel that a folder holds."""
    host = "-O2,-fPIC,-ffp-contract=off,-Wall,-Wno-unknown-pragmas,-Werror,-fmax-errors=5"
    target = (room or folder()) / f"{name}_emulated.o"
    where = [f"-I{HERE}"] if room is None else [f"-I{room}", f"-I{HERE}"]
    command = [need_nvcc(), "-x", "c++", *where, *FLAGS, "-Xcompiler", host, "-c"]
    run([*command, str(HERE / f"{name}.cpp"), "-o", str(target)])
    return str(target)


def built(number: int, source: str) -> Path:
    """The kernel's source as host code, with the emulation in the place of its headers."""
    room = folder() / f"emulated_{number}"
    (room / "cuda" / "sm90").mkdir(parents=True, exist_ok=True)
    (room / "cuda" / "sm90" / "bce_pass.cu").write_text(source)
    for header in re.findall(r"#include <(cut[^>]+)>", source):
        (room / header).parent.mkdir(parents=True, exist_ok=True)
        (room / header).touch()
    # The copy's neighbours are the original's.
    for header in ("cuda/launch.h", "cuda/sm90/pair_update.cuh"):
        (room / header).write_text(f'#include "{ROOT / "csrc" / header}"\n')
    objects = [part("bce_pass_emulated", room), part("race_record")]
    run([need_nvcc(), "-shared", *objects, "-Xlinker", "-zdefs", "-o", str(room / "emulated.so")])
    return room / "emulated.so"


def outcomes(which: str, libraries: list[Path]) -> list[tuple[int, str]]:
    """Exit status and words of each library's steps."""
    command = [sys.executable, str(HERE / "bce_pass_runs.py"), which, *map(str, libraries)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    *said, statuses = done.stdout.split("== ")[1:]
    return list(zip(ast.literal_eval(statuses), said, strict=True))


def test_every_bit_is_right() -> None:
    ((status, said),) = outcomes("all", [built(0, SOURCE.read_text("utf-8"))])
    assert status == 0 and "6 steps, wrong: []" in said, said


@functools.cache
def of_faults() -> dict[str, tuple[int, str]]:
    source = SOURCE.read_text("utf-8")
    changed = []
    for fault, (there, instead, _) in FAULTS.items():
        assert source.count(there) == 1, fault
        changed.append(source.replace(there, instead))
    part("race_record")  # once, before two threads ask for it
    with ThreadPoolExecutor(2) as pool:
        libraries = list(pool.map(built, range(1, len(changed) + 1), changed))
    return dict(zip(FAULTS, outcomes("one", libraries), strict=True))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    status, said = of_faults()[fault]
    assert status != 0 and re.search(FAULTS[fault][2], said), (status, said)
