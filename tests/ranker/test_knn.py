"""The nearest-neighbour baseline: scores worked by hand, agreement with a dense ranking, ties,
mistakes.
"""

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer

from xmlkernels import InputError
from xmlkernels.ranker import knn
from xmlkernels.ranker.knn import KNNBaseline


def test_scores_by_hand():
    # Each word stands in one text, so idf is the same for all and similarity is a plain cosine.
    texts = ["alpha beta", "gamma", "delta_epsilon zeta"]
    labels = csr_matrix(np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], np.float32))
    model = KNNBaseline(texts, labels)
    values, rows = model.predict(["Alpha gamma", "delta", "unknown"], 3, neighbours=2, power=2)
    # text 0: cos = 1/sqrt(2)·1/sqrt(2) = 1/2, text 1: 1/sqrt(2); squares 1/4 and 1/2; label 1 has
    # both
    np.testing.assert_array_equal(rows, [[1, 0, -1], [3, -1, -1], [-1, -1, -1]])
    np.testing.assert_allclose(
        values, [[0.75, 0.25, -np.inf], [1 / 3, -np.inf, -np.inf], [-np.inf] * 3], rtol=1e-5
    )
    assert values.dtype == np.float32 and rows.dtype == np.int64
    one, _ = model.predict(["alpha gamma"], 1, neighbours=1, power=1)
    assert one[0, 0] == pytest.approx(np.sqrt(0.5), rel=1e-5)


def test_ties_go_to_the_earlier_text_and_the_lower_label():
    texts = ["same words"] * 4
    labels = csr_matrix(
        np.array([[0, 0, 1, 1], [0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]], np.float32)
    )
    _, rows = KNNBaseline(texts, labels).predict(["same words"], 4, neighbours=2, power=1)
    np.testing.assert_array_equal(rows, [[1, 2, 3, -1]])


def test_shares_of_votes_and_texts_kept_apart():
    texts = ["alpha beta", "gamma", "delta zeta", "alpha gamma"]
    labels = csr_matrix(np.eye(4, dtype=np.float32))
    model = KNNBaseline(texts, labels)
    pairs = np.array([[0, 3], [1, 2]])
    values, rows = model.predict(
        ["alpha gamma", "delta"], 4, neighbours=3, power=1, apart=pairs, share=True
    )
    assert rows.tolist() == [[1, 0, -1, -1], [-1] * 4]
    assert values[0, :2].sum() == pytest.approx(1)
    # Shares are the sums over all votes, and nobody else's neighbours change.
    plain, same = model.predict(["alpha gamma"], 4, neighbours=3, power=1)
    assert same.tolist() == [[3, 1, 0, -1]]
    share, order = model.predict(["alpha gamma"], 4, neighbours=3, power=1, share=True)
    assert order.tolist() == same.tolist()
    np.testing.assert_allclose(share[0, :3], plain[0, :3] / plain[0, :3].sum(), rtol=1e-6)
    ratio = values[0, :2] / plain[0, 1:3]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)


@pytest.mark.parametrize("block", [3, 256])
def test_equals_a_dense_ranking(monkeypatch, block):
    monkeypatch.setattr(knn, "_BLOCK", block)
    rng = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(40)])
    texts = [" ".join(rng.choice(words, rng.integers(3, 12))) for _ in range(120)]
    labels = (rng.random((100, 15)) < 0.15).astype(np.float32)
    values, rows = KNNBaseline(texts[:100], csr_matrix(labels)).predict(
        texts[100:], 5, neighbours=20, power=3
    )
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"[^\W_]+")
    similar = (
        (vectorizer.fit_transform(texts[:100]).T.T @ vectorizer.transform(texts[100:]).T)
        .toarray()
        .T
    )
    for i, row in enumerate(similar):
        near = np.argsort(-row, kind="stable")[:20]
        scores = (row[near, None] ** 3 * labels[near]).sum(0)
        np.testing.assert_allclose(values[i], np.sort(scores)[::-1][:5], rtol=1e-4)
        np.testing.assert_allclose(scores[rows[i]], values[i], rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KNNBaseline(["a b"], csr_matrix((2, 3))), "1 rows, one per text, got 2"),
        (lambda: KNNBaseline(["--"], csr_matrix((1, 3))), "at least one word"),
        (lambda: KNNBaseline(["word"], csr_matrix((1, 3))).predict(["word"], 0), "^k: expected"),
        (
            lambda: KNNBaseline(["word"], csr_matrix((1, 3))).predict(["word"], 1, neighbours=0),
            "neighbours",
        ),
    ],
)
def test_mistakes_are_told(call, message):
    with pytest.raises(InputError, match=message):
        call()
