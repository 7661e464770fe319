"""What is built compiles against the oldest torch and configures with the oldest CMake that
pyproject.toml names (oldest.py fetches them).
"""

import re
import sys
from pathlib import Path

import pytest

import oldest
from nvcc import ROOT, TORCH, bound, need_nvcc, run

pytestmark = pytest.mark.compile

# In libtorch_cuda, of which the wheel without CUDA has the declaration alone.
OF_CUDA = {"aoti_torch_get_current_cuda_stream"}


@pytest.mark.parametrize("torch_of", ["installed", "oldest"])
@pytest.mark.parametrize("name", ["bindings_cpu.cpp", "bindings_cuda.cpp"])
def test_the_oldest_torch_has_all_that_is_called(name: str, torch_of: str) -> None:
    """Compiled against either's headers, so that what is built with a newer torch loads too."""
    called = set(
        re.findall(r" U (\S+)", run(["nm", "--undefined-only", str(bound(name, torch_of))]))
    )
    called = {symbol for symbol in called if symbol.startswith(oldest.ABI)}
    exported = set((oldest.folder() / oldest.EXPORTS).read_text("utf-8").split())
    assert called - OF_CUDA <= exported, sorted(called - OF_CUDA - exported)
    assert len(called) > 20 and (OF_CUDA <= called) == (name == "bindings_cuda.cpp")


def test_the_stable_abi_is_that_of_the_oldest_torch() -> None:
    major, minor, _ = map(int, oldest.oldest("torch").split("."))
    version = f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}"
    assert (ROOT / "CMakeLists.txt").read_text("utf-8").count("TORCH_TARGET_VERSION") == 2
    assert (ROOT / "CMakeLists.txt").read_text("utf-8").count(version) == 2


@pytest.mark.parametrize("part", ["cpu", "cuda"])
def test_the_oldest_cmake_configures_the_build(part: str, tmp_path: Path) -> None:
    """CMake 3.25.1, Debian 12's, refuses a CMAKE_CUDA_STANDARD of 20 for any nvcc."""
    version = oldest.oldest("cmake")
    source = (ROOT / "CMakeLists.txt").read_text("utf-8")
    assert f"cmake_minimum_required(VERSION {version.removesuffix('.0')})\n" in source
    cmake = oldest.folder() / "cmake" / "cmake" / "data" / "bin" / "cmake"
    assert f"cmake version {version}\n" in run([str(cmake), "--version"])
    options = {"TORCH_ROOT": TORCH, "XMLKERNELS_PACKAGE": tmp_path / "package"}
    options |= {"Python_EXECUTABLE": sys.executable, "CMAKE_BUILD_TYPE": "Release"}
    if part == "cuda":
        options |= {"XMLKERNELS_CUDA_ARCHS": "80-real;90a", "CMAKE_CUDA_COMPILER": need_nvcc()}
    given = [f"-D{name}={value}" for name, value in options.items()]
    run([str(cmake), "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", *given])
    commands = (tmp_path / "compile_commands.json").read_text("utf-8")
    if part == "cuda":
        lines = [line for line in commands.splitlines() if '"command"' in line and ".cu " in line]
        assert lines and all("sm_90a" in line for line in lines)
        assert {tuple(re.findall(r"-std=\S+", line)) for line in lines} == {("-std=c++20",)}
    else:
        assert "bindings_cpu.cpp" in commands


@pytest.mark.parametrize("required", ["0", "1"])
def test_without_the_oldest_tools_it_skips_and_says_so(
    required: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Skipped, or failed where they are required."""
    monkeypatch.setenv("XMLKERNELS_OLDEST", str(tmp_path / "none"))
    monkeypatch.setenv("XMLKERNELS_REQUIRE_OLDEST", required)
    outcome = pytest.fail.Exception if required == "1" else pytest.skip.Exception
    with pytest.raises(outcome, match="oldest.py"):
        oldest.folder.__wrapped__()
