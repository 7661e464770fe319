"""How long the recipe `linear` will take: timed on a sample of the documents, on this machine.

A tree's classifiers visit every document for the labels of its clusters: their cost grows with the
product of labels, documents and terms per document, which no constant per document foretells.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.data.dataset import Dataset
from xmlkernels.data.vectorizer import Vectorizer
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.grouped import fit_groups
from xmlkernels.ranker.linear import Settings
from xmlkernels.training.linear import LinearConfig, tree_depths

_SAMPLE = 1_000  # documents
_LABELS, _CLUSTERS = 128, 16  # that are trained together, as in a tree and above it
# What a sample does not show, of docs/results/: seconds for a pair of a document and a label on
# its shortlist, in training and in scoring, for a document's terms in scoring (per term), and for
# a label in a tree.
_PAIR, _SCORED, _TERM, _LABEL = 80e-9, 300e-9, 5e-9, 150e-6
_MARGIN = 1.2


@dataclass(frozen=True)
class LinearCost:
    """Seconds of the recipe `linear` on one kind of features.

    Attributes:
        features: TF-IDF of all texts, once for all trees.
        tree: a tree and its ranker, measured on validation and test.
    """

    features: float
    tree: float

    def of(self, trees: int) -> float:
        """Return the seconds of some trees."""
        return self.features + trees * self.tree


def time_linear(
    dataset: Dataset, cores: float, now: Callable[[], float] = time.perf_counter
) -> dict[int, LinearCost]:
    """Time TF-IDF and classifiers on a thousand documents, and foretell those of all.

    Args:
        dataset: with its texts.
        cores: as many as classifiers are trained on at a time.
        now: what tells the time, in seconds.

    Returns:
        What words alone (1) and words and pairs of them (2) cost.
    """
    train = dataset.splits["train"]
    random = np.random.default_rng(0)
    rows = np.sort(random.choice(len(train), min(_SAMPLE, len(train)), replace=False))
    found = train.some_texts(set(rows.tolist()))
    texts, labels = [found[row] for row in rows.tolist()], train.labels[rows]
    used = np.flatnonzero(np.bincount(labels.indices, minlength=labels.shape[1]))
    some = labels[:, random.permutation(used)[:_LABELS]]
    every = sum(len(split) for split in dataset.splits.values())
    asked = every - len(train)
    pairs, clusters = _pairs(dataset.num_labels)
    costs = {}
    Vectorizer(longest=1, min_df=1).fit(texts[:10])  # what it loads on first use
    for longest in (1, 2):
        begun = now()
        sparse = Vectorizer(longest=longest, min_df=1).fit(texts)
        each = (now() - begun) / len(texts)
        terms = sparse.nnz / len(texts) * _kept(sparse)
        rates = []
        for count in (_LABELS, _CLUSTERS):
            part = csr_matrix(some[:, :count])
            fit = _fit(sparse, part)
            fit()  # compiled, and in the cache
            begun = now()
            fit()
            rates.append((now() - begun) / max(1, sparse.nnz * part.shape[1]))
        training = len(train) * (
            pairs * (rates[0] * terms + _PAIR) + clusters * (rates[1] * terms + 2 * _PAIR)
        )
        scoring = asked * pairs * (_TERM * terms + _SCORED)
        tree = (training + scoring) / cores + _LABEL * dataset.num_labels
        costs[longest] = LinearCost(_MARGIN * each * every, _MARGIN * tree)
    return costs


def _pairs(labels: int) -> tuple[float, float]:
    """Return for how many labels, and for how many clusters, a document is visited."""
    depths, beam = tree_depths(labels), LinearConfig.beam
    if not depths:
        return float(labels), 0.0
    sizes = [2**depth for depth in depths]
    clusters = sizes[0] + sum(
        fine * min(1.0, beam / coarse) for coarse, fine in itertools.pairwise(sizes)
    )
    return labels * min(1.0, beam / sizes[-1]), clusters


def _kept(sparse: csr_matrix) -> float:
    """Guess the share of terms that two documents of all have: the sample's own, half-way to all.

    The more documents, the fewer terms stand alone.
    """
    often = np.bincount(sparse.indices, minlength=sparse.shape[1]) > 1
    return float(1 + often[sparse.indices].mean()) / 2


def _fit(sparse: csr_matrix, labels: csr_matrix) -> Callable[[], object]:
    features = Features(np.zeros((sparse.shape[0], 0), np.float32), sparse)
    group = np.zeros(labels.shape[1], np.int64)
    settings = Settings(epochs=6)
    return lambda: fit_groups(features, labels, group, None, settings, threads=1)


def has_names(dataset: Dataset) -> bool:
    """Return whether most labels have a name in words, and not a number or a code."""
    names = dataset.label_names or []
    return 2 * sum(_is_word(name) for name in names) > len(names)


def _is_word(name: str) -> bool:
    return any(len(part) > 2 and part.isalpha() for part in name.replace("-", " ").split())
