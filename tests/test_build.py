"""The build: what it says and does where native code cannot be built."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import xmlkernels

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
        timeout=600,
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


@pytest.mark.parametrize(
    "setting", [{"XMLKERNELS_NATIVE": "0"}, {"CXX": "no-such-compiler", "PATH": ""}]
)
def test_required_native_code_fails_the_build(tmp_path: Path, setting: dict[str, str]) -> None:
    done = build(tmp_path, XMLKERNELS_REQUIRE_NATIVE="1", **setting)
    assert done.returncode != 0
    assert "XMLKERNELS_REQUIRE_NATIVE=1" in done.stderr


# ---- wheels ----

# In place of the compilers: it writes the libraries while it is configured.
STUB = """
cmake_minimum_required(VERSION 3.26)
project(stub LANGUAGES NONE)
foreach(name _cpu.so _host.cpython-abi.so)
  file(WRITE ${XMLKERNELS_PACKAGE}/${name} "library")
endforeach()
"""


def copied(at: Path) -> Path:
    """A copy of all that a wheel without native code is made of, and nothing that was built."""
    folder = at / "sources" / "xmlkernels"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT / "xmlkernels", folder / "xmlkernels", ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("sources"))


def wheel_of(sources: Path, output: Path, **environment: str) -> tuple[str, list[str], str]:
    """Name of the wheel that these sources make, the names of its files and its metadata."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--disable-pip-version-check",
        "--no-index",
    ]
    clean = (
        {k: v for k, v in os.environ.items() if not k.startswith("XMLKERNELS_")}
        | {"XMLKERNELS_CUDA": "0"}
        | environment
    )
    done = subprocess.run(
        [*command, "--no-build-isolation", "--no-deps", "-w", str(output), str(sources)],
        capture_output=True,
        text=True,
        env=clean,
        cwd=output.parent,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (made,) = output.glob("*.whl")
    with zipfile.ZipFile(made) as archive:
        files = archive.namelist()
        return (
            made.name,
            files,
            "".join(archive.read(n).decode() for n in files if n.endswith(("/METADATA", "/WHEEL"))),
        )


def libraries(files: list[str]) -> list[str]:
    return sorted(name for name in files if name.endswith(".so"))


def test_a_wheel_says_whether_it_is_of_a_platform_and_holds_nothing_of_an_earlier_build(
    sources: Path, tmp_path: Path
) -> None:
    """One tree, built natively, then where the compiler fails, then without: build/ holds the
    libraries of the first.
    """
    (sources / "CMakeLists.txt").write_text(STUB)
    name, files, about = wheel_of(sources, tmp_path / "native")
    assert re.search(r"-cp3\d+-cp3\d+-\w+\.whl$", name) and not name.endswith("-any.whl"), name
    assert libraries(files) == ["xmlkernels/_cpu.so", "xmlkernels/_host.cpython-abi.so"]
    assert "Root-Is-Purelib: false" in about
    assert list((sources / "build").rglob("_cpu.so"))

    for place in (sources / "build").glob("lib*"):
        (place / "xmlkernels" / "no_more.py").write_text("")
    (sources / "CMakeLists.txt").write_text("message(FATAL_ERROR nothing)\n")
    name, files, about = wheel_of(sources, tmp_path / "failed")
    assert name.endswith("-py3-none-any.whl")
    assert libraries(files) == []
    assert "Root-Is-Purelib: true" in about
    assert {
        "xmlkernels/predict/model.py",
        "xmlkernels/py.typed",
        "xmlkernels/serve/page.html",
    } <= set(files)
    assert f"Version: {xmlkernels.__version__}\n" in about and "xmlkernels/no_more.py" not in files

    for place in ("lib", *(p.name for p in (sources / "build").glob("lib*"))):
        stale = sources / "build" / place / "xmlkernels" / "_cpu.so"
        stale.parent.mkdir(parents=True, exist_ok=True)
        stale.write_text("library")
    name, files, about = wheel_of(sources, tmp_path / "pure", XMLKERNELS_NATIVE="0")
    assert name.endswith("-py3-none-any.whl") and libraries(files) == []
    assert "Requires-Dist: torch" in about and "Requires-Dist: pyarrow" in about


def project() -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"])


def test_what_is_installed_for_tests_is_what_the_package_names() -> None:
    """requirements.txt pins every package of pyproject.toml, within its bounds."""
    extras = project()["optional-dependencies"]
    named = project()["dependencies"] + [
        name for extra, names in extras.items() if extra != "all" for name in names
    ]
    pins = dict(
        re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text("utf-8"), re.M)
    )
    for requirement in map(Requirement, named):
        assert requirement.name in pins, f"requirements.txt lacks {requirement.name}"
        assert requirement.specifier.contains(pins[requirement.name]), requirement
    (everything,) = map(Requirement, extras["all"])
    assert everything.extras == set(extras) - {"all"}


