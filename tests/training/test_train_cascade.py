"""A cascade from start to end: what its run writes, how it resumes, what it is served with."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from runs_compared import assert_same_run, log_of, metrics_of, stopped_in_second_epoch
from train_runs import (
    LABELS,
    ROOT,
    cascade,
    evaluator,
    make_dataset,
    make_tree,
    run,
)

from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.data.dataset import Dataset, Split
from xmlkernels.evaluation import Evaluation, evaluate_schemes, evaluate_split
from xmlkernels.models.base import Model
from xmlkernels.predict.model import Predictor
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
    options: dict[str, Any], dataset: Path, tree: Path, tmp_path: Path
) -> None:
    """Stopped without a word in the second epoch, between two checkpoints and two log lines."""
    settings = {"epochs": 2, "save_every": 5, "loss_every": 1} | options
    run(cascade(dataset, tmp_path / "whole", tree, **settings))
    stopped_in_second_epoch(cascade(dataset, tmp_path / "parts", tree, **settings))
    run(cascade(dataset, tmp_path / "parts", tree, **settings, resume=True))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


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
        asked + files,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and "3 texts one by one" in done.stderr, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for line, labels in zip(lines, Predictor.load(finished).predict(texts, 3), strict=True):
        assert [x["id"] for x in line["labels"]] == [x.id for x in labels] and len(labels) == 3
        assert all(x["name"] == f"w{3 * x['id']}" for x in line["labels"])
