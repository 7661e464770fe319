"""What changes when labels come and go: which stay, which are new, and what new rows learn from.

Letters: N documents, L labels before, M labels after.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.data.dataset import Split
from xmlkernels.predict.base import TextPredictor
from xmlkernels.predict.calibration import Calibration


@dataclass(frozen=True)
class Change:
    """The labels after, and the documents that rows are trained on.

    Attributes:
        kept: int64, ascending: the numbers of the labels that stay.
        every: M names, those that stay first.
        texts: the text of each new label.
        documents: texts, and the names of their labels.
        frozen: int64, ascending: labels, by their number after, that stay as they are.
        train: the run's training documents; None where no row is trained.
        sample: documents of it that are drawn.
        batch: documents per pass.
        epochs, lr: of the further training of all rows.
    """

    kept: np.ndarray
    every: list[str]
    texts: list[str]
    documents: list[tuple[str, list[str]]]
    frozen: np.ndarray
    train: Split | None
    sample: int
    batch: int
    epochs: int
    lr: float

    @property
    def new(self) -> int:
        """Labels that are new."""
        return len(self.texts)

    @property
    def lines(self) -> list[str]:
        """The texts of new labels, then those of the documents."""
        return [*self.texts, *(text for text, _ in self.documents)]

    @cached_property
    def truth(self) -> csr_matrix:
        """The labels of `lines`, by their number after: CSR float32 [lines, M] of ones."""
        place = {name: number for number, name in enumerate(self.every)}
        first = len(self.kept)
        rows = [[first + number] for number in range(self.new)]
        rows += [sorted({place[name] for name in names}) for _, names in self.documents]
        return _matrix(rows, len(self.every))

    def after(self, labels: csr_matrix) -> csr_matrix:
        """Turn labels [N, L] by number before into those by number after, CSR float32 [N, M]."""
        found = labels.tocsr()[:, self.kept].astype(np.float32)
        found.resize((found.shape[0], len(self.every)))
        return csr_matrix(found)

    def calibrated(self, calibration: Calibration, identity: str) -> Calibration:
        """Return the calibration of the labels after."""
        return calibration.of_labels(self.kept, self.new, identity)

    def ids(self, predictor: TextPredictor) -> list[str] | None:
        """Return the ids of the labels after, where they had some; a new one's is its name."""
        if (ids := predictor.label_ids) is None:
            return None
        return [*(ids[label] for label in self.kept), *self.every[len(self.kept) :]]


def _matrix(rows: Sequence[Sequence[int]], labels: int) -> csr_matrix:
    ends = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    columns = np.array([label for row in rows for label in row], np.int64)
    return csr_matrix((np.ones(len(columns), np.float32), columns, ends), (len(rows), labels))
