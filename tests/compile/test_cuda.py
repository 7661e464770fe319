"""The CUDA sources compile for every architecture without spilling, and link with torch's headers.
Nothing runs here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nvcc
from nvcc import LINKED, ROOT, SOURCES, TORCH, bound, compiled, folder, resources, run

pytestmark = pytest.mark.compile
ARCHES = ("sm_80", "sm_90a")
# Kernels of ours in each source; CUB's are counted apart.
OURS = {
    "sparse_update": {"prepare_kernel": 1, "check_kernel": 2, "update_kernel": 8},
    "bag_step": {"key_kernel": 1, "bag_kernel": 8, "sum_kernel": 2},
    "sort": {},
}


def test_every_source_is_here_and_in_the_build() -> None:
    assert {s.stem for s in SOURCES} == set(OURS)
    assert "CONFIGURE_DEPENDS csrc/cuda/*.cu" in (ROOT / "CMakeLists.txt").read_text()


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_no_kernel_spills(source: Path, arch: str) -> None:
    found = resources(compiled(source, arch))
    for name, count in OURS[source.stem].items():
        assert sum(name in kernel for kernel in found) == count, sorted(found)
    assert found
    for kernel, needs in found.items():
        assert (needs["STACK"], needs["LOCAL"]) == (0, 0), f"{kernel}: {needs}"
        assert needs["SHARED"] <= 48 << 10, f"{kernel}: {needs}"  # static shared memory ends here


@pytest.mark.parametrize("arch", ["sm_90a"])
def test_the_row_kernels_leave_room_for_loads_in_flight(arch: str) -> None:
    """At most 96 registers: 5 blocks of 128 threads on a multiprocessor of 65,536, as the launch
    bounds ask.
    """
    found = resources(compiled(ROOT / "csrc" / "cuda" / "sparse_update.cu", arch))
    assert max(needs["REG"] for kernel, needs in found.items() if "update_kernel" in kernel) <= 96


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
