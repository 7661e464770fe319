"""A cascade from start to end: what its run writes, how it resumes, which trees and checkpoints it
refuses.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from train_runs import (
    LABELS,
    RECIPES,
    ROOT,
    Config,
    cascade,
    evaluator,
    make_dataset,
    make_tree,
    run,
    run_state,
    threads_kept,
    weights,
)

from xmlkernels import InputError
from xmlkernels.checkpoint import CheckpointFolder, save
from xmlkernels.cli.console import command
from xmlkernels.cli.train import main
from xmlkernels.data.dataset import Dataset, Split
from xmlkernels.evaluation import Evaluation, evaluate_schemes, evaluate_split
from xmlkernels.models.base import Model
from xmlkernels.predict.model import Predictor
from xmlkernels.training.config import recorded
from xmlkernels.tree.label_tree import LabelTree

TIMING = ("documents_per_second", "seconds")


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


def metrics_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def log_of(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def test_a_run_writes_all_it_promises(finished: Path, tree: Path) -> None:
    metrics, own = metrics_of(finished), LabelTree.load(tree)
    assert metrics["scheme"] in ("level", "weighted", "path")
    assert metrics["tree"] == own.content_hash
    assert LabelTree.load(finished / "checkpoint").content_hash == own.content_hash
    for split in ("validation", "test"):
        levels = metrics[split]["levels"]
        assert [x["clusters"] for x in levels] == list(own.sizes[:-1])
        assert [x["kept"] for x in levels] == [2, 4]
        assert all(
            0 <= x[f"{kind}@{k}"] <= 100
            for x in levels
            for kind in ("P", "nDCG", "R")
            for k in range(1, 6)
        )
        recall = [x["shortlist_recall"] for x in levels]
        assert 100 > recall[0] >= recall[1] >= metrics[split]["R@5"] > 0
    lines = log_of(finished)
    losses = [line["loss"] for line in lines if "split" not in line and line["loss"] is not None]
    assert losses[-1] < losses[0]
    assert all(line["lost_positives"] == 0 for line in lines if "split" not in line)
    assert all(len(line["levels"]) == 2 for line in lines if "split" in line)
    for which in ("last", "best"):
        _, state = CheckpointFolder(finished / "checkpoint").load(which)
        assert state["tree"] == own.content_hash and state["model"]["kind"] == "cascade"
    assert scipy.sparse.load_npz(finished / "predictions.npz").shape == (50, LABELS)


def test_the_scheme_is_the_best_one_on_validation_and_is_served(
    finished: Path, dataset: Path
) -> None:
    predictor, found = Predictor.load(finished), {}
    split = Dataset.open(dataset).splits["val"]
    assert predictor.model.heads.scheme == metrics_of(finished)["scheme"]
    for scheme in ("level", "weighted", "path"):
        predictor.model.heads.use_scheme(scheme)
        rows = evaluate_split(
            predictor.model, split, 5, batch_size=16, inputs=predictor.inputs
        ).labels
        found[scheme] = split.labels[np.arange(len(split)), rows[:, 0]].mean()
    metrics = metrics_of(finished)
    assert found[metrics["scheme"]] == max(found.values())
    assert (
        metrics["best"]["P@1"]
        == metrics["validation"]["P@1"]
        == pytest.approx(100 * max(found.values()))
    )


def test_the_scheme_is_that_of_the_best_validation_not_of_the_last(
    dataset: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def path_is_right_after_one_epoch_alone(
        model: Model, split: Split, k: int, **how: Any
    ) -> dict[str, Evaluation]:
        steps.append(model.steps)
        found = evaluate_schemes(model, split, k, **how)
        labels = np.full((len(split), k), -1)
        if model.steps == steps[0]:
            labels[:, 0] = [row.indices[0] for row in split.labels]
        return found | {"path": replace(found["path"], labels=labels)}

    monkeypatch.setattr(evaluator, "evaluate_schemes", path_is_right_after_one_epoch_alone)
    run(cascade(dataset, tmp_path / "run", tree, epochs=2))
    metrics = metrics_of(tmp_path / "run")
    assert len(steps) == 3 and steps[0] == steps[2] < steps[1]  # each epoch, and the best again
    assert metrics["scheme"] == "path"
    assert metrics["best"]["epoch"] == 1
    assert metrics["validation"]["P@1"] == 100
    assert Predictor.load(tmp_path / "run").model.scheme == "path"
    model = Predictor.load(tmp_path / "run", which="last").model
    assert model.scheme != "path"


def test_shortlist_recall_counts_labels_whose_cluster_was_kept(
    finished: Path, dataset: Path
) -> None:
    """Against a loop over documents; the candidates are the labels of the kept clusters."""
    predictor, split = Predictor.load(finished), Dataset.open(dataset).splits["test"]
    model, labels = predictor.model, split.labels.toarray() > 0
    found = evaluate_split(model, split, LABELS, batch_size=16, inputs=predictor.inputs)
    tree, hits = model.tree, 0
    assert (
        found.levels
        == evaluate_split(model, split, 3, batch_size=7, inputs=predictor.inputs).levels
    )
    for document in range(len(split)):
        candidates = set(found.labels[document].tolist()) - {-1}
        clusters = {int(tree.ancestors(1)[tree.place[label]]) for label in candidates}
        assert len(clusters) == 4
        hits += sum(
            int(tree.ancestors(1)[tree.place[label]]) in clusters
            for label in np.flatnonzero(labels[document])
        )
    assert found.levels[1]["shortlist_recall"] == pytest.approx(100 * hits / labels.sum())


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "label_text": True,
            "accumulate": 3,
            "batch": 5,
            "table": "bf16",
            "state": "bf16",
            "ema": 0.9,
            "ema_start": 0.5,
            "ema_every": 2,
            "ema_tables": True,
        },
        {
            "table": "fp8",
            "schedule": "warmup_cosine",
            "freeze": 1,
            "rw_loss": (2.0, 1.0, 1.0),
            "scheme": "path",
        },
        {"table_optimizer": "adamw_dense", "label_device": "cpu"},
    ],
    ids=["plain", "accumulated", "fp8", "dense"],
)
def test_a_stopped_run_resumes_bit_for_bit(
    options: dict[str, Any],
    dataset: Path,
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped without a word in the second epoch, between two checkpoints and two log lines."""
    settings = {"epochs": 2, "save_every": 5, "loss_every": 1} | options
    run(cascade(dataset, tmp_path / "whole", tree, **settings))
    log = run_state.RunState.log_progress

    def stop(self: run_state.RunState) -> None:
        log(self)
        if self.epoch == 1 and self.position >= 6:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(run_state.RunState, "log_progress", stop)
        run(cascade(dataset, tmp_path / "parts", tree, **settings))
    run(cascade(dataset, tmp_path / "parts", tree, **settings, resume=True))
    ours, theirs = tmp_path / "parts", tmp_path / "whole"
    for which in ("last", "best"):
        assert weights(ours, which) == weights(theirs, which), which
    assert log_of(ours) == log_of(theirs)
    assert (ours / "predictions.npz").read_bytes() == (theirs / "predictions.npz").read_bytes()


