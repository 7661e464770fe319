"""The native build: one CMake run, driven from here so that pip needs no other command.

Nothing imports torch at module level: its headers are found in the target environment, and without
them (or without a compiler, or with XMLKERNELS_NATIVE=0) the package is built as pure Python, which
says so in one line. XMLKERNELS_REQUIRE_NATIVE=1 turns that into a failed build. A wheel of pure
Python says so in its name (py3-none-any), one with libraries names the platform that they were
built for.

The CUDA kernels are a library of their own, built after the others where nvcc and a torch with CUDA
are found; without nvcc the build says so in one line and goes on. XMLKERNELS_CUDA=0 leaves them
out, 1 demands them (and builds them against a CPU-only torch too, where they compile but cannot be
loaded). XMLKERNELS_CUDA_ARCHS="80;90a" names the architectures; without it those of the cards
found, or the common ones. For sm_90a the library has one kernel more where CUTLASS's headers are
found: those of the wheel nvidia-cutlass (pip install --no-deps nvidia-cutlass==4.2.0.0), or in the
folder that XMLKERNELS_CUTLASS names; without them the build says so in one line and goes on.

XMLKERNELS_SANITIZE=1 builds the CPU kernels and the parser under AddressSanitizer and
UndefinedBehaviorSanitizer, to look for faults of memory: LD_PRELOAD=$(gcc
-print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 python -m pytest tests/ops
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

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
    if not (
        Path(torch.origin).parent / "include" / "torch" / "csrc" / "stable" / "library.h"
    ).exists():
        return "this torch has no stable-ABI headers (2.11 or later is needed)"
    if (
        find_tool(os.environ.get("CXX", "c++")) is None
        and find_tool("g++") is None
        and find_tool("clang++") is None
    ):
        return "no C++ compiler"
    for tool in ("cmake", "ninja"):
        if find_tool(tool) is None:
            return f"no {tool}"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    return None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    places = [os.environ.get("CUDACXX"), f"{home}/bin/nvcc", "/usr/local/cuda/bin/nvcc", "nvcc"]
    return next((found for place in places if place and (found := find_tool(place))), None)


def missing_cuda_piece(torch_root: Path) -> str | None:
    """The reason why the CUDA kernels cannot or shall not be built, or None."""
    wanted = os.environ.get("XMLKERNELS_CUDA")
    if wanted == "0":
        return "XMLKERNELS_CUDA=0"
    if wanted != "1" and not (torch_root / "lib" / "libtorch_cuda.so").exists():
        return "this torch has no CUDA"
    if find_nvcc() is None:
        return "no nvcc (looked at CUDACXX, CUDA_HOME, /usr/local/cuda and PATH)"
    return None


CARD = r"^(\d+)\.(\d)$"  # 9.0, a card's compute capability


def known_archs() -> list[int]:
    """The architectures that nvcc compiles for, ascending; none if it does not say."""
    nvcc = find_nvcc()
    if nvcc is None:
        return []
    ask = [nvcc, "--list-gpu-code"]
    done = subprocess.run(ask, capture_output=True, text=True, timeout=60, check=False)
    return sorted({int(n) for n in re.findall(r"\bsm_(\d+)\b", done.stdout)})


def cuda_arch(known: list[int], card: int) -> str:
    """What CMake is told for one card.

    A card newer than nvcc takes the newest older code, through its driver's compiler.
    """
    older = [arch for arch in known if arch < card]
    if older and card not in known:
        return str(older[-1])
    return f"{card}{'a' if card == 90 else ''}-real"


def cuda_archs() -> str:
    """CMake's list of architectures: as asked, else those of the cards here, else the common
    ones.
    """
    asked = os.environ.get("XMLKERNELS_CUDA_ARCHS")
    if asked:
        return asked
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
        cards = sorted({int(a) * 10 + int(b) for a, b in re.findall(CARD, done.stdout, re.M)})
        if done.returncode == 0 and cards:
            named = dict.fromkeys(map(partial(cuda_arch, known_archs()), cards))
            return ";".join(n for n in named if n.removesuffix("-real") not in named.keys() - {n})
    return "80-real;86-real;89;90a-real"  # newer cards take the 89 through their driver's compiler


def find_cutlass() -> Path | None:
    """The folder with CUTLASS's headers."""
    named = os.environ.get("XMLKERNELS_CUTLASS")
    wheel = importlib.util.find_spec("cutlass_library")  # of nvidia-cutlass; not imported
    places = [Path(named)] if named else []
    if not named and wheel is not None and wheel.origin is not None:
        places.append(Path(wheel.origin).parent / "source" / "include")
    return next((p for p in places if (p / "cute" / "tensor.hpp").is_file()), None)


