"""`xmlkernels.native`: the native library is found, required, or replaced by the references, and the user is told."""

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
        dx, _ = ops.bce_step_(w.clone(), x.detach(), row, sample, torch.tensor([0.1, 0, 0, 0, 0, 1, 1]), torch.tensor([0, 0]))
assert before == 0, "a warning before the first call"
assert values.tolist() == [[3, 3], [3, 3]] and rows.tolist() == [[0, 1], [0, 1]]
assert abs(float(loss) - 21.3) < 0.3 and dx.shape == (2, 3)
for one in caught:
    print(f"{one.category.__name__}: {one.message}")
"""


def python(code: list[str], package: Path = PACKAGE.parent, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs python with the package of `package` first on its path, and only the given of the package's variables."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("XMLKERNELS_")}
    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, timeout=120, cwd=package,
        env=clean | {"PYTHONPATH": str(package)} | variables,
    )  # fmt: skip


@pytest.fixture(scope="module")
def without_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package as it is built without native code."""
    folder = tmp_path_factory.mktemp("pure")
    shutil.copytree(PACKAGE, folder / "xmlkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


@pytest.fixture(scope="module")
def with_broken_library(tmp_path_factory: pytest.TempPathFactory, without_library: Path) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(without_library / "xmlkernels", folder / "xmlkernels", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "xmlkernels" / "_cpu.so").write_bytes(b"not a library")
    return folder


def test_switched_off_every_op_runs_on_its_reference_and_warns_once() -> None:
    done = python(["-c", OPS], XMLKERNELS_NATIVE="0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("RuntimeWarning: xmlkernels: ops on cpu run on their slow reference: XMLKERNELS_NATIVE=0.")
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
        "ImportError: xmlkernels: XMLKERNELS_REQUIRE_NATIVE=1, but the package was built without native code; build it with "
        "`pip install --no-build-isolation .` where a C++ compiler and torch are installed"
    )


def test_required_but_broken_or_switched_off_is_an_import_error(with_broken_library: Path) -> None:
    done = python(["-c", "import xmlkernels.ops"], with_broken_library, XMLKERNELS_REQUIRE_NATIVE="1")
    assert done.returncode == 1 and "ImportError: xmlkernels: XMLKERNELS_REQUIRE_NATIVE=1, but _cpu.so does not" in done.stderr
    done = python(["-c", "import xmlkernels.ops"], XMLKERNELS_REQUIRE_NATIVE="1", XMLKERNELS_NATIVE="0")
    assert done.returncode == 1 and "XMLKERNELS_REQUIRE_NATIVE=1, but XMLKERNELS_NATIVE=0;" in done.stderr


def test_the_module_prints_one_line(without_library: Path) -> None:
    done = python(["-m", "xmlkernels.native"], without_library)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "xmlkernels: native library: not loaded, the package was built without native code\n"
    if ops.missing is None:
        assert python(["-m", "xmlkernels.native"]).stdout == "xmlkernels: native library: loaded\n"


@pytest.mark.parametrize("op", ["bce_step_", "bce_loss", "bce_loss_backward"])
def test_gpu_kernels_are_registered_and_not_imported(op: str) -> None:
    """The dispatcher knows them; Triton is imported by the first call with CUDA tensors alone."""
    import torch

    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"xmlkernels::{op}", "CUDA")
    ran = python(["-c", "import sys; from xmlkernels import ops; print('xmlkernels.triton' in sys.modules)"])
    assert ran.stdout.strip() == "False", ran.stderr