def test_the_command_answers_for_a_cascade(finished: Path, dataset: Path, tmp_path: Path) -> None:
    """xmlkernels predict in a process of its own gives what the model says of the same texts."""
    texts = ["w0 w1 w2", "w30 w31", ""]
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in texts))
    asked = [
        sys.executable,
        "-m",
        "xmlkernels",
        "predict",
        "--checkpoint",
        str(finished),
        "--top-k",
        "3",
        "--latency",
    ]
    files = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.jsonl")]
    done = subprocess.run(
        asked + files, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0 and "3 texts one by one" in done.stderr, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for line, labels in zip(lines, Predictor.load(finished).predict(texts, 3), strict=True):
        assert [x["id"] for x in line["labels"]] == [x.id for x in labels] and len(labels) == 3
        assert all(x["name"] == f"w{3 * x['id']}" for x in line["labels"])


# ---- trees and checkpoints that do not fit ----


Refused = Callable[[Config], str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """What `train/run.py` says of a configuration: one sentence and exit status 2, with nothing
    written.
    """

    def ask(config: Config) -> str:
        known, flags, output = recorded(RECIPES["tiny"].config), ["tiny"], Path(config.output)
        for name, value in recorded(config).items():
            if value is True:
                flags.append(f"--{name}")
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
            tensors, head = (
                {
                    name: file.get_tensor(name).copy()
                    for name in file.keys()  # noqa: SIM118
                },
                file.metadata(),
            )
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
