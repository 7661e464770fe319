"""The native build: one CMake run, driven from here so that pip needs no other command.

Nothing imports torch at module level: its headers are found in the target environment, and without them (or without a
compiler, or with XMLKERNELS_NATIVE=0) the package is built as pure Python, which says so in one line.
XMLKERNELS_REQUIRE_NATIVE=1 turns that into a failed build.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str | None:
    # A virtual environment's bin folder is not on PATH when its python is called by its full name.
    beside = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))


def missing_piece() -> str | None:
    """The reason why native code cannot be built here, or None."""
    if os.environ.get("XMLKERNELS_NATIVE") == "0":
        return "XMLKERNELS_NATIVE=0"
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return "torch is not installed in this environment"
    if not (Path(torch.origin).parent / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        return "this torch has no stable-ABI headers (2.11 or later is needed)"
    if find_tool(os.environ.get("CXX", "c++")) is None and find_tool("g++") is None and find_tool("clang++") is None:
        return "no C++ compiler"
    for tool in ("cmake", "ninja"):
        if find_tool(tool) is None:
            return f"no {tool}"
    return None


class CMakeBuild(build_ext):
    """Builds every native library in one CMake run, straight into the package folder."""

    def run(self) -> None:
        reason = missing_piece()
        if reason is None:
            try:
                self.build_with_cmake()
                return
            except subprocess.CalledProcessError as error:
                reason = f"the build failed with exit status {error.returncode}, see above"
        if os.environ.get("XMLKERNELS_REQUIRE_NATIVE") == "1":
            raise SystemExit(f"xmlkernels: native code is required (XMLKERNELS_REQUIRE_NATIVE=1) but {reason}")
        print(f"xmlkernels: built as pure Python, every op runs on its slow reference: {reason}", file=sys.stderr)
        self.extensions = []

    def build_with_cmake(self) -> None:
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        work = Path(self.build_temp).resolve() / "cmake"
        work.mkdir(parents=True, exist_ok=True)
        cmake, torch = find_tool("cmake"), importlib.util.find_spec("torch")
        assert cmake is not None and torch is not None and torch.origin is not None
        configure = [
            cmake, "-S", str(ROOT), "-B", str(work), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release", f"-DTORCH_ROOT={Path(torch.origin).parent}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-DXMLKERNELS_PACKAGE={package / 'xmlkernels'}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(work), *(["--verbose"] if self.verbose > 1 else [])], check=True)

    def get_outputs(self) -> list[str]:
        return [str(p) for p in Path(self.build_lib, "xmlkernels").glob("*.so")]


# The one extension stands for all that CMake builds; its name only tells setuptools that wheels are not pure Python.
setup(ext_modules=[Extension("xmlkernels._host", sources=[])], cmdclass={"build_ext": CMakeBuild})
