"""Classifiers of labels in groups: those of `fit` on the same documents; the best of a list."""

from typing import Any

import numpy as np
import pytest
from ranker_data import DOCUMENTS, LABELS, equal, made
from scipy.sparse import csr_matrix

from xmlkernels import InputError
from xmlkernels.ranker import grouped
from xmlkernels.ranker.blend import Reranker, best, contenders
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.grouped import fit_groups
from xmlkernels.ranker.linear import Settings, fit
from xmlkernels.topk import top_rows_from_csr

GROUP = np.array([1, 0, 1, 2, 0, 1])
EXACT: dict[str, Any] = {"tolerance": 1e-5, "epochs": 3000, "prune": 0.0}


def listed_groups(seed: int = 3) -> csr_matrix:
    """Some groups of each document, with values that do not matter."""
    random = np.random.default_rng(seed)
    rows, columns = np.nonzero(random.random((DOCUMENTS, 3)) < 0.4)
    return csr_matrix((np.zeros(len(rows), np.float32), (rows, columns)), shape=(DOCUMENTS, 3))


def by_label(listed: csr_matrix, labels: csr_matrix) -> csr_matrix:
    """The same documents as a shortlist [N, L]: listed groups, and those with a true label."""
    shown = np.zeros((DOCUMENTS, 3), bool)
    shown[listed.nonzero()] = True
    rows = np.repeat(np.arange(DOCUMENTS), np.diff(listed.indptr))
    shown[rows, listed.indices] = True
    rows, true = labels.nonzero()
    shown[rows, GROUP[true]] = True
    return csr_matrix(shown[:, GROUP])


@pytest.mark.parametrize("loss", ["squared_hinge", "logistic"])
@pytest.mark.parametrize("all_documents", [False, True])
def test_groups_train_as_labels_do_one_by_one(
    data: tuple[Features, csr_matrix], loss: Any, all_documents: bool
) -> None:
    """Both end at the same optimum, whatever the way there."""
    features, labels = data
    settings = Settings(loss=loss, cost=2.0, positive_weight=1.5, bias=0.7, **EXACT)
    listed = None if all_documents else listed_groups()
    shortlist = None if listed is None else by_label(listed, labels)
    expected = fit(features, labels, shortlist, settings)
    found = fit_groups(features, labels, GROUP, listed, settings)
    np.testing.assert_allclose(found.dense, expected.dense, atol=2e-3)
    np.testing.assert_allclose(found.sparse.toarray(), expected.sparse.toarray(), atol=2e-3)
    np.testing.assert_allclose(found.bias, expected.bias, atol=2e-3)


@pytest.mark.parametrize("loss", ["squared_hinge", "logistic"])
def test_excluded_pairs_are_not_trained_on(data: tuple[Features, csr_matrix], loss: Any) -> None:
    features, labels = data
    settings = Settings(loss=loss, **EXACT)
    random = np.random.default_rng(5)
    pairs = np.argwhere(random.random((DOCUMENTS, LABELS)) < 0.2)
    left = np.ones((DOCUMENTS, LABELS), bool)
    left[pairs[:, 0], pairs[:, 1]] = False
    left[labels.nonzero()] = True  # a true one stays
    expected = fit(features, labels, csr_matrix(left), settings)
    found = fit_groups(features, labels, GROUP, None, settings, excluded=pairs)
    np.testing.assert_allclose(found.sparse.toarray(), expected.sparse.toarray(), atol=2e-3)
    np.testing.assert_allclose(found.bias, expected.bias, atol=2e-3)


