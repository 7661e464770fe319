"""Shortlists by clusters, and what rankers refuse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranker_data import LABELS, NO_PAIRS
from scipy.sparse import csr_matrix, hstack

from xmlkernels import InputError
from xmlkernels.ranker.blend import Reranker, best, best_of_all
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.linear import Settings, fit
from xmlkernels.ranker.matcher import ClusterMatcher

# ---- clusters ----


def test_cluster_matcher_finds_the_labels_of_the_right_clusters(tmp_path: Path) -> None:
    """32 labels, 8 clusters in 4: each document's words name its label, so that both levels are
    learnt.
    """
    random = np.random.default_rng(0)
    label = random.integers(32, size=400)
    words = np.zeros((400, 64), np.float32)
    words[np.arange(400), label] = 1
    words[np.arange(400), random.integers(32, 64, size=400)] = 0.5  # words that mean nothing
    features = Features.join(None, csr_matrix(words))
    labels = csr_matrix((np.ones(400, np.float32), (np.arange(400), label)), (400, 32))
    clusters = [np.arange(32) // 8, np.arange(32) // 4]
    matcher = ClusterMatcher.fit(
        features, labels, clusters, beam=2, settings=Settings(tolerance=0.01)
    )
    listed = matcher.shortlist(features)
    # Two clusters of four.
    assert listed.shape == labels.shape
    assert (np.diff(listed.indptr) == 8).all()
    assert (listed.astype(bool).multiply(labels).sum(1) == 1).all()
    rows = best(listed, NO_PAIRS, 4)[1]
    assert (
        rows // 4 == label[:, None] // 4
    ).all()  # the true cluster comes first, for its labels share its score
    odds = listed.data.reshape(400, 8)
    assert np.isfinite(odds).all() and (odds.max(1) > odds.min(1)).all()
    matcher.save(tmp_path / "clusters")
    again = ClusterMatcher.load(tmp_path / "clusters").shortlist(features)
    assert (again != listed).nnz == 0
    wider = replace(
        matcher.rankers[1],
        sparse=hstack([matcher.rankers[1].sparse, csr_matrix((8, 35))], format="csr"),
    )
    ClusterMatcher((matcher.rankers[0], wider), matcher.clusters, 2).save(tmp_path / "wider")
    with pytest.raises(InputError, match="level 1: expected 64 columns, those of level 0, got 99"):
        ClusterMatcher.load(tmp_path / "wider")
    # The ranker on these shortlists, with the clusters as the plain model, finds the label itself.
    reranker = Reranker(fit(features, labels, listed))
    assert (
        best(reranker.rerank(listed, None, features.sparse), NO_PAIRS, 1)[1].ravel() == label
    ).all()


def test_cluster_matcher_in_small_parts(
    data: tuple[Features, csr_matrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = data
    matcher = ClusterMatcher.fit(features, labels, [np.arange(LABELS) // 2], beam=2)
    whole = matcher.shortlist(features)
    monkeypatch.setattr("xmlkernels.ranker.matcher._ROWS", 20)
    assert (matcher.shortlist(features) != whole).nnz == 0
    monkeypatch.setattr("xmlkernels.ranker.blend._PAIRS", 20)
    ranker = fit(features, labels)
    few = best_of_all(ranker, features, 3)
    monkeypatch.undo()
    assert (few != best_of_all(ranker, features, 3)).nnz == 0


# ---- mistakes ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "hinge"}, "loss: expected squared_hinge or logistic, got 'hinge'"),
        ({"cost": 0}, "cost: expected a finite number above 0"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"prune": -1}, "prune: expected a finite number from 0"),
        ({"negatives": -1}, "negatives"),
        ({"epochs": 0}, "epochs: expected 1 or more"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_cannot_be_used(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**changes)


def test_inputs_that_do_not_fit(data: tuple[Features, csr_matrix], shortlist: csr_matrix) -> None:
    features, labels = data
    ranker = fit(features, labels)
    wrong: list[tuple[str, Any]] = [
        ("features: expected an embedding, TF-IDF or both", Features.join),
        ("embedding: expected a float array", lambda: Features.join(np.zeros(3))),
        (
            "embedding, row 1: expected finite numbers",
            lambda: Features.join(np.array([[0.0], [np.nan]])),
        ),
        (
            "tfidf: expected 2 rows, as the embedding has",
            lambda: Features.join(np.zeros((2, 3)), features.sparse),
        ),
        (
            "embedding_weight: expected a finite number above 0",
            lambda: Features.join(np.zeros((2, 3)), embedding_weight=0),
        ),
        ("labels: expected 150 rows, got 100", lambda: fit(features, labels[:100])),
        ("shortlist: expected 6 columns, got 5", lambda: fit(features, labels, shortlist[:, :5])),
        ("threads: expected 0 or more", lambda: fit(features, labels, threads=-1)),
        ("shortlist: expected 150 rows, got 9", lambda: ranker.score(features, shortlist[:9])),
        (
            "features: width and TF-IDF columns",
            lambda: ranker.score(Features.join(features.dense), shortlist),
        ),
        ("share: expected a number from 0 to 1", lambda: Reranker(ranker, 1.5)),
        ("how: expected log_odds or product", lambda: Reranker(ranker, 0.5, "sum")),  # type: ignore[arg-type]
        (
            "margins: expected the pairs of the logits",
            lambda: Reranker(ranker).mix(shortlist, labels),
        ),
        (
            "beam: expected 1 or more",
            lambda: ClusterMatcher.fit(features, labels, [np.zeros(LABELS, int)], beam=0),
        ),
        (
            "clusters: expected the cluster of each of 6 labels",
            lambda: ClusterMatcher.fit(features, labels, [np.zeros(5, int)]),
        ),
        (
            "clusters, level 1: expected clusters inside those above",
            lambda: ClusterMatcher.fit(
                features, labels, [np.arange(LABELS) // 2, np.arange(LABELS) % 2]
            ),
        ),
    ]
    for message, call in wrong:
        with pytest.raises(InputError, match=message):
            call()
