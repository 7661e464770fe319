"""Train a linear ranker further on a few documents, from where it stands.

Letters: n documents of a batch, L labels, V columns, T labels that the batch touches.

A label's weights move from w to the w' that minimises ½‖w' − w‖² + Σ cost_i · loss_i(w') over the
documents of a batch, by the squared hinge: what it says is learnt, and the rest is kept as well as
can be. Source: Crammer, Dekel, Keshet, Shalev-Shwartz & Singer, "Online Passive-Aggressive
Algorithms" (JMLR 2006), PA-II, for batches in place of single documents; its dual is solved by
coordinate descent, as in `solve.py`, by the products of the documents with each other.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.sparse import csr_matrix, vstack

from xmlkernels.errors import InputError
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.linear import LinearRanker

_DOCUMENTS = 256  # of one step; more are taken in turn


def train_further(
    ranker: LinearRanker, features: Features, labels: csr_matrix, pairs: csr_matrix
) -> LinearRanker:
    """Move the weights of the labels that a batch touches.

    Args:
        ranker: trained with the squared hinge on features without an embedding.
        features: of n documents.
        labels: [n, L] sparse, non-zeros are positives.
        pairs: [n, L] sparse, the pairs that are trained on; positives always are.

    Returns:
        The ranker with other rows for these labels; all others are the same.

    Raises:
        InputError: a ranker of logistic loss, or of an embedding.
    """
    if ranker.settings.loss != "squared_hinge" or ranker.dense.shape[1]:
        got = "another loss" if ranker.settings.loss != "squared_hinge" else "an embedding"
        mend = "train it again on everything"
        raise InputError("ranker", "the squared hinge and TF-IDF alone", got, mend)
    seen = csr_matrix(labels != 0) + csr_matrix(pairs != 0)
    touched = np.unique(seen.indices)
    rows, bias = ranker.sparse[touched], ranker.bias[touched].astype(np.float64)
    for first in range(0, len(features), _DOCUMENTS):
        some = slice(first, first + _DOCUMENTS)
        x = features.sparse[some].astype(np.float64)
        true = labels[some][:, touched].toarray() != 0
        listed = seen[some][:, touched].toarray() != 0
        start = np.asarray((x @ rows.T).todense()) + bias
        moved = _solve(ranker, x, np.where(true, 1.0, -1.0), listed, start)
        rows = csr_matrix(rows + csr_matrix(moved.T) @ x)
        bias += ranker.settings.bias**2 * moved.sum(0)
    rows.data[np.abs(rows.data) <= ranker.settings.prune] = 0
    rows.eliminate_zeros()
    order = np.arange(len(ranker.bias))
    order[touched] = len(order) + np.arange(len(touched))
    whole = csr_matrix(vstack([ranker.sparse, rows.astype(np.float32)], "csr")[order])
    biases = ranker.bias.copy()
    biases[touched] = bias
    return replace(ranker, sparse=whole, bias=biases)


def _solve(
    ranker: LinearRanker, x: csr_matrix, y: np.ndarray, listed: np.ndarray, margin: np.ndarray
) -> np.ndarray:
    """Return y times the multipliers of each document and label, fp64 [n, T].

    Args:
        ranker: its settings are used.
        x: [n, V].
        y: [n, T], 1 or -1.
        listed: bool [n, T]; other pairs stay at 0.
        margin: [n, T], of the weights before; it is changed.
    """
    settings = ranker.settings
    products = np.asarray((x @ x.T).todense()) + settings.bias**2
    cost = np.where(y > 0, settings.cost * settings.positive_weight, settings.cost)
    own, alpha = 0.5 / cost, np.zeros_like(y)
    draw = np.random.default_rng(settings.seed)
    for _ in range(settings.epochs):
        for i in draw.permutation(len(y)):
            gradient = y[i] * margin[i] - 1 + own[i] * alpha[i]
            new = np.maximum(alpha[i] - gradient / (products[i, i] + own[i]), 0)
            step = np.where(listed[i], new - alpha[i], 0)
            alpha[i] += step
            margin += products[:, i, None] * (y[i] * step)
    return np.asarray(y * alpha)
