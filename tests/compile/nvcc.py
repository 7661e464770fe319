"""Compiles the CUDA sources with nvcc for cards that need not be here, and reads what the compiler
says of each kernel.
"""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import triton

import oldest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# Device code is optimized without being asked; host code need not be.
FLAGS = [
    "-std=c++20",
    f"-I{ROOT / 'csrc'}",
]
TORCH = Path(torch.__file__).parent
LINKED = "sm_90a"  # for this one the host's part is compiled too, so that the objects link


def find_nvcc() -> str | None:
    """Where setup.py looks too."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    places = [os.environ.get("CUDACXX"), f"{home}/bin/nvcc", "/usr/local/cuda/bin/nvcc", "nvcc"]
    return next((found for place in places if place and (found := shutil.which(place))), None)


def need_nvcc() -> str:
    """nvcc; without it the test is skipped, or fails with XMLKERNELS_REQUIRE_NVCC=1."""
    found = find_nvcc()
    if found is not None:
        return found
    told = (
        "no nvcc (looked at CUDACXX, CUDA_HOME, /usr/local/cuda and PATH): CUDA sources are not "
        "compiled"
    )
    if os.environ.get("XMLKERNELS_REQUIRE_NVCC") == "1":
        pytest.fail(f"XMLKERNELS_REQUIRE_NVCC=1, but {told}")
    pytest.skip(told)


@functools.cache
def folder() -> Path:
    """Of this process; emptied at its end."""
    made = tempfile.TemporaryDirectory(prefix="xmlkernels-nvcc-")
    folder.keep = made  # type: ignore[attr-defined]
    return Path(made.name)


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (
        f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    )
    return done.stdout


@functools.cache
def compiled(source: Path, arch: str) -> Path:
    """One source compiled for one architecture: an object file for LINKED, else device code alone.
    A warning is an error.
    """
    host = ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-c"]
    target = folder() / f"{source.stem}.{arch}.o"
    kind = host if arch == LINKED else ["-cubin"]
    run(
        [
            need_nvcc(),
            *FLAGS,
            f"-arch={arch}",
            "-Werror",
            "all-warnings",
            *kind,
            str(source),
            "-o",
            str(target),
        ]
    )
    return target


@functools.cache
def bound(name: str, torch_of: str) -> Path:
    """bindings_*.cpp compiled against the headers of the installed or the oldest torch."""
    root = TORCH if torch_of == "installed" else oldest.folder() / "torch"
    target = folder() / torch_of / f"{name}.o"
    target.parent.mkdir(exist_ok=True)
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror"]
    stable = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    if name == "bindings_cuda.cpp":
        stable += ["-DUSE_CUDA", "-DXK_CUDA"]
    include = ["-isystem", str(root / "include"), f"-I{ROOT / 'csrc'}"]
    source = str(ROOT / "csrc" / name)
    run(["c++", *flags, *stable, *include, "-c", source, "-o", str(target)])
    return target


def resources(binary: Path) -> dict[str, dict[str, int]]:
    """What each kernel in an object file needs: REG, STACK, SHARED, LOCAL (registers, bytes)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found, kernel = {}, ""
    for line in run([str(tool), "--dump-resource-usage", str(binary)]).splitlines():
        if named := re.match(r"\s*Function (\S+):", line):
            kernel = named[1]
        elif "REG:" in line:
            found[kernel] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    return found
