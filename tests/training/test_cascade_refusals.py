"""Trees, checkpoints and settings that do not fit a cascade are refused in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from train_runs import (
    LABELS,
    RECIPES,
    Config,
    cascade,
    make_dataset,
    make_tree,
    run,
    threads_kept,
)

from xmlkernels import InputError
from xmlkernels.checkpoint import CheckpointFolder, save
from xmlkernels.cli.console import command
from xmlkernels.cli.train import main
from xmlkernels.predict.model import Predictor
from xmlkernels.training.config import recorded
from xmlkernels.tree.label_tree import LabelTree


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def tree(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(dataset, tmp_path_factory.mktemp("tree") / "tree.safetensors")


@pytest.fixture(scope="module")
def finished(dataset: Path, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(cascade(dataset, output, tree))
    return output


Refused = Callable[[Config], str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """What `train/run.py` says of a configuration: one sentence and exit status 2, with nothing
    written.
    """

    def ask(config: Config) -> str:
        known, flags, output = recorded(RECIPES["tiny"].config), ["tiny"], Path(config.output)
        for name, value in recorded(config).items():
            if value is True:
                flags.append(f"--{name}")
            elif value is False and known[name]:
                flags.append(f"--no-{name.replace('_', '-')}")
            elif value != known[name]:
                flags += [
                    f"--{name.replace('_', '-')}",
                    *map(str, value if isinstance(value, list) else [value]),
                ]
        before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
        with threads_kept(), pytest.raises(SystemExit) as ended:
            command(lambda: main(flags))
        told = capsys.readouterr().err
        assert ended.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1, told
        assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
        return told

    return ask


def rewritten(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path, Path], None]:
    """A tree file with other arrays under the same head."""

    def make(good: Path, bad: Path) -> None:
        with safe_open(good, framework="numpy") as file:
            names, head = file.keys(), file.metadata()
            tensors = {name: file.get_tensor(name).copy() for name in names}
        change(tensors)
        save_file(tensors, bad, metadata=head)

    return make


def twice(tensors: dict[str, np.ndarray]) -> None:
    tensors["order"][0] = tensors["order"][1]


def other_dataset(good: Path, bad: Path) -> None:
    tree = LabelTree.load(good)
    LabelTree(tree.children, tree.order, {"dataset": "0" * 64}).save(bad)


@pytest.mark.parametrize(
    ("spoil", "changes", "expected"),
    [
        (other_dataset, {}, "label tree: expected a tree of the dataset"),
        (rewritten(twice), {}, "expected each label in one cluster"),
        (
            rewritten(lambda tensors: tensors.pop("children.0")),
            {},
            "expected order and children.0 to children.R-2",
        ),
        (
            lambda good, bad: bad.write_bytes(good.read_bytes()[:-40]),
            {},
            "expected a whole safetensors file",
        ),
        (
            lambda good, bad: None,
            {},
            "expected a label tree, got no such file; run xmlkernels tree to make it",
        ),
        (shutil.copy, {"topk": (2,)}, "--topk: expected 2 numbers, one for each level of clusters"),
        (
            shutil.copy,
            {"rw_loss": (1.0,) * 4},
            "--rw-loss: expected 3 numbers, one for each level, labels included",
        ),
        (
            shutil.copy,
            {"layers": ()},
            "encoder: expected 3 layers or more, one for each level of the tree, got 2",
        ),
        (
            shutil.copy,
            {"layers": ("1", "2", "5")},
            "expected layers from 0 to 2, those of this encoder, got layer 5",
        ),
        (
            shutil.copy,
            {"ema": 0.9, "ema_every": 31},
            "--ema: expected a mean that begins within the 30 updates of this run",
        ),
        (
            shutil.copy,
            {"warmup": 31},
            "--warmup: expected at most 30 updates, all of this run, got 31",
        ),
        (
            shutil.copy,
            {"freeze": 2},
            "--freeze: expected fewer than 2, the layers of this encoder, got 2",
        ),
    ],
    ids=[
        "another dataset",
        "a label twice",
        "a level missing",
        "cut short",
        "no tree",
        "k",
        "rw_loss",
        "too few layers",
        "a layer too deep",
        "a mean too late",
        "warm-up",
        "frozen whole",
    ],
)
def test_what_does_not_fit_is_told_in_one_sentence(
    spoil: Callable[[Path, Path], Any],
    changes: dict[str, Any],
    expected: str,
    dataset: Path,
    tree: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    spoil(tree, tmp_path / "bad.safetensors")
    assert expected in refused(
        cascade(dataset, tmp_path / "out", tmp_path / "bad.safetensors", **changes)
    )


def test_a_checkpoint_of_another_tree_is_refused(
    dataset: Path, finished: Path, tmp_path: Path, refused: Refused
) -> None:
    """The file that the run names holds another tree of the same shape now."""
    shutil.copytree(finished, tmp_path / "run")
    other = make_tree(dataset, tmp_path / "tree.safetensors", seed=1)
    path = tmp_path / "run" / "config.json"
    settings = json.loads(path.read_text()) | {"tree": str(other), "output": str(tmp_path / "run")}
    path.write_text(json.dumps(settings))
    message = refused(cascade(dataset, tmp_path / "run", other, resume=True))
    assert "--resume: expected label tree" in message
    assert "resume with the tree it began with" in message


def test_a_checkpoint_without_its_tree_is_refused(finished: Path, tmp_path: Path) -> None:
    """Served, a cascade takes the tree from its checkpoint; a state that names another model is
    told.
    """
    shutil.copytree(finished, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint"
    tensors, state = CheckpointFolder(folder).load("best")
    save(
        folder / "best", {name: value for name, value in tensors.items() if name != "order"}, state
    )
    with pytest.raises(InputError, match="a cascade with its label tree"):
        Predictor.load(tmp_path / "run")
    save(folder / "best", tensors | {"order": tensors["order"].flip(0)[: LABELS - 1]}, state)
    with pytest.raises(
        InputError,
        match=rf"children.1.: expected bounds from 0 to {LABELS - 1}, the nodes of the level below",
    ):
        Predictor.load(tmp_path / "run")
    assert torch.equal(
        tensors["order"], CheckpointFolder(finished / "checkpoint").load("last")[0]["order"]
    )
