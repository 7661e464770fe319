"""examples/: every program and the notebook run, and give what they promise."""

import json
import logging
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from train_runs import ROOT, threads_kept

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    with threads_kept():
        yield


def example(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(runpy.run_path(str(EXAMPLES / f"{name}.py")))
    return module


def test_every_example_is_listed_and_run_here() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    listed = (EXAMPLES / "README.md").read_text("utf-8")
    here = Path(__file__).read_text("utf-8")
    for name in files:
        assert f"({name})" in listed
        assert name == "products.py" or Path(name).stem in here


def test_train_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = example("train_in_memory").main(str(tmp_path))
    assert {label.name for label in first} >= {"kind: stool", "material: bamboo"}
    assert {label.name for label in second} >= {"kind: clock", "material: marble"}
    assert "folding bamboo stool →" in capsys.readouterr().out


def test_bow_and_ranker(tmp_path: Path) -> None:
    found = example("bow_and_ranker").main(str(tmp_path))
    assert len(found) == 3
    assert min(found.values()) > 70


def test_cascade(tmp_path: Path) -> None:
    report = example("cascade").main(str(tmp_path))
    assert len(report["levels"]) == 2
    assert report["P@3"] > 40


def test_own_encoder_full_head() -> None:
    assert example("own_encoder_full_head").main() > 0.9


def test_label_index(tmp_path: Path) -> None:
    assert example("label_index").main(str(tmp_path))
    assert (tmp_path / "label_vectors.npy").exists()


def test_the_quickstart_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """quickstart.ipynb, cell by cell, as a notebook would; no cell has stored output."""
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text("utf-8"))["cells"]
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), names)
    assert names["report"]["test"]["P@1"] > 80  # type: ignore[index]
    assert sys.path and os.path.isdir("runs/notebook/bow")
