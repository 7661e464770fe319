"""The features of a linear ranker: [a · embedding || b · TF-IDF], each block with unit rows.

Letters: N documents, D width of the embedding, V columns of the sparse block.

Source: Zhang, Chang, Yu & Dhillon, "Fast Multi-Resolution Transformer Fine-tuning for Extreme
Multi-label Text Classification" (NeurIPS 2021), section 3.3: the final ranker of XR-Transformer
sees the normalised dense vector and the TF-IDF vector; CascadeXML (NeurIPS 2022) has its TF-IDF
variant from there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix, hstack, issparse

from xmlkernels.data.formats.matrices import canonical_csr
from xmlkernels.errors import InputError


@dataclass(frozen=True)
class Features:
    """Features of N documents, in two blocks; either may have no columns.

    Attributes:
        dense: float32 [N, D], rows contiguous.
        sparse: float32 CSR [N, V], canonical.
    """

    dense: np.ndarray
    sparse: csr_matrix

    def __len__(self) -> int:
        return int(self.sparse.shape[0])

    @property
    def widths(self) -> tuple[int, int]:
        """(D, V)."""
        return int(self.dense.shape[1]), int(self.sparse.shape[1])

    def rows(self, first: int, last: int) -> Features:
        """Documents first to last - 1."""
        return Features(self.dense[first:last], self.sparse[first:last])

    def as_sparse(self) -> csr_matrix:
        """Both blocks as one, float32 CSR [N, D + V]; without an embedding TF-IDF itself."""
        if not self.dense.shape[1]:
            return self.sparse
        both = hstack([csr_matrix(self.dense), self.sparse], "csr", np.float32)
        both.sort_indices()
        return csr_matrix(both)

    @classmethod
    def join(
        cls,
        embedding: np.ndarray | None = None,
        tfidf: csr_matrix | None = None,
        *,
        embedding_weight: float = 1.0,
        tfidf_weight: float = 1.0,
    ) -> Features:
        """Both blocks with rows of unit length, times their weights; a row of zeros stays one.

        Args:
            embedding: float [N, D], or None for none.
            tfidf: [N, V] sparse, or None for none.
            embedding_weight, tfidf_weight: a and b above. Their ratio says how much one block's
                weights cost the regulariser.

        Raises:
            InputError: neither block, documents of different number, a value that is not finite, or
                a weight not above 0.
        """
        for name, value in (("embedding_weight", embedding_weight), ("tfidf_weight", tfidf_weight)):
            if not (np.isfinite(value) and value > 0):
                raise InputError(
                    name,
                    "a finite number above 0",
                    repr(value),
                    "leave the block out to do without it",
                )
        if embedding is None and tfidf is None:
            raise InputError("features", "an embedding, TF-IDF or both", "neither", "give one")
        dense = None if embedding is None else _unit_dense(embedding, embedding_weight)
        none = csr_matrix((0 if dense is None else len(dense), 0), dtype=np.float32)
        sparse = _unit_rows(none if tfidf is None else canonical_csr(tfidf, "tfidf"), tfidf_weight)
        if dense is None:
            dense = np.zeros((sparse.shape[0], 0), np.float32)
        if len(dense) != sparse.shape[0]:
            raise InputError(
                "tfidf",
                f"{len(dense)} rows, as the embedding has",
                f"{sparse.shape[0]}",
                "pass one split's",
            )
        return cls(dense, sparse)


def _unit_dense(embedding: np.ndarray, weight: float) -> np.ndarray:
    if issparse(embedding) or embedding.ndim != 2 or embedding.dtype.kind != "f":
        got = (
            f"{type(embedding).__name__} {getattr(embedding, 'dtype', '')} "
            f"{getattr(embedding, 'shape', '')}"
        )
        raise InputError("embedding", "a float array [N, D]", got, "pass one row a document")
    dense = np.array(embedding, np.float32, order="C")
    if not np.isfinite(dense).all():
        bad = int(np.flatnonzero(~np.isfinite(dense).all(1))[0])
        raise InputError(
            f"embedding, row {bad}",
            "finite numbers",
            "NaN or infinity",
            "look for them in the model",
        )
    length = np.sqrt(np.einsum("nd,nd->n", dense, dense, dtype=np.float64))
    dense *= (weight / np.where(length > 0, length, 1)).astype(np.float32)[:, None]
    return dense


def _unit_rows(matrix: csr_matrix, weight: float) -> csr_matrix:
    """Scale the rows of a matrix to length 1 in place and return it."""
    count = np.diff(matrix.indptr)
    squares = np.concatenate([[0.0], np.cumsum(np.square(matrix.data, dtype=np.float64))])
    length = np.sqrt(squares[matrix.indptr[1:]] - squares[matrix.indptr[:-1]])
    matrix.data *= np.repeat(weight / np.where(length > 0, length, 1), count).astype(np.float32)
    return matrix
