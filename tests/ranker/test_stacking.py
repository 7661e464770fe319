"""Learned sums: what they see of a candidate, by hand; and models that know different labels."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from xmlkernels import InputError
from xmlkernels.metrics import evaluate
from xmlkernels.ranker.blend import best, combine
from xmlkernels.ranker.stacking import Candidates, Stack, candidates_of

NO_PAIRS = np.zeros((0, 2), np.int64)
LABELS = 40


def test_what_is_known_of_a_candidate() -> None:
    total = csr_matrix(np.array([[3.0, 1.0, 0, 2.0], [0, 0, -1.0, 0], [0, 0, 0, 0]]))
    one = csr_matrix(np.array([[4.0, 0, 2.0, 0], [0, 0, 0, 0], [0, 0, 0, 5.0]]))
    found = candidates_of([one], total, np.array([[0, 3]]), np.array([0, 1, 2, 3]), k=2)
    assert found.rows.tolist() == [[0, 1], [2, -1], [-1, -1]]
    # The sum, how far behind its best, the place, the frequency; the model, and behind its best.
    expected = [
        [3, 0, 0, np.log1p(0), 4, 0],
        [1, -2, 1, np.log1p(1), 1, -3],  # absent: one below the lowest, 2
        [-1, 0, 0, np.log1p(2), -8, 0],  # a model with no label at all
    ]
    assert np.allclose(found.features, expected)


def planted(documents: int, seed: int) -> tuple[list[csr_matrix], csr_matrix]:
    """Two models: one knows the first half of the labels, the other the second; the rest is noise
    of the same size.
    """
    random = np.random.default_rng(seed)
    truth = random.random((documents, LABELS)) < 0.08
    models = []
    for half in (0, 1):
        knows = np.arange(LABELS) // (LABELS // 2) == half
        signal = np.where(truth & knows, 3.0, 0.0)
        models.append(csr_matrix(signal + random.normal(-3, 2, truth.shape)))
    return models, csr_matrix(truth.astype(float))


def test_models_that_know_different_labels_are_learned() -> None:
    """The frequency of a label says whom to trust of it."""
    counts = np.repeat([5, 500], LABELS // 2)
    (val, known), (test, truth) = planted(1500, 0), planted(300, 1)
    sides = []
    for models in (val, test):
        total = combine(models, [m.data for m in models], [1.0, 1.0], "probability")
        sides.append((total, candidates_of(models, total, NO_PAIRS, counts)))
    stack = Stack(sides[0][1], known)
    values, rows = stack.rank(sides[1][1])
    plain = evaluate(best(sides[1][0], NO_PAIRS, 5)[1], truth)
    learned = evaluate(rows, truth)
    assert learned["P@1"] > plain["P@1"] + 5 and learned["P@3"] > plain["P@3"] + 2
    assert (np.diff(values, axis=1) <= 0).all()
    again = Stack(sides[0][1], known).rank(sides[1][1])
    assert np.array_equal(again[0], values) and np.array_equal(again[1], rows)
    # Log-odds: probabilities mean what they say.
    kept = rows >= 0
    true = truth.toarray()[np.arange(len(rows))[:, None], np.maximum(rows, 0)][kept] > 0
    assert abs(float((1 / (1 + np.exp(-values[kept]))).mean()) - true.mean()) < 0.01


def test_places_without_a_candidate_stay_last() -> None:
    (models, known), counts = planted(200, 2), np.ones(LABELS)
    total = combine(models, [m.data for m in models], [1.0, 1.0], "probability")
    found = candidates_of(models, total, NO_PAIRS, counts)
    cut = found.rows.copy()
    cut[0] = -1
    rest = Candidates(cut, found.features[cut.shape[1] :])
    values, rows = Stack(found, known).rank(rest)
    assert set(rows[0]) == {-1} and np.isinf(values[0]).all() and (rows[1:] >= 0).all()
    empty = Candidates(np.full((2, 3), -1), np.zeros((0, found.features.shape[1]), np.float32))
    assert np.isinf(Stack(found, known).rank(empty)[0]).all()


def test_too_little_to_learn_from() -> None:
    models, known = planted(10, 3)
    total = combine(models, [m.data for m in models], [1.0, 1.0], "probability")
    found = candidates_of(models, total, NO_PAIRS, np.ones(LABELS))
    with pytest.raises(InputError, match="--learn: expected 50 right and 50 wrong labels, got"):
        Stack(found, known)
