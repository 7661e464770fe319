"""Fetches the oldest tools that the project says it builds with: `python oldest.py FOLDER`.

Of torch the headers of the stable ABI and the names that its libraries export, out of the smallest
wheel that has them (macOS, 80 MB; headers and exports are the same on every system but for CUDA's).
Of CMake the whole. Both through pip, once for an environment (`make test`).
"""

import functools
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ("csrc", "headeronly")  # folders below torch/include/torch
LIBRARIES = ("libtorch_cpu.dylib", "libc10.dylib")
EXPORTS = "exports.txt"
ABI = ("aoti_torch_", "torch_")  # how the names of the stable ABI begin


def oldest(package: str) -> str:
    """The lowest version that pyproject.toml allows, as the first release of that series."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    named = settings["project"]["dependencies"] + settings["build-system"]["requires"]
    (found,) = (m[1] for n in named if (m := re.fullmatch(rf"{package}>=(\d+\.\d+)", n)))
    return f"{found}.0"


def exports(library: bytes) -> Iterator[str]:
    """Names that a Mach-O library of 64 bits defines for others, without their leading bar."""
    magic, _, _, _, commands, _, _, _ = struct.unpack_from("<8I", library)
    assert magic == 0xFEEDFACF
    at = 32
    for _ in range(commands):
        command, size = struct.unpack_from("<2I", library, at)
        if command == 2:  # LC_SYMTAB
            symbols, count, strings, _ = struct.unpack_from("<4I", library, at + 8)
            table = library[symbols : symbols + 16 * count]
            for name, kind, _, _, _ in struct.iter_unpack("<IBBHQ", table):
                if kind & 0xEF == 0x0F:  # external, in a section; private or not a debugger's: no
                    end = library.index(b"\0", strings + name)
                    yield library[strings + name + 1 : end].decode()
        at += size


def pip(*arguments: str) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            *arguments,
            "-qq",
            "--no-deps",
        ],
        check=True,
        timeout=1500,
    )


def fetch(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as there:
        wanted = ["--only-binary=:all:", "--platform", "macosx_11_0_arm64", "-d", there]
        pip("download", f"torch=={oldest('torch')}", "--python-version", "3.11", *wanted)
        (wheel,) = Path(there).glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            below = tuple(f"torch/include/torch/{name}/" for name in HEADERS)
            archive.extractall(folder, [n for n in archive.namelist() if n.startswith(below)])
            names = {
                name
                for library in LIBRARIES
                for name in exports(archive.read(f"torch/lib/{library}"))
                if name.startswith(ABI)
            }
    (folder / EXPORTS).write_text("\n".join(sorted(names)) + "\n", "utf-8")
    pip("install", f"cmake=={oldest('cmake')}", "--target", str(folder / "cmake"))


@functools.cache
def folder() -> Path:
    """Where the oldest tools are.

    Without them the test is skipped, or fails with XMLKERNELS_REQUIRE_OLDEST=1.
    """
    found = Path(os.environ.get("XMLKERNELS_OLDEST") or Path(sys.prefix) / "oldest")
    if (found / EXPORTS).is_file() and (found / "cmake").is_dir():
        return found
    told = f"no {found}: `python tests/compile/oldest.py {found}` fetches torch's oldest headers"
    if os.environ.get("XMLKERNELS_REQUIRE_OLDEST") == "1":
        pytest.fail(f"XMLKERNELS_REQUIRE_OLDEST=1, but {told}")
    pytest.skip(told)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]).resolve())
