"""Label vectors: products cut by row, centroids, TF-IDF of texts and of tokens, blocks of unit
length.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix, random
from sklearn.feature_extraction.text import TfidfVectorizer

from xmlkernels.data.token_store import TokenStore, TokenWriter
from xmlkernels.errors import InputError
from xmlkernels.tree import products
from xmlkernels.tree.features import (
    TextFeatures,
    TokenFeatures,
    fill_empty,
    label_centroids,
    label_features,
)
from xmlkernels.tree.products import top_product, unit_rows


def noise(rows: int, columns: int, seed: int = 0, density: float = 0.2) -> csr_matrix:
    return csr_matrix(
        random(rows, columns, density, "csr", np.float32, np.random.default_rng(seed))
    )


def cut(dense: np.ndarray, keep: int) -> np.ndarray:
    """The definition: of each row the `keep` entries of largest magnitude, of equals the lower
    column.
    """
    kept = np.zeros_like(dense)
    for row, values in enumerate(dense):
        best = np.lexsort((np.arange(len(values)), -np.abs(values)))[:keep]
        kept[row, best] = values[best]
    return kept


@pytest.mark.parametrize("keep", [1, 4, 1000])
def test_products_cut_by_row(keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_ROWS", 7)
    a, b = noise(23, 15), noise(15, 40, 1)
    a.data -= 0.5
    found = top_product(a, b, keep)
    assert np.allclose(found.toarray(), cut(a.toarray() @ b.toarray(), keep), atol=1e-6)
    assert found.dtype == np.float32
    assert found.has_sorted_indices
    assert found.nnz == np.count_nonzero(found.data)


def test_of_equal_entries_the_lower_columns_stay() -> None:
    a, b = csr_matrix(np.ones((3, 1))), csr_matrix(np.array([[1, 2, 1, 1, 2, 1]]))
    assert top_product(a, b, 4).toarray().tolist() == [[1, 2, 1, 0, 2, 0]] * 3


def test_threads_do_not_change_products(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_ROWS", 11)
    a, b, found = noise(100, 50), noise(50, 80, 1), []
    for count in (1, 2, 5):
        threads(count)
        found.append(top_product(a, b, 9))
    for other in found[1:]:
        assert (other.data == found[0].data).all() and (other.indices == found[0].indices).all()


def test_products_of_nothing() -> None:
    assert top_product(csr_matrix((0, 3)), noise(3, 4), 2).shape == (0, 4)
    assert top_product(csr_matrix((2, 3)), noise(3, 4), 2).nnz == 0
    assert top_product(csr_matrix((2, 3)), csr_matrix((3, 0)), 2).shape == (2, 0)


def test_products_that_cannot_be() -> None:
    with pytest.raises(InputError, match="product: expected 3 rows in the second matrix, got 4"):
        top_product(noise(2, 3), noise(4, 2), 1)
    with pytest.raises(InputError, match="keep: expected at least 1, got 0"):
        top_product(noise(2, 3), noise(3, 2), 0)


def test_unit_rows_copy_or_not() -> None:
    matrix = noise(9, 9)
    before, same = matrix.toarray(), matrix
    norm = np.linalg.norm(before, axis=1, keepdims=True)
    expected = before / np.where(norm > 0, norm, 1)
    assert np.allclose(unit_rows(matrix).toarray(), expected, rtol=1e-6)
    assert (matrix.toarray() == before).all()
    assert unit_rows(matrix, in_place=True) is same
    assert np.allclose(same.toarray(), expected, rtol=1e-6)
    assert unit_rows(csr_matrix(before, dtype=np.float64), in_place=True).dtype == np.float32


def test_centroids() -> None:
    documents = noise(30, 50)
    # Weights of labels do not count.
    labels = csr_matrix(noise(30, 8, 1).toarray() * (np.arange(8) != 3) * 7)
    found = label_centroids(documents, labels, 10)
    unit = unit_rows(documents).toarray()
    assert np.allclose(
        found.toarray(), cut((labels.toarray() != 0).T.astype(np.float32) @ unit, 10), atol=1e-6
    )
    assert found[3].nnz == 0


def test_labels_without_documents_take_their_text() -> None:
    centroids = csr_matrix(np.array([[1, 2, 0], [0, 0, 0], [0, 0, 0]], np.float32))
    texts = csr_matrix(np.array([[9, 9, 9], [3, 1, 2], [0, 0, 0]], np.float32))
    assert fill_empty(centroids, texts, 2).toarray().tolist() == [[1, 2, 0], [3, 0, 2], [0, 0, 0]]
    full = csr_matrix(np.eye(3, dtype=np.float32))
    assert fill_empty(full, texts) is full
    with pytest.raises(InputError, match=r"label text features: expected the shape \(3, 3\)"):
        fill_empty(centroids, texts[:2])


def test_both_blocks_have_unit_length() -> None:
    dense = np.array([[3, 4], [0, 0], [0, 0], [1, 0]], np.float64)
    sparse = csr_matrix(np.array([[1, 1], [0, 2], [0, 0], [0, 0]], np.float32))
    found = label_features(sparse, dense)
    assert found.dense is not None and found.dense.dtype == np.float32 and len(found) == 4
    assert np.allclose(found.dense, [[0.6, 0.8], [0, 0], [0, 0], [1, 0]])
    assert np.allclose(found.sparse.toarray()[:2], [[0.5**0.5, 0.5**0.5], [0, 1]])
    assert found.empty.tolist() == [False, False, True, False]
    assert label_features(None, dense).empty.tolist() == [False, True, True, False]
    explicit = csr_matrix((np.zeros(1, np.float32), ([0], [1])), shape=(2, 2))
    assert label_features(explicit).empty.tolist() == [True, True]


def test_features_that_cannot_be() -> None:
    bad = noise(3, 4, density=1.0)
    bad.data[2] = np.nan
    with pytest.raises(
        InputError, match="label features: expected a sparse or a dense block, got neither"
    ):
        label_features(None, None)
    with pytest.raises(InputError, match="label embeddings: expected 3 rows, one a label, got 2"):
        label_features(noise(3, 4), np.ones((2, 2)))
    with pytest.raises(InputError, match="label features: expected finite numbers, got NaN"):
        label_features(bad)
    with pytest.raises(InputError, match="label embeddings: expected finite numbers, got NaN"):
        label_features(None, np.full((2, 2), np.inf))
    with pytest.raises(
        InputError, match="document features: expected 4 rows, one a training document, got 3"
    ):
        label_centroids(noise(3, 4), noise(4, 2))
    with pytest.raises(InputError, match="document features: expected finite numbers"):
        label_centroids(bad, noise(3, 2))


TEXTS = ["Red apple_tree", "green apple", "red", "blue sky"]


def test_texts() -> None:
    features = TextFeatures(TEXTS)
    expected = TfidfVectorizer(token_pattern=r"[^\W_]+", sublinear_tf=True).fit(TEXTS)
    assert np.allclose(features.documents.toarray(), expected.transform(TEXTS).toarray())
    assert np.allclose(
        features.transform(["red sky"]).toarray(), expected.transform(["red sky"]).toarray()
    )
    assert TextFeatures(TEXTS, ngrams=2).documents.shape[1] == 10
    assert TextFeatures(TEXTS, most_terms=2).documents.shape[1] == 2
    with pytest.raises(
        InputError, match="training texts: expected at least one word that not all share, got none"
    ):
        TextFeatures(["", "_"])
    with pytest.raises(InputError, match="ngrams: expected at least 1, got 0"):
        TextFeatures(TEXTS, ngrams=0)
    # "red" and "apple" stand in half of the texts.
    assert TextFeatures(TEXTS, common=0.4).documents.shape[1] == 4
    with pytest.raises(InputError, match="common: expected a share above 0, at most 1, got 0"):
        TextFeatures(TEXTS, common=0)
    with pytest.raises(InputError, match="most_terms: expected at least 1, got 0"):
        TextFeatures(TEXTS, most_terms=0)


def stored(path: Path, rows: list[list[int]]) -> TokenStore:
    with TokenWriter(
        path, len(rows), vocab_size=20, tokenizer_hash="", max_length=9, pad_id=0
    ) as writer:
        writer.append([np.array(row) for row in rows])
    return TokenStore.open(path)


def test_tokens_weigh_as_words_do(tmp_path: Path) -> None:
    """Tokens 1 and 2 stand in every document, as the special ones; the others are words."""
    rows = [[1, 5, 6, 5, 2], [1, 7, 6, 2], [1, 8, 2]]
    features = TokenFeatures(stored(tmp_path / "train", rows))
    texts = [" ".join(f"w{token}" for token in row if token > 2) for row in rows]
    expected = TfidfVectorizer(sublinear_tf=True).fit(texts)
    columns = [int(word[1:]) for word in expected.get_feature_names_out()]
    assert np.allclose(
        features.documents.toarray()[:, columns], expected.transform(texts).toarray()
    )
    assert features.documents.shape == (3, 20)
    assert features.documents.sum() == pytest.approx(expected.transform(texts).sum())
    names = features.transform(stored(tmp_path / "labels", [[1, 6, 2], [1, 9, 2]]))
    assert np.allclose(names.toarray()[0, columns], expected.transform(["w6"]).toarray())
    assert names.shape == (2, 20)


def test_one_document_keeps_its_tokens(tmp_path: Path) -> None:
    assert TokenFeatures(stored(tmp_path / "train", [[1, 5, 2]])).documents.nnz == 3
