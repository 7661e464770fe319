"""A cascade from start to end: what its run writes, how it resumes, which trees and checkpoints it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from train_runs import LABELS, cascade, make_dataset, make_tree, run, weights

from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.data.dataset import Dataset
from xmlkernels.predict import Predictor, evaluate_split
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


def metrics_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def test_a_run_writes_all_it_promises(finished: Path, tree: Path) -> None:
    metrics, own = metrics_of(finished), LabelTree.load(tree)
    assert metrics["scheme"] in ("level", "weighted", "path") and metrics["tree"] == own.content_hash
    assert LabelTree.load(finished / "checkpoint").content_hash == own.content_hash
    for split in ("validation", "test"):
        levels = metrics[split]["levels"]
        assert [x["clusters"] for x in levels] == list(own.sizes[:-1]) and [x["kept"] for x in levels] == [2, 4]
        assert all(0 <= x[f"{kind}@{k}"] <= 100 for x in levels for kind in ("P", "nDCG", "R") for k in range(1, 6))
        recall = [x["shortlist_recall"] for x in levels]
        assert 100 > recall[0] >= recall[1] >= metrics[split]["R@5"] > 0
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "split" not in line and line["loss"] is not None]
    assert losses[-1] < losses[0] and all(line["lost_positives"] == 0 for line in lines if "split" not in line)
    assert all(len(line["levels"]) == 2 for line in lines if "split" in line)
    for which in ("last", "best"):
        _, state = CheckpointFolder(finished / "checkpoint").load(which)
        assert state["tree"] == own.content_hash and state["model"]["kind"] == "cascade"


def test_shortlist_recall_counts_labels_whose_cluster_was_kept(finished: Path, dataset: Path) -> None:
    """Against a loop over documents; the candidates are the labels of the kept clusters."""
    predictor, split = Predictor.load(finished), Dataset.open(dataset).splits["test"]
    model, labels = predictor.model, split.labels.toarray() > 0
    found = evaluate_split(model, split, LABELS, batch_size=16, inputs=predictor.inputs)
    tree, hits = model.tree, 0
    assert found.levels == evaluate_split(model, split, 3, batch_size=7, inputs=predictor.inputs).levels
    for document in range(len(split)):
        candidates = set(found.labels[document].tolist()) - {-1}
        clusters = {int(tree.ancestors(1)[tree.place[label]]) for label in candidates}
        assert len(clusters) == 4
        hits += sum(int(tree.ancestors(1)[tree.place[label]]) in clusters for label in np.flatnonzero(labels[document]))
    assert found.levels[1]["shortlist_recall"] == pytest.approx(100 * hits / labels.sum())
