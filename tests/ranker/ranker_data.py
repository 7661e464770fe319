"""Documents of a few words, their labels, and classifiers of scikit-learn to compare with."""

import numpy as np
import scipy.sparse
from scipy.sparse import csr_matrix

from xmlkernels.ranker.features import Features
from xmlkernels.ranker.linear import LinearRanker

DOCUMENTS, COLUMNS, WIDTH, LABELS = 150, 40, 7, 6

NO_PAIRS = np.zeros((0, 2), np.int64)


def made(seed: int = 0, documents: int = DOCUMENTS) -> tuple[Features, csr_matrix]:
    """Features of both blocks, and labels that depend on the sparse one, with noise."""
    random = np.random.default_rng(seed)
    sparse = scipy.sparse.random(
        documents, COLUMNS, 0.25, format="csr", random_state=random, dtype=np.float32
    )
    embedding = random.normal(size=(documents, WIDTH)).astype(np.float32)
    truth = np.random.default_rng(99).normal(size=(COLUMNS, LABELS))
    scores = sparse @ truth + 0.4 * random.normal(size=(documents, LABELS))
    return Features.join(embedding, sparse, embedding_weight=0.5), csr_matrix(
        (scores > 0.7).astype(np.float32)
    )


def equal(a: LinearRanker, b: LinearRanker) -> bool:
    same = all(
        np.array_equal(getattr(a.sparse, n), getattr(b.sparse, n))
        for n in ("indptr", "indices", "data")
    )
    return same and np.array_equal(a.dense, b.dense) and np.array_equal(a.bias, b.bias)
