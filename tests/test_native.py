"""`xmlkernels.native`: the native library is found, required, or replaced by the references, and
the user is told.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xmlkernels import ops

PACKAGE = Path(ops.__file__).parents[1]
OPS = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from xmlkernels import ops
    before = len(caught)
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    row, sample = torch.tensor([1]), torch.tensor([0], dtype=torch.int32)
    for _ in range(2):
        values, rows = ops.matmul_topk(x, w.bfloat16(), None, 2)
        loss = ops.bce_loss(x.requires_grad_(), w, None, row, sample)
        loss.backward()
        hyper, counter = torch.tensor([0.1, 0, 0, 0, 0, 1, 1]), torch.tensor([0, 0])
        dx, _ = ops.bce_step_(w.clone(), x.detach(), row, sample, hyper, counter)
assert before == 0, "a warning before the first call"
assert values.tolist() == [[3, 3], [3, 3]] and rows.tolist() == [[0, 1], [0, 1]]
assert abs(float(loss) - 21.3) < 0.3 and dx.shape == (2, 3)
for one in caught:
    print(f"{one.category.__name__}: {one.message}")
"""


def python(
    code: list[str], package: Path = PACKAGE.parent, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs python with the package of `package` first on its path, and only the given of the
    package's variables.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith("XMLKERNELS_")}
    return subprocess.run(
        [sys.executable, *code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=package,
        env=clean | {"PYTHONPATH": str(package)} | variables,
    )


@pytest.fixture(scope="module")
def without_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package as it is built without native code."""
    folder = tmp_path_factory.mktemp("pure")
    shutil.copytree(
        PACKAGE, folder / "xmlkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return folder


@pytest.fixture(scope="module")
def with_broken_library(tmp_path_factory: pytest.TempPathFactory, without_library: Path) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(
        without_library / "xmlkernels",
        folder / "xmlkernels",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (folder / "xmlkernels" / "_cpu.so").write_bytes(b"not a library")
    return folder


def test_switched_off_every_op_runs_on_its_reference_and_warns_once() -> None:
    done = python(["-c", OPS], XMLKERNELS_NATIVE="0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(
        "RuntimeWarning: xmlkernels: ops on cpu run on their slow reference: XMLKERNELS_NATIVE=0."
    )
    assert "pip install --no-build-isolation ." in lines[0]


def test_not_built_every_op_runs_on_its_reference_and_warns_once(without_library: Path) -> None:
    done = python(["-c", OPS], without_library)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1 and "the package was built without native code" in lines[0], lines


def test_a_library_that_does_not_load_is_told_and_replaced(with_broken_library: Path) -> None:
    done = python(["-c", OPS], with_broken_library)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1 and "_cpu.so does not load under torch" in lines[0], lines


@pytest.mark.skipif(ops.missing is not None, reason=f"CPU kernels are not loaded: {ops.missing}")
def test_loaded_nothing_warns() -> None:
    done = python(["-c", OPS], XMLKERNELS_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_required_but_not_built_is_an_import_error(without_library: Path) -> None:
    done = python(["-c", "import xmlkernels.ops"], without_library, XMLKERNELS_REQUIRE_NATIVE="1")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: xmlkernels: XMLKERNELS_REQUIRE_NATIVE=1, but the package was built without "
        "native code; build it with "
        "`pip install --no-build-isolation .` where a C++ compiler and torch are installed"
    )


def test_required_but_broken_or_switched_off_is_an_import_error(with_broken_library: Path) -> None:
    done = python(
        ["-c", "import xmlkernels.ops"], with_broken_library, XMLKERNELS_REQUIRE_NATIVE="1"
    )
    assert done.returncode == 1
    assert (
        "ImportError: xmlkernels: XMLKERNELS_REQUIRE_NATIVE=1, but _cpu.so does not" in done.stderr
    )
    done = python(
        ["-c", "import xmlkernels.ops"], XMLKERNELS_REQUIRE_NATIVE="1", XMLKERNELS_NATIVE="0"
    )
    assert done.returncode == 1
    assert "XMLKERNELS_REQUIRE_NATIVE=1, but XMLKERNELS_NATIVE=0;" in done.stderr


def test_the_module_prints_one_line(without_library: Path) -> None:
    done = python(["-m", "xmlkernels.ops"], without_library)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout
        == "xmlkernels: native library: not loaded, the package was built without native code\n"
    )
    if ops.missing is None:
        assert python(["-m", "xmlkernels.ops"]).stdout == "xmlkernels: native library: loaded\n"


@pytest.mark.parametrize("op", ["bce_step_", "bce_loss", "bce_loss_backward"])
def test_gpu_kernels_are_registered_and_not_imported(op: str) -> None:
    """The dispatcher knows them; Triton is imported by the first call with CUDA tensors alone."""
    import torch

    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"xmlkernels::{op}", "CUDA")
    ran = python(
        ["-c", "import sys; from xmlkernels import ops; print('xmlkernels.triton' in sys.modules)"]
    )
    assert ran.stdout.strip() == "False", ran.stderr


# A torch with CUDA, as far as the loader sees: whether there is a card plays no part.
CUDA_TORCH = (
    "import torch; torch.version.cuda = '13.0'; from xmlkernels import native, ops; "
    "print(native.missing_cuda)"
)


def test_a_torch_without_cuda_asks_for_no_cuda_library(with_broken_library: Path) -> None:
    shutil.copy(
        with_broken_library / "xmlkernels" / "_cpu.so",
        with_broken_library / "xmlkernels" / "_cuda.so",
    )
    code = (
        "import torch; torch.version.cuda = None; from xmlkernels import native, ops; "
        "print(native.missing_cuda)"
    )
    done = python(["-c", code], with_broken_library, XMLKERNELS_CUDA="1")
    assert done.returncode == 0 and "has no CUDA" in done.stdout, done.stderr


def test_the_reason_why_the_cuda_library_is_missing(
    without_library: Path, with_broken_library: Path
) -> None:
    done = python(["-c", CUDA_TORCH], without_library)
    assert done.stdout == "the package was built without CUDA kernels (nvcc builds them)\n", (
        done.stderr
    )
    shutil.copy(
        with_broken_library / "xmlkernels" / "_cpu.so",
        with_broken_library / "xmlkernels" / "_cuda.so",
    )
    done = python(["-c", CUDA_TORCH], with_broken_library)
    assert "_cuda.so does not load under torch" in done.stdout, done.stderr
    assert (
        python(["-c", CUDA_TORCH], with_broken_library, XMLKERNELS_CUDA="0").stdout
        == "XMLKERNELS_CUDA=0\n"
    )


def test_demanded_cuda_kernels_that_are_missing_are_an_import_error(without_library: Path) -> None:
    done = python(["-c", CUDA_TORCH], without_library, XMLKERNELS_CUDA="1")
    assert done.returncode == 1
    assert "ImportError: xmlkernels: CUDA kernels are required, but the package" in done.stderr


@pytest.mark.skipif(ops.missing is not None, reason=f"CPU kernels are not loaded: {ops.missing}")
def test_native_code_required_reaches_a_cuda_library_that_is_there(tmp_path: Path) -> None:
    """Not built is allowed (a machine may have no nvcc); built and unusable is not."""
    shutil.copytree(
        PACKAGE, tmp_path / "xmlkernels", ignore=shutil.ignore_patterns("_cuda.so", "__pycache__")
    )
    done = python(["-c", CUDA_TORCH], tmp_path, XMLKERNELS_REQUIRE_NATIVE="1")
    assert done.returncode == 0 and "built without CUDA kernels" in done.stdout, done.stderr
    (tmp_path / "xmlkernels" / "_cuda.so").write_bytes(b"not a library")
    done = python(["-c", CUDA_TORCH], tmp_path, XMLKERNELS_REQUIRE_NATIVE="1")
    assert done.returncode == 1
    assert "CUDA kernels are required, but _cuda.so does not load" in done.stderr
    assert (
        python(
            ["-c", CUDA_TORCH], tmp_path, XMLKERNELS_REQUIRE_NATIVE="1", XMLKERNELS_CUDA="0"
        ).returncode
        == 0
    )
