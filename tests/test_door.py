"""The door: `import xmlkernels` is quick and loads nothing heavy; every public name is there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import xmlkernels as xk
from xmlkernels import InputError
from xmlkernels.training.config import Config

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "xmlkernels" / "__init__.py").read_text("utf-8")
HEAVY = ("torch", "numpy", "numba", "scipy", "sklearn", "transformers", "tokenizers", "rich")


def fresh(code: str) -> str:
    """Standard output of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_the_import_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time; before = time.process_time(); import xmlkernels; "
        "print(time.process_time() - before, *sys.modules)"
    )
    seconds, *modules = fresh(code).split()
    assert float(seconds) <= 0.1
    assert not {name.split(".")[0] for name in modules} & set(HEAVY)


def test_a_name_loads_what_it_needs_alone() -> None:
    code = "import sys, xmlkernels; xmlkernels.evaluate; print(*sys.modules)"
    loaded = {name.split(".")[0] for name in fresh(code).split()}
    assert "numpy" in loaded and not loaded & {"transformers", "tokenizers", "rich"}


@pytest.mark.parametrize("name", xk.__all__)
def test_every_public_name_is_there_and_explained(name: str) -> None:
    value = getattr(xk, name)
    assert name in dir(xk)
    if callable(value):
        assert value.__doc__ and value.__module__.startswith("xmlkernels."), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Datset'"):
        xk.Datset  # noqa: B018
    with pytest.raises(ImportError):
        from xmlkernels import Datset  # noqa: F401


def test_type_checkers_are_told_the_same() -> None:
    (block,) = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.If)]
    told = {
        alias.name: (node.module or "").removeprefix("xmlkernels.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told.pop("ops") == "xmlkernels"
    assert told == xk._HOME
    assert set(told) | {"InputError", "__version__", "ops"} == set(xk.__all__)


def test_no_public_name_is_a_module_too() -> None:
    """Importing such a module would put it in the place of the name."""
    modules = {path.stem for path in (ROOT / "xmlkernels").iterdir()}
    assert set(xk.__all__) & modules == {"ops"}


def test_the_package_goes_through_its_rooms_not_through_the_door() -> None:
    """Else the arrows would say nothing."""
    for path in (ROOT / "xmlkernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "xmlkernels":
                taken = {alias.name for alias in node.names} & set(xk.__all__)
                inside = path.name == "__init__.py" and path.parent.name == "xmlkernels"
                allowed = {"InputError", "__version__"} | ({"ops"} if inside else set())
                assert taken <= allowed, f"{path}: {taken}"


def test_a_configuration_is_changed_by_name() -> None:
    changed = Config().replace(epochs=3, output="elsewhere")
    assert (changed.epochs, changed.output, changed.batch) == (3, "elsewhere", Config().batch)
    with pytest.raises(InputError, match="epoch: expected a setting of Config.*mean epochs"):
        Config().replace(epoch=3)


def test_a_recipe_of_another_kind_is_changed_and_run_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="longst: expected a setting of LinearConfig.*longest"):
        xk.RECIPES["linear"].replace(longst=1)
    with pytest.raises(InputError, match="epoch: expected a setting of Config.*epochs"):
        xk.RECIPES["minilm"].replace(epoch=1)
    with pytest.raises(InputError, match="nowhere"):
        xk.train(
            xk.RECIPES["linear"].replace(
                dataset=str(tmp_path / "nowhere"), output=str(tmp_path / "out")
            )
        )


def test_a_ranker_and_a_run_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "ranker").mkdir()
    (tmp_path / "ranker" / "ranker.safetensors").touch()
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    with pytest.raises(InputError, match="got one of a ranker; give it without the flag"):
        xk.Predictor.load(tmp_path / "ranker")
    with pytest.raises(InputError, match="got one of a run; give it as --checkpoint"):
        xk.RankedPredictor.load(tmp_path / "run")
