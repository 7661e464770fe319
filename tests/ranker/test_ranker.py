"""Classifiers are those of scikit-learn, whatever threads, blocks and neighbours."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from ranker_data import COLUMNS, DOCUMENTS, LABELS, NO_PAIRS, WIDTH, equal, made
from scipy.sparse import csr_matrix
from scipy.sparse import random as sparse_random
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from xmlkernels.ranker.blend import best, best_of_all
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.linear import LinearRanker, Settings, fit


def weights_of(ranker: LinearRanker, label: int) -> np.ndarray:
    return np.concatenate(
        [
            ranker.dense[label],
            ranker.sparse[label].toarray().ravel(),
            ranker.bias[label : label + 1],
        ]
    )


def rows_of(features: Features, bias: float = 1.0) -> np.ndarray:
    """float64 [N, D + V + 1], the constant feature last."""
    return np.hstack(
        [features.dense, features.sparse.toarray(), np.full((len(features), 1), bias)]
    ).astype(np.float64)


def objective(loss: str, w: np.ndarray, x: np.ndarray, y: np.ndarray, cost: np.ndarray) -> float:
    margin = y * (x @ w)
    each = np.maximum(0, 1 - margin) ** 2 if loss == "squared_hinge" else np.logaddexp(0, -margin)
    return float(0.5 * w @ w + cost @ each)


def by_sklearn(loss: str, x: np.ndarray, y: np.ndarray, cost: np.ndarray) -> np.ndarray:
    if loss == "squared_hinge":
        model = LinearSVC(C=1, tol=1e-10, max_iter=200_000, fit_intercept=False)
    else:
        model = LogisticRegression(C=1, tol=1e-10, max_iter=10_000, fit_intercept=False)
    return model.fit(x, y, sample_weight=cost).coef_.ravel()


# ---- training ----


@pytest.mark.parametrize("loss", ["squared_hinge", "logistic"])
@pytest.mark.parametrize("listed", [True, False])
def test_objective_is_that_of_sklearn(
    data: tuple[Features, csr_matrix], shortlist: csr_matrix, loss: Any, listed: bool
) -> None:
    features, labels = data
    settings = Settings(
        loss=loss, cost=2.0, positive_weight=1.5, tolerance=1e-5, epochs=5000, prune=0
    )
    ranker = fit(features, labels, shortlist if listed else None, settings)
    x, y = rows_of(features), np.where(labels.toarray() > 0, 1.0, -1.0)
    pattern = shortlist.copy()
    pattern.data[:] = 1
    for label in range(LABELS):
        docs = (
            (pattern.toarray()[:, label] > 0) | (y[:, label] > 0)
            if listed
            else np.ones(DOCUMENTS, bool)
        )
        cost = np.where(y[docs, label] > 0, 3.0, 2.0)
        # What the solver minimises has the bias as a weight of a feature of ones.
        w = weights_of(ranker, label)
        best_known = objective(
            loss, by_sklearn(loss, x[docs], y[docs, label], cost), x[docs], y[docs, label], cost
        )
        assert objective(loss, w, x[docs], y[docs, label], cost) == pytest.approx(
            best_known, rel=2e-5
        )


def test_a_loose_tolerance_and_few_passes_end_near_the_optimum(
    data: tuple[Features, csr_matrix],
) -> None:
    """Shrinking must not leave documents out for good: the defaults stay within some percent."""
    features, labels = data
    x, y, cost = rows_of(features), np.where(labels.toarray() > 0, 1.0, -1.0), np.ones(DOCUMENTS)
    for loss in ("squared_hinge", "logistic"):
        ranker = fit(features, labels, None, Settings(loss=loss, prune=0))  # type: ignore[arg-type]
        for label in range(LABELS):
            found = objective(loss, weights_of(ranker, label), x, y[:, label], cost)
            known = objective(loss, by_sklearn(loss, x, y[:, label], cost), x, y[:, label], cost)
            assert known <= found * (1 + 1e-6) and found <= 1.05 * known


def test_bias_is_a_feature_of_its_own_size(data: tuple[Features, csr_matrix]) -> None:
    features, labels = data
    settings = Settings(bias=3.0, tolerance=1e-5, epochs=5000, prune=0)
    ranker = fit(features, labels, None, settings)
    x = rows_of(features, 3.0)
    y = np.where(labels.toarray() > 0, 1.0, -1.0)
    cost = np.ones(DOCUMENTS)
    w = by_sklearn("squared_hinge", x, y[:, 0], cost)
    assert ranker.bias[0] == pytest.approx(3 * w[-1], rel=1e-3)
    assert (fit(features, labels, None, replace(settings, bias=0.0)).bias == 0).all()


def test_result_is_the_same_for_every_number_of_threads(
    data: tuple[Features, csr_matrix], shortlist: csr_matrix
) -> None:
    features, labels = data
    for loss in ("squared_hinge", "logistic"):
        settings = Settings(loss=loss, negatives=5)  # type: ignore[arg-type]
        rankers = [
            fit(features, labels, shortlist, settings, threads=threads) for threads in (1, 2, 3)
        ]
        assert equal(rankers[0], rankers[1]) and equal(rankers[0], rankers[2])
        scores = [rankers[0].score(features, shortlist, threads=threads).data for threads in (1, 3)]
        assert np.array_equal(*scores)
        assert not equal(rankers[0], fit(features, labels, shortlist, replace(settings, seed=1)))


def test_a_label_does_not_depend_on_the_others_beside_it(
    data: tuple[Features, csr_matrix], shortlist: csr_matrix
) -> None:
    """Blocks of labels, and the order in which they are trained, must not show."""
    features, labels = data
    some = labels.toarray()
    some[:, 3:] = 0
    fewer = fit(features, csr_matrix(some), shortlist)
    whole = fit(features, labels, shortlist)
    assert np.array_equal(fewer.dense[:3], whole.dense[:3])
    assert (fewer.sparse[:3] != whole.sparse[:3]).nnz == 0


def test_small_blocks_give_the_same(
    data: tuple[Features, csr_matrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = data
    whole = fit(features, labels)
    monkeypatch.setattr("xmlkernels.ranker.linear._BLOCK_BYTES", 2 * 8 * (COLUMNS + WIDTH))
    assert equal(fit(features, labels), whole)


def test_pruning_removes_small_tfidf_weights_alone(data: tuple[Features, csr_matrix]) -> None:
    features, labels = data
    whole, pruned = (fit(features, labels, None, Settings(prune=prune)) for prune in (0.0, 0.2))
    dense = whole.sparse.toarray()
    assert 0 < pruned.sparse.nnz < whole.sparse.nnz
    assert np.array_equal(pruned.sparse.toarray(), np.where(np.abs(dense) > 0.2, dense, 0))
    assert pruned.sparse.has_sorted_indices and np.array_equal(pruned.dense, whole.dense)


def test_random_negatives_join_the_listed_documents() -> None:
    """A label with positives alone learns nothing to tell it from others; random documents teach
    it.
    """
    features, labels = made(3)
    positives = csr_matrix(labels)
    alone, taught = (
        fit(features, labels, positives, Settings(negatives=n, prune=0)) for n in (0, 60)
    )
    x, y = rows_of(features), np.where(labels.toarray() > 0, 1.0, -1.0)
    right = [
        np.mean([np.mean(np.sign(x @ weights_of(r, i)) == y[:, i]) for i in range(LABELS)])
        for r in (alone, taught)
    ]
    assert right[1] > right[0] + 0.2
    everything = fit(
        features, labels, positives, Settings(negatives=10**4, prune=0, tolerance=1e-4, epochs=2000)
    )
    one_vs_all = fit(features, labels, None, Settings(prune=0, tolerance=1e-4, epochs=2000))
    # So many draws meet every document.
    assert np.allclose(everything.dense, one_vs_all.dense, atol=1e-3)


def test_labels_without_documents_and_empty_blocks(data: tuple[Features, csr_matrix]) -> None:
    features, labels = data
    none = csr_matrix(labels.shape, dtype=np.float32)
    empty = fit(features, none, none)
    assert empty.sparse.nnz == 0
    assert not empty.dense.any()
    assert (empty.score(features, labels).data == 0).all()
    for part in (Features.join(features.dense), Features.join(None, features.sparse)):
        ranker = fit(part, labels)
        assert (ranker.dense.shape[1], ranker.sparse.shape[1]) == part.widths
        assert best(ranker.score(part, labels), NO_PAIRS, 1)[1].shape == (DOCUMENTS, 1)


# ---- scores ----


def test_a_few_words_are_looked_up_with_the_same_bits(
    data: tuple[Features, csr_matrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One short text takes another way through the weights of a label than many texts."""
    random = np.random.default_rng(0)
    columns, labels = 3000, 7
    weights = sparse_random(labels, columns, 0.5, "csr", dtype=np.float32, rng=random)
    weights.sort_indices()
    ranker = replace(
        fit(*data),
        dense=random.normal(size=(labels, 3)).astype(np.float32),
        sparse=weights,
        bias=random.normal(size=labels).astype(np.float32),
    )
    texts = sparse_random(40, columns, 0.005, "csr", dtype=np.float32, rng=random)
    dense = random.normal(size=(40, 3)).astype(np.float32)
    every = csr_matrix(np.ones((40, labels)))
    together = ranker.score(Features(dense, texts), every).toarray()
    for row in range(40):
        assert texts[row].nnz * 8 < weights[0].nnz < texts.nnz * 8
        alone = ranker.score(Features(dense[row : row + 1], texts[row]), every[:1])
        assert np.array_equal(alone.toarray()[0], together[row])
    # Columns that do not ascend are not searched.
    order = np.concatenate([np.arange(*ends)[::-1] for ends in pairwise(weights.indptr)])
    kept = weights.data[order], weights.indices[order], weights.indptr
    turned = csr_matrix(kept, weights.shape)
    assert not turned.has_sorted_indices
    other = replace(ranker, sparse=turned)
    found = other.score(Features(dense[:1], texts[0]), every[:1])
    assert np.array_equal(found.toarray()[0], together[0])


def test_scores_are_those_of_dense_matrices(
    data: tuple[Features, csr_matrix], shortlist: csr_matrix
) -> None:
    features, labels = data
    ranker = fit(features, labels)
    full = (
        features.dense @ ranker.dense.T
        + (features.sparse @ ranker.sparse.T).toarray()
        + ranker.bias
    )
    got = ranker.score(features, shortlist)
    assert got.nnz == shortlist.nnz and np.array_equal(got.indices, shortlist.indices)
    rows = np.repeat(np.arange(DOCUMENTS), np.diff(shortlist.indptr))
    assert np.allclose(got.data, full[rows, shortlist.indices], atol=1e-5)
    top = best_of_all(ranker, features, 2)
    assert (np.diff(top.indptr) == 2).all()
    assert np.array_equal(best(top, NO_PAIRS, 1)[1].ravel(), full.argmax(1))