def test_labels_that_are_done_leave_the_others_as_they_are(
    data: tuple[Features, csr_matrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of labels that end at different passes, each is as far as its tolerance says."""
    features, labels = data
    empty = csr_matrix(labels.toarray() * (np.arange(LABELS) % 2))  # half are done at once
    exact = fit_groups(features, empty, np.zeros(LABELS, int), None, Settings(**EXACT))
    alone = fit(features, empty, None, Settings(**EXACT))
    np.testing.assert_allclose(exact.sparse.toarray(), alone.sparse.toarray(), atol=2e-3)
    # In pieces of two labels, too.
    monkeypatch.setattr(grouped, "_MOST", 2)
    parts = fit_groups(features, empty, np.zeros(LABELS, int), None, Settings(**EXACT))
    np.testing.assert_allclose(parts.sparse.toarray(), alone.sparse.toarray(), atol=2e-3)


def test_threads_change_nothing_and_seeds_do(data: tuple[Features, csr_matrix]) -> None:
    features, labels = data
    listed, one = listed_groups(), Settings(epochs=2)
    first = fit_groups(features, labels, GROUP, listed, one, threads=1)
    assert equal(first, fit_groups(features, labels, GROUP, listed, one, threads=2))
    assert not equal(first, fit_groups(features, labels, GROUP, listed, Settings(epochs=2, seed=1)))


def test_settings_of_groups_count(data: tuple[Features, csr_matrix]) -> None:
    features, labels = data
    listed = csr_matrix((DOCUMENTS, 3), dtype=np.float32)
    usual = fit_groups(features, labels, GROUP, listed, Settings())
    changed: list[dict[str, Any]] = [
        {"cost": 3.0},
        {"positive_weight": 3.0},
        {"bias": 0.1},
        {"tolerance": 2.0},
        {"epochs": 1},
        {"negatives": 30},
        {"prune": 0.2},
    ]
    for settings in changed:
        made = fit_groups(features, labels, GROUP, listed, Settings(**settings))
        assert not equal(usual, made), settings
    pruned = fit_groups(features, labels, GROUP, listed, Settings(prune=0.2)).sparse
    assert np.abs(pruned.data).min() > 0.2 and pruned.nnz < usual.sparse.nnz


def test_a_group_without_documents_has_no_weights(data: tuple[Features, csr_matrix]) -> None:
    features, labels = data
    some = labels.toarray()
    some[:, GROUP == 0] = 0
    listed = csr_matrix((DOCUMENTS, 3), dtype=np.float32)
    ranker = fit_groups(features, csr_matrix(some), GROUP, listed)
    assert not ranker.bias[GROUP == 0].any() and ranker.bias[GROUP != 0].all()
    assert not ranker.sparse[np.flatnonzero(GROUP == 0)].nnz


def test_groups_that_do_not_fit(data: tuple[Features, csr_matrix]) -> None:
    features, labels = data
    for group in (GROUP[:5], GROUP - 1):
        with pytest.raises(InputError, match="group: expected one group for each of 6 labels"):
            fit_groups(features, labels, group)
    with pytest.raises(InputError, match="listed groups: expected 3 columns, got 2"):
        fit_groups(features, labels, GROUP, listed_groups()[:, :2])


# ---- the best of a list ----


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_the_best_are_those_of_the_sorted_list(kind: Any) -> None:
    random = np.random.default_rng(0)
    dense = random.integers(-3, 4, size=(50, 30)).astype(kind)  # many ties
    shown = random.random((50, 30)) < 0.5
    scores = csr_matrix((dense[shown], np.nonzero(shown)), shape=(50, 30))
    for k in (1, 5, 40, 300):
        values, rows = best(scores, np.zeros((0, 2), np.int64), k)
        expected = top_rows_from_csr(scores, min(k, 30))
        np.testing.assert_array_equal(rows[:, : min(k, 30)], expected[1])
        np.testing.assert_array_equal(values[:, : min(k, 30)], expected[0])
        assert (rows[:, 30:] == -1).all()


def test_contenders_hold_the_best_of_every_blend() -> None:
    features, labels = made(documents=40)
    ranker = fit(features, labels)
    random = np.random.default_rng(0)
    shape = (40, 60)
    clusters = np.repeat(random.normal(size=(40, 6)), 10, axis=1)  # ten labels have one logit
    pattern = np.arange(0, 2401, 60)
    logits = csr_matrix((clusters.ravel(), np.tile(np.arange(60), 40), pattern), shape)
    margins = csr_matrix((random.normal(size=2400), logits.indices, pattern), shape)
    some = contenders(logits, margins, 5)
    assert some[0].nnz < 1200
    np.testing.assert_array_equal(some[0].indices, some[1].indices)
    for how in ("log_odds", "product"):
        for share in (0.0, 0.3, 0.7, 1.0):
            mixer = Reranker(ranker, share, how)  # type: ignore[arg-type]
            whole, left = (mixer.mix(*pair) for pair in ((logits, margins), some))
            no_pairs = np.zeros((0, 2), np.int64)
            np.testing.assert_array_equal(best(left, no_pairs, 5)[1], best(whole, no_pairs, 5)[1])
