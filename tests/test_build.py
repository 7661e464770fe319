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
