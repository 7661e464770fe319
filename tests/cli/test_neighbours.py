"""`xmlkernels neighbours`: shares of votes, label texts as voters, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix, identity, vstack
from train_runs import LABELS, make_dataset

from xmlkernels import InputError
from xmlkernels.cli import ensemble, neighbours
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.formats import read_npz
from xmlkernels.metrics import evaluate, inverse_propensity
from xmlkernels.ranker.knn import KNNBaseline


def run(folder: Path, **changes: Any) -> dict[str, float]:
    return neighbours.run(neighbours.Options(str(folder), **changes))


def shares(
    texts: list[str], labels: csr_matrix, asked: list[str], n: int, power: float, apart: Any
) -> np.ndarray:
    """Dense shares of votes [B, L], worked from the similarities alone."""
    one = KNNBaseline(texts, csr_matrix(identity(len(texts), np.float32, format="csr")))
    values, rows = one.predict(asked, len(texts), neighbours=len(texts), power=1)
    votes = np.zeros((len(asked), len(texts)))
    for i, (value, row) in enumerate(zip(values, rows, strict=True)):
        barred = {int(text) for document, text in apart if document == i}
        pairs = [(v, r) for v, r in zip(value, row, strict=True) if r >= 0 and int(r) not in barred]
        for similarity, r in pairs[:n]:
            votes[i, r] = similarity**power
    total = votes.sum(1, keepdims=True)
    return (votes / np.where(total > 0, total, 1)) @ (labels.toarray() != 0)


def stored(path: str, documents: int) -> np.ndarray:
    """Probabilities of a score file, dense; 0 where nothing is stored."""
    matrix = read_npz(path, rows=documents, cols=LABELS, keep_zeros=True).tocoo()
    dense = np.zeros(matrix.shape)
    dense[matrix.row, matrix.col] = 1 / (1 + np.exp(-matrix.data.astype(np.float64)))
    return dense


def check(folder: Path, expected: np.ndarray, split: str, output: str, metrics: Any) -> None:
    """Compare scores and metrics with dense shares."""
    dataset = Dataset.open(folder)
    part = dataset.splits[split]
    expected[tuple(part.filter_pairs.T)] = 0
    kept = stored(output, len(part))
    # Every label has been asked for: none is cut.
    np.testing.assert_allclose(kept, expected, atol=1e-5)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :5]
    rows = np.where(np.take_along_axis(expected, order, 1) > 0, order, -1)
    weight = inverse_propensity(dataset.splits["train"].labels, *dataset.propensity)
    wanted = evaluate(rows, part.labels, weight)
    for key in ("P@1", "P@3", "PSP@1"):
        assert metrics[key] == pytest.approx(wanted[key], abs=2.5), key  # ties are in fp32 there
    assert ensemble.run(ensemble.Options((output,), str(folder), split=split))[output][
        "P@1"
    ] == pytest.approx(metrics["P@1"])


@pytest.mark.parametrize(("split", "n", "power"), [("test", 200, 3.0), ("val", 5, 1.5)])
def test_scores_are_shares_of_the_votes(
    folder: Path, tmp_path: Path, split: Any, n: int, power: float
) -> None:
    dataset, output = Dataset.open(folder), str(tmp_path / "near.npz")
    train, part = dataset.splits["train"], dataset.splits[split]
    how: dict[str, Any] = {"split": split, "neighbours": n, "power": power}
    metrics = run(folder, **how, output=output, top_k=LABELS)
    expected = shares(list(train.texts), train.labels, list(part.texts), n, power, ())
    check(folder, expected, split, output, metrics)
    run(folder, **how, output=output, top_k=2)
    assert (np.diff(read_npz(output, rows=len(part), keep_zeros=True).indptr) <= 2).all()


def test_label_texts_vote_for_all_but_their_own_documents(folder: Path, tmp_path: Path) -> None:
    dataset, output = Dataset.open(folder), str(tmp_path / "near.npz")
    train, test = dataset.splits["train"], dataset.splits["test"]
    metrics = run(folder, label_text=True, output=output, top_k=LABELS)
    texts = [*train.texts, *(dataset.label_names or [])]
    labels = csr_matrix(vstack([train.labels, identity(LABELS)], "csr"))
    apart = [(document, len(train) + label) for document, label in test.filter_pairs]
    assert apart  # the labels' own texts of the first documents
    expected = shares(texts, labels, list(test.texts), 200, 3.0, apart)
    check(folder, expected, "test", output, metrics)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbours": 0}, "--neighbours: expected 1 or more, got 0"),
        ({"top_k": 0}, "--top-k: expected 1 or more, got 0"),
        ({"power": 0.0}, "--power: expected a finite number above 0"),
        ({"output": "near.txt"}, r"--output: expected a name that ends in \.npz"),
    ],
)
def test_settings_that_cannot_be_used(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(Path("nowhere"), **changes)


def test_datasets_that_cannot_be_used(tmp_path: Path) -> None:
    bare = make_dataset(tmp_path, splits=("train", "test"), label_text=None, keep_texts=True)
    with pytest.raises(InputError, match="expected a split val, got none"):
        run(bare, split="val")
    with pytest.raises(InputError, match="--label-text: expected a dataset with label texts"):
        run(bare, label_text=True)
