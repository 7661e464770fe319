"""How many documents each label has, of labels that are too many for an array of their number."""

import numpy as np
from scipy.sparse import csr_matrix


class LabelCounts:
    """Counts of L labels, and the order that they are in by them; held of those that occur alone.

    Attributes:
        labels: L.
        unseen: labels that never occur.

    Args:
        matrix: CSR [N, L], each label once per row.
    """

    def __init__(self, matrix: csr_matrix) -> None:
        self.labels = int(matrix.shape[1])
        seen, self._counts = np.unique(matrix.indices, return_counts=True)
        self._seen = seen.astype(np.int64)
        order = np.argsort(self._counts, kind="stable")
        self._ascending = self._counts[order]
        self._rank = np.empty(len(order), np.int64)
        self._rank[order] = np.arange(len(order))
        self.unseen = self.labels - len(seen)

    def of(self, labels: np.ndarray) -> np.ndarray:
        """Return the count of each of these labels, int64."""
        at, occurs = self._find(labels)
        return np.where(occurs, np.append(self._counts, 0)[at], 0)

    def distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """Return every count that a label has, and how many labels have it."""
        counts, times = np.unique(self._counts, return_counts=True)
        return np.append(counts, 0), np.append(times, self.unseen)

    def place(self, labels: np.ndarray) -> np.ndarray:
        """Return the place of each of these labels among all, rarest first, from 0.

        Those of equal counts are in the order of their numbers.
        """
        at, occurs = self._find(labels)
        behind = self.unseen + np.append(self._rank, 0)[at]
        return np.asarray(np.where(occurs, behind, labels - at))

    def count_at(self, place: int) -> int:
        """Return the count of the label at a place."""
        return 0 if place < self.unseen else int(self._ascending[place - self.unseen])

    def _find(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how many labels before each of these occur, and whether it does itself."""
        at = np.searchsorted(self._seen, labels)
        return at, np.append(self._seen, -1)[at] == labels
