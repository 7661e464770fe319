"""The CUDA sources compile for every architecture without spilling, and link with torch's headers.
Nothing runs here.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

import nvcc
from benchmarks import sass
from nvcc import LINKED, ROOT, SOURCES, TORCH, bound, compiled, folder, resources, run

pytestmark = pytest.mark.compile
ARCHES = ("sm_80", "sm_89", "sm_90a", "sm_100a")
# Kernels of ours in each source, CUB's are counted apart: a rule's kernel in any format, in two
# layouts, and those of the common formats, fewer where there are no states.
OURS = {
    "sparse_update": {"prepare_kernel": 2, "update_kernel": 4 * 2 + 4 + 3 * 7},
    "bag_step": {"key_kernel": 1, "bag_kernel": 4 * 2 + 2 + 3 * 3, "sum_kernel": 2},
    "sort": {},
}


def test_every_source_is_here_and_in_the_build() -> None:
    assert {s.stem for s in SOURCES} == set(OURS)
    assert "CONFIGURE_DEPENDS csrc/cuda/*.cu" in (ROOT / "CMakeLists.txt").read_text()


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_no_kernel_spills(source: Path) -> None:
    folder()  # made once, before two threads ask for it
    with ThreadPoolExecutor(2) as pool:
        binaries = list(pool.map(partial(compiled, source), ARCHES))
    for arch, binary in zip(ARCHES, binaries, strict=True):
        found = resources(binary)
        for name, count in OURS[source.stem].items():
            assert sum(name in kernel for kernel in found) == count, sorted(found)
        assert found
        for kernel, needs in found.items():
            # CUB's sort has a frame of 8 bytes on sm_100a, and no spill.
            allowed = 8 if "_ZN3cub" in kernel and arch == "sm_100a" else 0
            assert needs["STACK"] <= allowed and needs["LOCAL"] == 0, f"{arch} {kernel}: {needs}"
            assert needs["SHARED"] <= 48 << 10, f"{arch} {kernel}: {needs}"  # static ends here


@pytest.mark.parametrize("arch", ARCHES)
def test_the_row_kernels_leave_room_for_loads_in_flight(arch: str) -> None:
    """At most 96 registers: 5 blocks of 128 threads on a multiprocessor of 65,536, as the launch
    bounds ask.
    """
    found = resources(compiled(ROOT / "csrc" / "cuda" / "sparse_update.cu", arch))
    assert max(needs["REG"] for kernel, needs in found.items() if "update_kernel" in kernel) <= 96


BUDGET = {"f32": 450, "bf16": 680, "f16": 1150}  # instructions for 8 columns of a lane


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_adam_keeps_its_budget_of_instructions(arch: str) -> None:
    """The loop over a row's columns, with the calls of slow paths of roots and divisions that are
    hardly ever taken; table and states of one format, a gradient of fp32. Philox draws once for 8
    numbers and stream, by wide multiplications alone, of which the streams share the first; all
    accesses are of 16 bytes.
    """
    codes = sass.disassemble(compiled(ROOT / "csrc" / "cuda" / "sparse_update.cu", arch))
    for number, dtype in enumerate(BUDGET):
        form = f"6FormatILNS_5DTypeE{number}ELS4_{number}ELS4_0EEE"
        (code,) = (c for n, c in codes.items() if f"update_kernelILb1ELb1ELb1ENS0_{form}" in n)
        (loop,) = (at for at in code.loops if len(at.path) == 1)
        body = [code.instructions[i] for i in sorted(loop.inside)]
        assert len(body) <= BUDGET[dtype], (dtype, len(body))
        wide = sum(i.opcode.startswith("IMAD.WIDE") for i in body)
        assert wide <= (3 * 20 if number else 4)
        assert not any(i.opcode.startswith("IMAD.HI") for i in body)
        assert all(i.opcode.endswith(".128") for i in body if i.kind in ("ldg", "stg"))
        accesses = sum(i.kind in ("ldg", "stg") for i in body)
        assert accesses == (14 if dtype == "f32" else 8)


@pytest.mark.parametrize("torch_of", ["installed", "oldest"])
def test_the_library_links(torch_of: str) -> None:
    """bindings_cuda.cpp compiles against torch's stable ABI, this one's and the oldest's, and all
    that it calls of ours is there. Either library loads here.
    """
    compiler = nvcc.need_nvcc()
    bindings = bound("bindings_cuda.cpp", torch_of)
    library = folder() / torch_of / "_cuda.so"
    objects = [str(compiled(s, LINKED)) for s in SOURCES]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    run(
        [
            compiler,
            "-shared",
            f"-arch={LINKED}",
            str(bindings),
            *objects,
            *libraries,
            "-o",
            str(library),
        ]
    )
    undefined = run(["nm", "-D", "--undefined-only", "--demangle", str(library)])
    assert "aoti_torch_get_current_cuda_stream" in undefined
    assert "xk::" not in undefined
    assert "at::" not in undefined and "c10::" not in undefined, "only the stable ABI may be used"
    # What a CPU-only torch lacks stands in, so that the library loads: it registers its four ops,
    # under schemas that exist.
    stand_in = folder() / "stand_in.c"
    stand_in.write_text(
        "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n"
    )
    run(["cc", "-shared", "-fPIC", str(stand_in), "-o", str(stand_in.with_suffix(".so"))])
    code = (
        "import ctypes, sys, torch\n"
        "from xmlkernels import ops\n"
        "has = lambda: [torch._C._dispatch_has_kernel_for_dispatch_key('xmlkernels::' + n, 'CUDA') "
        "for n in sys.argv[3:]]\n"
        "before = has()\n"
        "if torch.version.cuda is None: ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)\n"
        "torch.ops.load_library(sys.argv[2])\n"
        "print(before, has())\n"
    )
    names = ["sparse_sgd_", "sparse_adagrad_", "sparse_adam_", "bag_step_"]
    environment = os.environ | {"XMLKERNELS_CUDA": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(stand_in.with_suffix(".so")), str(library), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout.strip() == f"{[False] * 4} {[True] * 4}", done.stderr


@pytest.mark.parametrize("required", ["0", "1"])
def test_without_nvcc_it_skips_and_says_so(required: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped, or failed where nvcc is required."""
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: None)
    monkeypatch.setenv("XMLKERNELS_REQUIRE_NVCC", required)
    outcome = pytest.fail.Exception if required == "1" else pytest.skip.Exception
    with pytest.raises(outcome, match="no nvcc"):
        nvcc.need_nvcc()
