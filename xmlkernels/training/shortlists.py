"""What shortlists keep: how many labels, and how many of the true ones."""

from typing import Any

import numpy as np
from scipy.sparse import csr_matrix


class Kept:
    """Counts over the documents of a split.

    Args:
        labels: CSR [N, L], non-zero is true.
    """

    def __init__(self, labels: csr_matrix) -> None:
        self._labels = csr_matrix(labels != 0, dtype=np.int8)
        self._documents = self._listed = self._found = self._true = 0

    def add(self, first: int, listed: csr_matrix) -> None:
        """Count the shortlists of some documents.

        Args:
            first: number of the first of them.
            listed: CSR [n, L]; every stored pair is on a shortlist, whatever its value.
        """
        true = self._labels[first : first + listed.shape[0]]
        pattern = csr_matrix(
            (np.ones(listed.nnz, np.int8), listed.indices, listed.indptr), listed.shape
        )
        self._documents += listed.shape[0]
        self._listed += int(listed.nnz)
        self._true += int(true.nnz)
        self._found += int(true.multiply(pattern).nnz)

    def report(self, name: str) -> dict[str, Any]:
        """Return, under the name of what made them, what they keep; nothing where none were made.

        `labels` is their mean length, `recall` the percentage of all true labels that are on them.
        """
        if not self._documents:
            return {}
        recall = 100 * self._found / max(1, self._true)
        return {name: {"labels": self._listed / self._documents, "recall": recall}}