class FreshBuild(build_py):
    """Begins with an empty package: what an earlier build left in build/ would go into the wheel,
    libraries of other sources and modules that are no more."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "xmlkernels", ignore_errors=True)
        super().run()


class TaggedWheel(bdist_wheel):
    """Names the wheel after what was built: whether there is native code in it is only known
    afterwards.
    """

    def run(self) -> None:
        if not self.skip_build:
            self.run_command("build")
            self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


class CMakeBuild(build_ext):
    """Builds every native library in one CMake run, straight into the package folder."""

    def run(self) -> None:
        reason = missing_piece()
        if reason is None:
            try:
                self.build_with_cmake("cmake")
                self.build_cuda()
                return
            except subprocess.CalledProcessError as error:
                reason = f"the build failed with exit status {error.returncode}, see above"
        if os.environ.get("XMLKERNELS_REQUIRE_NATIVE") == "1":
            raise SystemExit(
                f"xmlkernels: native code is required (XMLKERNELS_REQUIRE_NATIVE=1) but {reason}"
            )
        print(
            f"xmlkernels: built as pure Python, every op runs on its slow reference: {reason}",
            file=sys.stderr,
        )
        self.extensions = []
        self.distribution.ext_modules = []

    def build_cuda(self) -> None:
        torch = importlib.util.find_spec("torch")
        assert torch is not None and torch.origin is not None
        reason = missing_cuda_piece(Path(torch.origin).parent)
        demanded = os.environ.get("XMLKERNELS_CUDA") == "1"
        # An older build's library would be loaded beside newer schemas.
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        (package / "xmlkernels" / "_cuda.so").unlink(missing_ok=True)
        if reason is None:
            try:
                archs = cuda_archs()
                cutlass = find_cutlass() if "90a" in archs else None
                if "90a" in archs and cutlass is None:
                    print(
                        "xmlkernels: built without the CUTLASS kernel for sm_90a: no headers "
                        "(nvidia-cutlass, XMLKERNELS_CUTLASS)",
                        file=sys.stderr,
                    )
                options = [
                    f"-DXMLKERNELS_CUDA_ARCHS={archs}",
                    f"-DXMLKERNELS_CUTLASS={cutlass or ''}",
                    f"-DCMAKE_CUDA_COMPILER={find_nvcc()}",
                ]
                self.build_with_cmake("cmake_cuda", *options)
                return
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                reason = f"the build failed, see above ({type(error).__name__})"
                demanded |= os.environ.get("XMLKERNELS_REQUIRE_NATIVE") == "1"
        if demanded:
            raise SystemExit(
                f"xmlkernels: CUDA kernels are required but {reason}; XMLKERNELS_CUDA=0 leaves "
                "them out"
            )
        if reason not in ("XMLKERNELS_CUDA=0", "this torch has no CUDA"):
            print(f"xmlkernels: built without CUDA kernels: {reason}", file=sys.stderr)

    def build_with_cmake(self, folder: str, *more: str) -> None:
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        work = Path(self.build_temp).resolve() / folder
        work.mkdir(parents=True, exist_ok=True)
        cmake, torch = find_tool("cmake"), importlib.util.find_spec("torch")
        assert cmake is not None and torch is not None and torch.origin is not None
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(work),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DTORCH_ROOT={Path(torch.origin).parent}",
            f"-DXMLKERNELS_SANITIZE={int(os.environ.get('XMLKERNELS_SANITIZE') == '1')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DXMLKERNELS_PACKAGE={package / 'xmlkernels'}",
            *more,
        ]
        subprocess.run(configure, check=True)
        subprocess.run(
            [cmake, "--build", str(work), *(["--verbose"] if self.verbose > 1 else [])], check=True
        )

    def get_outputs(self) -> list[str]:
        return [str(p) for p in Path(self.build_lib, "xmlkernels").glob("*.so")]


# The one extension stands for all that CMake builds: with it setuptools builds for a platform.
setup(
    ext_modules=[Extension("xmlkernels._host", sources=[])],
    cmdclass={"build_py": FreshBuild, "build_ext": CMakeBuild, "bdist_wheel": TaggedWheel},
)
