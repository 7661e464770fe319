"""Write sparse text and compare matrices."""

import numpy as np
from scipy.sparse import csr_matrix


def equal(matrix, dense):
    assert matrix.format == "csr" and matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix.toarray(), np.array(dense, dtype=np.float32))
    fresh = csr_matrix((matrix.data, matrix.indices, matrix.indptr), shape=matrix.shape)
    assert fresh.has_canonical_format and (fresh.data != 0).all()
