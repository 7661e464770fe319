"""The installed package: a wheel in an environment of its own, used from another folder."""

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
from pathlib import Path

import pytest
from test_build import ROOT, copied, wheel_of

V1 = ROOT / "tests" / "fixtures" / "v1"
BUILT = sorted((ROOT / "xmlkernels").glob("*.so"))
# In place of the compilers: the libraries that were built for the tests.
COPY = """
cmake_minimum_required(VERSION 3.26)
project(copy LANGUAGES NONE)
file(COPY {files} DESTINATION ${{XMLKERNELS_PACKAGE}} FOLLOW_SYMLINK_CHAIN)
"""


class Environment:
    """A virtual environment with the calling Python's packages and this wheel.

    Its processes run in `folder`, with nothing of the checkout on their path.
    """

    def __init__(self, at: Path, wheel: Path) -> None:
        self.folder, self.root = at / "elsewhere", at / "venv"
        self.folder.mkdir()
        quiet = ["-q", "--disable-pip-version-check"]
        run([sys.executable, "-m", "venv", "--without-pip", str(self.root)])
        self.python = self.root / "bin" / "python"
        own = sysconfig.get_path("purelib", "venv", {"base": str(self.root)})
        # Those of the packages alone: links to a checkout that they hold are not followed.
        theirs = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        assert theirs, site.getsitepackages()
        (Path(own) / "_theirs.pth").write_text("".join(f"{path}\n" for path in theirs))
        install = ["install", *quiet, "--no-deps", "--no-index", str(wheel)]
        run([sys.executable, "-m", "pip", *quiet, "--python", str(self.python), *install])

    def __call__(self, *words: object) -> str:
        """Standard output of a process of this environment."""
        command = [str(self.root / "bin" / str(words[0])), *map(str, words[1:])]
        return run(command, cwd=self.folder).stdout


def run(words: list[str], cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    # What the caller demands of its own build (XMLKERNELS_REQUIRE_NATIVE=1) is not asked of these.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("XMLKERNELS_")}
    clean = {k: v for k, v in kept.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        words, cwd=cwd, env=clean, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Built without native code: every op runs on its reference."""
    at = tmp_path_factory.mktemp("pure")
    name, _, _ = wheel_of(copied(at), at / "wheel", XMLKERNELS_NATIVE="0")
    return Environment(at, at / "wheel" / name)


def test_commands_train_and_predict_from_another_folder(pure: Environment) -> None:
    texts = [f"w{n % 7} w{n % 3} w{n}" for n in range(24)]
    (pure.folder / "X.txt").write_text("".join(f"{text}\n" for text in texts))
    (pure.folder / "Y.txt").write_text("".join(f"{n % 7}\n" for n in range(24)))
    files = ["--train-text", "X.txt", "--train-labels", "Y.txt", "--test-text", "X.txt"]
    files += ["--test-labels", "Y.txt", "--tokenizer", V1 / "encoder", "--max-length", 8]
    assert "7 labels" in pure("xmlkernels", "prepare", *files, "--output", "data")
    module = ("python", "-m", "xmlkernels")
    small = ("--epochs", 1, "--batch", 8, "--threads", 1, "--device", "cpu")
    told = pure(*module, "train", "tiny", "--dataset", "data", "--output", "run", *small)
    assert "ask it: " in told and "--checkpoint run" in told
    metrics = json.loads((pure.folder / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 3 and metrics["commit"].startswith("version ")
    answer = json.loads(pure("xmlkernels", "predict", "--checkpoint", "run", "--text", "w0 w1"))
    assert len(answer["labels"]) == 7


def test_it_is_the_installed_package_without_native_code(pure: Environment) -> None:
    code = "import xmlkernels as xk; print(xk.__file__, xk.__version__, xk.ops.missing is None)"
    path, version, native = pure("python", "-c", code).split()
    assert path.startswith(str(pure.root)) and native == "False"
    assert pure("xmlkernels", "--version").split() == ["xmlkernels", version]


@pytest.mark.skipif(not BUILT, reason="nothing was built here")
def test_a_native_wheel_and_the_public_names(tmp_path: Path) -> None:
    sources = copied(tmp_path)
    files = " ".join(f'"{path.resolve()}"' for path in BUILT)
    (sources / "CMakeLists.txt").write_text(COPY.format(files=files))
    name, inside, _ = wheel_of(sources, tmp_path / "wheel")
    assert not name.endswith("-any.whl") and "xmlkernels/py.typed" in inside
    installed = Environment(tmp_path, tmp_path / "wheel" / name)
    shutil.copytree(V1, installed.folder / "v1")
    code = """
        import xmlkernels as xk
        texts = [f"w{n % 7} w{n % 3}" for n in range(24)]
        labels = [[f"label {n % 7}"] for n in range(24)]
        data = xk.Dataset.from_texts("data", (texts, labels), tokenizer="v1/encoder", max_length=8)
        tiny = xk.RECIPES["tiny"].replace(dataset="data", output="run", epochs=1, threads=1)
        xk.train(tiny)
        (answer,) = xk.load("run").predict(["w0 w1"], k=2)
        print(xk.ops.missing, len(answer), xk.__file__)
    """
    *_, last = installed("python", "-c", textwrap.dedent(code)).splitlines()
    missing, answers, path = last.split()
    assert (missing, answers) == ("None", "2") and path.startswith(str(installed.root))


def test_the_sources_of_a_release_hold_what_a_build_needs(tmp_path: Path) -> None:
    sources = copied(tmp_path)
    for name in ("MANIFEST.in", "CMakeLists.txt", "CHANGELOG.md"):
        shutil.copy(ROOT / name, sources / name)
    shutil.copytree(ROOT / "csrc", sources / "csrc")
    shutil.copytree(ROOT / "tests" / "ops", sources / "tests" / "ops")
    run([sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)], cwd=sources)
    (made,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    needed |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "xmlkernels/py.typed", "LICENSE"}
    assert needed <= held
    assert not [name for name in held if name.startswith("tests") or name.endswith(".so")]
