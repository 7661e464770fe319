"""The build: what it says and does where native code cannot be built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "setup.py",
            "-q",
            "build_ext",
            "--build-lib",
            str(tmp_path / "lib"),
            "--build-temp",
            str(tmp_path / "temp"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("XMLKERNELS_")} | environment,
    )


def test_without_native_code_the_build_goes_on_and_says_so_in_one_line(tmp_path: Path) -> None:
    done = build(tmp_path, XMLKERNELS_NATIVE="0")
    assert done.returncode == 0
    told = [line for line in done.stderr.splitlines() if "pure Python" in line]
    assert len(told) == 1 and "XMLKERNELS_NATIVE=0" in told[0]
    assert not list(tmp_path.rglob("*.so"))


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    done = build(tmp_path, XMLKERNELS_NATIVE="1", PATH=str(tools), CXX="no-such-compiler")
    assert done.returncode == 0
    assert "no C++ compiler" in done.stderr


@pytest.mark.parametrize("setting", [{"XMLKERNELS_NATIVE": "0"}, {"CXX": "no-such-compiler", "PATH": ""}])
def test_required_native_code_fails_the_build(tmp_path: Path, setting: dict[str, str]) -> None:
    done = build(tmp_path, XMLKERNELS_REQUIRE_NATIVE="1", **setting)
    assert done.returncode != 0
    assert "XMLKERNELS_REQUIRE_NATIVE=1" in done.stderr


def test_setup_imports_no_torch() -> None:
    code = "import runpy, sys; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def settings(**environment: str) -> list[str]:
    """What setup.py makes of the environment: why no CUDA kernels, and for which architectures."""
    code = (
        "import runpy, sys, pathlib, os\n"
        "sys.argv = ['setup.py', '--version']\n"
        "s = runpy.run_path('setup.py')\n"
        "print(s['missing_cuda_piece'](pathlib.Path(os.environ['TORCH'])))\n"
        "print(s['cuda_archs']())\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("XMLKERNELS_", "CUDA"))}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=clean | environment)
    return done.stdout.splitlines()[-2:]


def tool(folder: Path, name: str, text: str = "exit 0") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_which_cuda_kernels_are_built(tmp_path: Path) -> None:
    library = tmp_path / "cuda_torch" / "lib" / "libtorch_cuda.so"
    library.parent.mkdir(parents=True)
    library.touch()
    with_cuda, without = str(tmp_path / "cuda_torch"), str(tmp_path)
    nvcc = str(tool(tmp_path / "toolkit" / "bin", "nvcc"))
    assert settings(TORCH=without, CUDACXX=nvcc)[0] == "this torch has no CUDA"
    assert settings(TORCH=without, CUDACXX=nvcc, XMLKERNELS_CUDA="1")[0] == "None"
    assert settings(TORCH=with_cuda, CUDACXX=nvcc)[0] == "None"
    assert settings(TORCH=with_cuda, CUDA_HOME=str(tmp_path / "toolkit"))[0] == "None"
    assert settings(TORCH=with_cuda, CUDACXX=nvcc, XMLKERNELS_CUDA="0")[0] == "XMLKERNELS_CUDA=0"


def test_the_architectures_are_those_of_the_cards(tmp_path: Path) -> None:
    smi = tool(tmp_path, "nvidia-smi", "printf '9.0\\n8.9\\n9.0\\n'").parent
    path = f"{smi}{os.pathsep}{os.environ.get('PATH', '')}"
    assert settings(TORCH=str(tmp_path), PATH=path)[1] == "89-real;90a-real"
    assert settings(TORCH=str(tmp_path), PATH=path, XMLKERNELS_CUDA_ARCHS="80;90a")[1] == "80;90a"
    tool(tmp_path, "nvidia-smi", "echo no devices were found; exit 9")
    assert settings(TORCH=str(tmp_path), PATH=path)[1] == "80-real;86-real;89;90a-real"
