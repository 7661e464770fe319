"""train/end_to_end.py and train/cascade.py: whole scripts that give the bits of train/run.py."""

import ast
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from train_runs import ROOT, make_dataset, make_tree, threads_kept

import xmlkernels as xk
from xmlkernels.checkpoint import CheckpointFolder


def script(name: str) -> ModuleType:
    """A script of train/ as a module."""
    spec = importlib.util.spec_from_file_location(f"loop_{name}", ROOT / "train" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> xk.Dataset:
    return xk.Dataset.open(make_dataset(tmp_path_factory.mktemp("loops")))


def recipe_run(name: str, dataset: xk.Dataset, output: Path, **more: Any) -> dict[str, Any]:
    config = xk.RECIPES[name].replace(
        dataset=str(dataset.folder),
        output=str(output),
        device="cpu",
        table="bf16",
        threads=1,
        **more,
    )
    return xk.train(config)


def assert_same(model: torch.nn.Module, output: Path, which: str) -> None:
    tensors, _ = CheckpointFolder(output / "checkpoint").load(which)
    own = model.state_dict()
    assert len(own) > 20
    for name, value in own.items():
        # What only training needs beside the steps themselves is not in a script of a page.
        if not name.startswith(("skipped", "lost_positives")):
            assert torch.equal(value, tensors[name]), name


def test_end_to_end(
    dataset: xk.Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = script("end_to_end")
    with threads_kept():
        report = recipe_run("tiny", dataset, tmp_path / "run")
        inputs, model = loop.build(dataset)
        loop.train(dataset, inputs, model)
        assert_same(model, tmp_path / "run", "best")
        for name, shown in (("val", "validation"), ("test", "test")):
            found = loop.evaluate(dataset, inputs, model, name)
            assert found == {key: report[shown][key] for key in found}
    assert found["P@1"] > 10 and "test  P@1" in capsys.readouterr().out


def test_cascade(dataset: xk.Dataset, tmp_path: Path) -> None:
    loop, tree = script("cascade"), make_tree(dataset.folder, tmp_path / "tree")
    with threads_kept(), pytest.warns(UserWarning, match="topk of level"):
        report = recipe_run(
            "cascade-tiny", dataset, tmp_path / "run", tree=str(tree), scheme="weighted"
        )
        inputs, model = loop.build(dataset, xk.LabelTree.load(tree))
        loop.train(dataset, inputs, model)
        assert_same(model, tmp_path / "run", "last")
        found = loop.evaluate(dataset, inputs, model, "test")
    if report["best"]["epoch"] == loop.EPOCHS:
        assert found == {key: report["test"][key] for key in found}
    assert found["P@1"] > 10


@pytest.mark.parametrize("name", ["end_to_end", "cascade"])
def test_a_script_is_one_page_on_public_names(name: str) -> None:
    path = ROOT / "train" / f"{name}.py"
    text = path.read_text("utf-8")
    assert text.count("\n") <= 100
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    assert imports
    assert not any(
        part.startswith("_")
        for node in imports
        for part in (*str(node.module).split("."), *(alias.name for alias in node.names))
    )
