"""Label vectors for clustering: TF-IDF centroids of documents, label-text embeddings, or both."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.data.token_store import TokenStore
from xmlkernels.errors import InputError
from xmlkernels.terms import Terms
from xmlkernels.ticks import Ticks
from xmlkernels.tree.products import top_product, unit_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LabelFeatures:
    """L labels, each with a sparse and a dense block of length 1 (or 0, where it has none).

    The similarities of the blocks add up.

    Make it with `label_features`, which checks and scales.

    Attributes:
        sparse: fp32 CSR [L, V], columns ascending; V may be 0.
        dense: fp32 [L, D] or None.
    """

    sparse: csr_matrix
    dense: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.sparse.shape[0])

    @cached_property
    def empty(self) -> np.ndarray:
        """Return which labels have no feature, bool [L]."""
        bare: np.ndarray = np.diff(self.sparse.indptr) == 0
        return bare if self.dense is None else np.logical_and(bare, ~self.dense.any(axis=1))


def label_features(
    sparse: csr_matrix | None, dense: np.ndarray | None = None, *, in_place: bool = False
) -> LabelFeatures:
    """Features of unit length, block by block.

    Args:
        sparse: [L, V], such as centroids; or None.
        dense: [L, D], such as embeddings of the label texts; or None.
        in_place: an fp32 `sparse` is scaled where it is, which saves its memory once more.

    Raises:
        InputError: neither, not as many rows in one as in the other, or values that are not finite.
    """
    if sparse is None and dense is None:
        raise InputError(
            "label features", "a sparse or a dense block", "neither", "pass centroids or embeddings"
        )
    if dense is not None:
        dense = np.array(dense, np.float32, order="C", ndmin=2)
        if not np.isfinite(dense).all():
            raise InputError(
                "label embeddings", "finite numbers", "NaN or infinity", "make them again"
            )
        norm = np.linalg.norm(dense.astype(np.float64), axis=1, keepdims=True)
        dense = (dense / np.where(norm > 0, norm, 1)).astype(np.float32)
    if sparse is None:
        sparse = csr_matrix((len(dense), 0), dtype=np.float32)  # type: ignore[arg-type]
    if not np.isfinite(sparse.data).all():
        raise InputError("label features", "finite numbers", "NaN or infinity", "make them again")
    if dense is not None and len(dense) != sparse.shape[0]:
        raise InputError(
            "label embeddings",
            f"{sparse.shape[0]} rows, one a label",
            str(len(dense)),
            "pass those of the same labels",
        )
    unit = unit_rows(sparse, in_place=in_place)
    unit.eliminate_zeros()
    return LabelFeatures(unit, dense)


def label_centroids(documents: csr_matrix, labels: csr_matrix, keep: int = 1000) -> csr_matrix:
    """Sum of the unit vectors of each label's documents, cut to its `keep` largest entries.

    Args:
        documents: [N, V] features of the training documents.
        labels: [N, L]; non-zero is positive.

    Returns:
        fp32 CSR [L, V]; a label without documents has an empty row.

    Raises:
        InputError: documents and labels differ in number, or features that are not finite.
    """
    if documents.shape[0] != labels.shape[0]:
        expected = f"{labels.shape[0]} rows, one a training document"
        raise InputError(
            "document features",
            expected,
            str(documents.shape[0]),
            "pass those of the training split",
        )
    if not np.isfinite(documents.data).all():
        raise InputError(
            "document features", "finite numbers", "NaN or infinity", "make them again"
        )
    members = csr_matrix((labels != 0).T, dtype=np.float32)
    return top_product(members, unit_rows(documents), keep, what="label features")


def fill_empty(centroids: csr_matrix, text_features: csr_matrix, keep: int = 1000) -> csr_matrix:
    """Fill the centroids of labels without documents with the features [L, V] of their own names.

    Raises:
        InputError: another shape than the centroids.
    """
    if centroids.shape != text_features.shape:
        got = str(text_features.shape)
        raise InputError(
            "label text features",
            f"the shape {centroids.shape} of the centroids",
            got,
            "use one vectorizer for both",
        )
    empty = np.diff(centroids.indptr) == 0
    if not empty.any():
        return centroids
    take = csr_matrix(
        (np.ones(empty.sum(), np.float32), (np.flatnonzero(empty),) * 2), shape=(len(empty),) * 2
    )
    own = top_product(take, text_features, keep, what="label features of their texts")
    return csr_matrix(centroids + own)


class TextFeatures:
    """TF-IDF of words by scikit-learn: lower case, 1 + ln(tf), smoothed idf, unit length.

    Args:
        texts: the N training documents.
        ngrams: longest run of words that is a term.
        most_terms: only these many terms, the most frequent ones; None: all.
        common: terms in a larger share of the documents are left out; they make all centroids
            alike.

    Raises:
        InputError: not a word is left, or a number out of range.
    """

    def __init__(
        self,
        texts: Sequence[str],
        *,
        ngrams: int = 1,
        most_terms: int | None = None,
        common: float = 1.0,
    ) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        for name, value in (
            ("ngrams", ngrams),
            ("most_terms", 1 if most_terms is None else most_terms),
        ):
            if value < 1:
                raise InputError(name, "at least 1", str(value), "mend it")
        if not 0 < common <= 1:
            raise InputError("common", "a share above 0, at most 1", str(common), "mend it")
        self._vectorizer = TfidfVectorizer(
            # `snake_case` is two words, as for the nearest-neighbour baseline.
            analyzer=Terms(ngrams, underscores=False),
            sublinear_tf=True,
            dtype=np.float32,
            max_features=most_terms,
            max_df=float(common),
        )
        try:
            told = Ticks(log, "TF-IDF for the tree", len(texts), "texts").over(texts)
            self.documents: csr_matrix = csr_matrix(self._vectorizer.fit_transform(told))
        except ValueError as error:
            raise InputError(
                "training texts", "at least one word that not all share", "none", "use other texts"
            ) from error

    def transform(self, texts: Sequence[str]) -> csr_matrix:
        """fp32 CSR [len(texts), V]."""
        ticks = Ticks(log, "TF-IDF for the tree", len(texts), "texts")
        return csr_matrix(self._vectorizer.transform(ticks.over(texts)))


class TokenFeatures:
    """The same weights for bags of token ids, for a dataset without texts.

    V is the tokenizer's vocabulary.

    Tokens that every training document has, as the special ones, say nothing and weigh nothing.

    Args:
        tokens: the N training documents.
    """

    def __init__(self, tokens: TokenStore) -> None:
        from sklearn.feature_extraction.text import TfidfTransformer

        bags = _bags(tokens)
        self._tfidf: Any = TfidfTransformer(sublinear_tf=True).fit(bags)
        everywhere = np.bincount(bags.indices, minlength=bags.shape[1]) == bags.shape[0]
        self._useful = (
            (~everywhere).astype(np.float32)
            if bags.shape[0] > 1
            else np.ones(bags.shape[1], np.float32)
        )
        self.documents = self._weighted(bags)

    def transform(self, tokens: TokenStore) -> csr_matrix:
        """fp32 CSR [rows, V]."""
        return self._weighted(_bags(tokens))

    def _weighted(self, bags: csr_matrix) -> csr_matrix:
        bags = csr_matrix(bags.multiply(self._useful[None, :]), dtype=np.float32)
        bags.eliminate_zeros()
        return csr_matrix(self._tfidf.transform(bags, copy=False), dtype=np.float32)


def _bags(tokens: TokenStore) -> csr_matrix:
    """fp32 CSR [rows, V] of counts."""
    shape = (len(tokens), tokens.header.vocab_size)
    found = np.asarray(tokens.tokens, np.int32)
    bags = csr_matrix(
        (np.ones(len(found), np.float32), found, np.asarray(tokens.offsets)), shape=shape
    )
    bags.sum_duplicates()
    return bags
