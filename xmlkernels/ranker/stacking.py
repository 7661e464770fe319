"""Learn the sum of several models where the truth is known: stacked generalization.

A plain sum gives each model one weight. Here gradient-boosted trees see, of each candidate label,
what every model says of it, how far it is behind the model's best, how frequent the label is, and
its place in the plain sum. Source: Wolpert, "Stacked generalization" (Neural Networks, 1992); the
trees are scikit-learn's `HistGradientBoostingClassifier`.

Letters: N documents, k candidates of each, L labels, M models, F features of a candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.errors import InputError
from xmlkernels.metrics.points import hits_of
from xmlkernels.ranker.blend import best

CANDIDATES = 30  # best labels of a document by the plain sum
_LEAST = 50  # right and wrong candidates that can teach anything
_ABSENT = -8.0  # log-odds of a model that has no label at all for a document
# Slow and shallow, so that few documents suffice. Not searched for: these gained in
# cross-validation on held-out packages of debian-deps and on validation of EURLEX57K.
_TREES: dict[str, Any] = {
    "max_iter": 200,
    "learning_rate": 0.04,
    "max_leaf_nodes": 15,
    "min_samples_leaf": 100,
    "l2_regularization": 1.0,
    "early_stopping": False,
    "random_state": 0,
}


@dataclass(frozen=True)
class Candidates:
    """The best labels of each document by a plain sum.

    Attributes:
        rows: int64 [N, k], -1 where there are fewer.
        features: fp32 [number of candidates, F], in the order of `rows`.
    """

    rows: np.ndarray
    features: np.ndarray


def candidates_of(
    models: Sequence[csr_matrix],
    total: csr_matrix,
    filter_pairs: np.ndarray,
    counts: np.ndarray,
    k: int = CANDIDATES,
) -> Candidates:
    """Choose the candidates and gather what is known of them.

    Args:
        models: M matrices CSR [N, L] of log-odds.
        total: CSR [N, L], their plain sum, which chooses.
        filter_pairs: of the split.
        counts: training documents of each label, [L].
        k: per document.
    """
    values, rows = best(total, filter_pairs, k)
    there = rows >= 0
    document, place = np.nonzero(there)
    label, score = rows[there], values[there].astype(np.float64)
    first = np.flatnonzero(place == 0)
    leader = np.zeros(len(rows))
    leader[document[first]] = score[first]
    found = [score, score - leader[document], place, np.log1p(counts[label])]
    for model in models:
        own, top = _of_model(model, document, label)
        found += [own, own - top]
    return Candidates(rows, np.stack(found, axis=1).astype(np.float32))


def _of_model(
    model: csr_matrix, document: np.ndarray, label: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return a model's log-odds of candidates, and those of its best label of the document.

    A label that it has not is one below the lowest that it has.
    """
    ordered = model.tocsr().sorted_indices()
    documents, labels = ordered.shape
    data = ordered.data.astype(np.float64)
    low, top = np.full((2, documents), _ABSENT)
    some = np.flatnonzero(np.diff(ordered.indptr))
    if len(some):
        low[some] = np.minimum.reduceat(data, ordered.indptr[some]) - 1
        top[some] = np.maximum.reduceat(data, ordered.indptr[some])
    keys = np.repeat(np.arange(documents, dtype=np.int64), np.diff(ordered.indptr)) * labels
    keys += ordered.indices
    wanted = document * labels + label
    at = np.searchsorted(keys, wanted)
    known = np.append(keys, -1)[at] == wanted
    return np.where(known, np.append(data, 0.0)[at], low[document]), top[document]


class Stack:
    """A learned sum.

    Args:
        candidates: of documents that the models were not trained on.
        targets: [N, L], their true labels.

    Raises:
        InputError: hardly any candidate is right, or wrong.
    """

    def __init__(self, candidates: Candidates, targets: csr_matrix) -> None:
        from sklearn.ensemble import HistGradientBoostingClassifier

        true = hits_of(candidates.rows, targets)[candidates.rows >= 0]
        if true.sum() < _LEAST or (~true).sum() < _LEAST:
            got = f"{true.sum():,} right and {(~true).sum():,} wrong ones"
            mend = "learn on more documents, or leave --learn out"
            raise InputError("--learn", f"{_LEAST} right and {_LEAST} wrong labels", got, mend)
        self._trees = HistGradientBoostingClassifier(**_TREES).fit(candidates.features, true)

    def rank(self, candidates: Candidates) -> tuple[np.ndarray, np.ndarray]:
        """Return log-odds fp64 and labels int64 [N, k], best first; -infinity and -1 for none."""
        values = np.full(candidates.rows.shape, -np.inf)
        if len(candidates.features):
            values[candidates.rows >= 0] = self._trees.decision_function(candidates.features)
        order = np.argsort(-values, axis=1, kind="stable")
        return (
            np.take_along_axis(values, order, 1),
            np.take_along_axis(candidates.rows, order, 1),
        )
