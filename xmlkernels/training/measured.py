"""Metrics that are reported of one split alone, at the end of a run."""

from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.metrics import annif_metrics, decile_table, macro_metrics


def split_report(rows: np.ndarray, targets: csr_matrix, train_labels: csr_matrix) -> dict[str, Any]:
    """Measure what takes counts of every label.

    Args:
        rows: int64 [N, K], predicted labels by falling score, -1 for none.
        targets: CSR [N, L] of the split.
        train_labels: CSR of the training documents.

    Returns:
        `macro` and `deciles` in percent; `annif`, the 22 of `annif eval` as fractions, of the ten
        best labels or as many as there are.
    """
    return {
        "macro": macro_metrics(rows, targets),
        "deciles": decile_table(rows, targets, train_labels),
        "annif": annif_metrics(rows, targets),
    }