def test_every_dependency_is_imported_somewhere() -> None:
    """One that nothing imports is a download for nothing."""
    named = [name for names in project()["optional-dependencies"].values() for name in names]
    named = project()["dependencies"] + [name for name in named if "xmlkernels" not in name]
    imports = {"scikit-learn": "sklearn", "prometheus-client": "prometheus_client"}
    imports |= {"faiss-cpu": "faiss"}
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "xmlkernels").rglob("*.py"))
    for requirement in named:
        package = re.split(r"[<>=~! \[]", requirement)[0]
        module = imports.get(package, package)
        assert re.search(rf"^\s*(import|from) {module}\b", sources, re.MULTILINE), package


def test_setup_imports_no_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py'); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def settings(**environment: str) -> list[str]:
    """What setup.py makes of the environment: where CUTLASS is, why no CUDA kernels, and for which
    architectures.
    """
    code = (
        "import runpy, sys, pathlib, os\n"
        "sys.argv = ['setup.py', '--version']\n"
        "s = runpy.run_path('setup.py')\n"
        "print(s['find_cutlass']())\n"
        "print(s['missing_cuda_piece'](pathlib.Path(os.environ['TORCH'])))\n"
        "print(s['cuda_archs']())\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("XMLKERNELS_", "CUDA"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=clean | environment,
    )
    return done.stdout.splitlines()[-3:]


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
    assert settings(TORCH=without, CUDACXX=nvcc)[1] == "this torch has no CUDA"
    assert settings(TORCH=without, CUDACXX=nvcc, XMLKERNELS_CUDA="1")[1] == "None"
    assert settings(TORCH=with_cuda, CUDACXX=nvcc)[1] == "None"
    assert settings(TORCH=with_cuda, CUDA_HOME=str(tmp_path / "toolkit"))[1] == "None"
    assert settings(TORCH=with_cuda, CUDACXX=nvcc, XMLKERNELS_CUDA="0")[1] == "XMLKERNELS_CUDA=0"


def test_the_architectures_are_those_of_the_cards(tmp_path: Path) -> None:
    smi = tool(tmp_path, "nvidia-smi", "printf '9.0\\n8.9\\n9.0\\n'").parent
    path = f"{smi}{os.pathsep}{os.environ.get('PATH', '')}"
    assert settings(TORCH=str(tmp_path), PATH=path)[2] == "89-real;90a-real"
    assert settings(TORCH=str(tmp_path), PATH=path, XMLKERNELS_CUDA_ARCHS="80;90a")[2] == "80;90a"
    tool(tmp_path, "nvidia-smi", "printf '10.0\\n12.0\\n9.0\\n'")
    nvcc = str(tool(tmp_path, "nvcc", "printf 'sm_80\\nsm_89\\nsm_90\\nsm_100\\n'"))
    assert settings(TORCH=str(tmp_path), PATH=path, CUDACXX=nvcc)[2] == "90a-real;100"
    tool(tmp_path, "nvidia-smi", "echo no devices were found; exit 9")
    assert settings(TORCH=str(tmp_path), PATH=path)[2] == "80-real;86-real;89;90a-real"


def test_where_the_headers_of_cutlass_are_found(tmp_path: Path) -> None:
    """In the folder that is named, which must have them; else in the wheel nvidia-cutlass."""
    path, torch = tmp_path / "cutlass_library" / "__init__.py", str(tmp_path)
    named, wheel = tmp_path / "named", path.parent / "source" / "include"
    for include in (named, wheel):
        (include / "cute").mkdir(parents=True)
        (include / "cute" / "tensor.hpp").touch()
    path.write_text("raise AssertionError('it was imported')\n")
    assert settings(TORCH=torch, PYTHONPATH=torch)[0] == str(wheel)
    both = {"TORCH": torch, "PYTHONPATH": torch}
    assert settings(**both, XMLKERNELS_CUTLASS=str(named))[0] == str(named)
    assert settings(**both, XMLKERNELS_CUTLASS=str(tmp_path))[0] == "None"
    assert settings(TORCH=torch, PYTHONPATH="")[0] == "None"
