"""Fixtures of the ranker: documents of a few words and a shortlist."""

import numpy as np
import pytest
import scipy.sparse
from ranker_data import DOCUMENTS, LABELS, made
from scipy.sparse import csr_matrix

from xmlkernels.ranker.features import Features


@pytest.fixture(scope="module")
def data() -> tuple[Features, csr_matrix]:
    return made()


@pytest.fixture(scope="module")
def shortlist() -> csr_matrix:
    """About 60% of the pairs, among them values of 0 and below, which count like any other."""
    matrix = scipy.sparse.random(
        DOCUMENTS,
        LABELS,
        0.6,
        format="csr",
        random_state=np.random.default_rng(1),
        dtype=np.float32,
    )
    matrix.data -= 0.5
    matrix.data[::7] = 0
    return matrix
