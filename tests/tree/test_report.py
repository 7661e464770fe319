"""The report of a tree, against its definitions in plain numpy."""

from __future__ import annotations

import json

import numpy as np
import pytest
from planted import planted
from scipy.sparse import csr_matrix

from xmlkernels.errors import InputError
from xmlkernels.tree import report as module
from xmlkernels.tree.features import LabelFeatures, label_features
from xmlkernels.tree.label_tree import LabelTree
from xmlkernels.tree.report import report

LEAF, FEATURES = planted((3, 4), 5, 0)


@pytest.fixture
def tree() -> LabelTree:
    return LabelTree.from_partitions([LEAF // 4, LEAF])


@pytest.fixture
def features() -> LabelFeatures:
    return label_features(FEATURES, np.random.default_rng(0).normal(size=(60, 4)))


def documents(count: int, seed: int) -> tuple[csr_matrix, csr_matrix]:
    """Each document has two or three labels and looks like the first of them, and like something
    else.
    """
    random = np.random.default_rng(seed)
    labels = np.zeros((count, 60))
    vectors = np.zeros((count, FEATURES.shape[1]), np.float32)
    for row in range(count):
        true = random.choice(60, random.integers(2, 4), replace=False)
        labels[row, true] = 1
        vectors[row] = FEATURES[true[0]].toarray()[0] + FEATURES[random.integers(60)].toarray()[0]
    return csr_matrix(vectors), csr_matrix(labels)


def test_sizes(tree: LabelTree, features: LabelFeatures) -> None:
    uneven = LabelTree.from_partitions(
        [np.repeat([0, 1], [10, 50]), np.repeat([0, 1, 2], [10, 20, 30])]
    )
    facts = report(uneven, features)
    assert facts["labels"] == 60 and facts["without_features"] == 0
    first, second = facts["levels"]
    assert (first["clusters"], second["clusters"]) == (2, 3)
    assert first["labels"] == {"least": 10, "mean": 30.0, "most": 50, "deviation": 20.0}
    assert first["children"] == {"least": 1, "mean": 1.5, "most": 2, "deviation": 0.5}
    assert second["labels"] == second["children"] and "recall" not in first
    json.dumps(facts)


def test_similarity_inside_and_at_random(
    tree: LabelTree, features: LabelFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse, dense = features.sparse.toarray(), features.dense
    assert dense is not None
    all_pairs = sparse @ sparse.T + dense @ dense.T
    others = ~np.eye(60, dtype=bool)
    found = [report(tree, features, seed=seed)["levels"] for seed in range(40)]
    for level, cluster in enumerate((LEAF // 4, LEAF)):
        inside = all_pairs[(cluster[:, None] == cluster) & others].mean()
        assert np.mean([f[level]["similarity"] for f in found]) == pytest.approx(inside, abs=0.02)
        assert np.mean([f[level]["random_similarity"] for f in found]) == pytest.approx(
            all_pairs[others].mean(), abs=0.03
        )
        assert inside > all_pairs[others].mean() + 0.3
    monkeypatch.setattr(module, "_PAIRS", 10)
    assert report(tree, features)["levels"][0]["similarity"] > 0


def test_clusters_of_one_label_have_no_similarity(features: LabelFeatures) -> None:
    facts = report(LabelTree.from_partitions([np.arange(60)]), features)["levels"][0]
    assert facts["similarity"] is None and facts["random_similarity"] is None


def test_recall_of_the_parents_true_children(
    tree: LabelTree, features: LabelFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", 7)
    vectors, labels = documents(40, 1)
    facts = report(tree, features, vectors, labels)["levels"]
    sparse = features.sparse.toarray()
    for level, (cluster, below) in enumerate(((LEAF // 4, LEAF), (LEAF, np.arange(60)))):
        clusters = cluster.max() + 1
        centre = np.stack([sparse[cluster == c].sum(axis=0) for c in range(clusters)])
        score = vectors.toarray() @ (centre / np.linalg.norm(centre, axis=1, keepdims=True)).T
        parents = [set(cluster[labels[row].indices]) for row in range(40)]
        assert facts[level]["parents"] == {
            "mean": np.mean([len(p) for p in parents]),
            "most": max(len(p) for p in parents),
        }
        for k, share in facts[level]["recall"].items():
            kept = np.argsort(-score, axis=1)[:, : int(k)]
            true = [
                {(below[label], cluster[label]) for label in labels[row].indices}
                for row in range(40)
            ]
            hits = sum(parent in kept[row] for row in range(40) for _, parent in true[row])
            assert share == pytest.approx(hits / sum(map(len, true)))
        assert facts[level]["recall"][str(clusters)] == 1
        assert next(iter(facts[level]["recall"])) == "1"
    assert facts[0]["recall"]["1"] > 0.4


def test_some_documents_by_seed(
    tree: LabelTree, features: LabelFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DOCUMENTS", 9)
    vectors, labels = documents(40, 2)
    assert report(tree, features, vectors, labels) == report(tree, features, vectors, labels)
    nothing = csr_matrix(labels.shape)
    assert "recall" not in report(tree, features, vectors, nothing)["levels"][0]


def test_what_does_not_fit(tree: LabelTree, features: LabelFeatures) -> None:
    vectors, labels = documents(5, 3)
    with pytest.raises(InputError, match="features: expected 60 labels, as the tree has, got 59"):
        report(tree, label_features(FEATURES[:59]))
    for a, b in ((vectors[:, :5], labels), (vectors, labels[:4]), (vectors, labels[:, :7])):
        with pytest.raises(
            InputError, match=r"documents: expected documents \[N, .*\] and labels \[N, 60\], got"
        ):
            report(tree, features, csr_matrix(a), csr_matrix(b))
