"""Rankers of an estimator that are trained further, a batch of documents at a time.

Letters: n documents of a batch, L labels, V columns of features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, issparse

from xmlkernels.predict.base import TextPredictor
from xmlkernels.predict.forest import Forest
from xmlkernels.predict.ranked import RankedPredictor
from xmlkernels.predict.rewritten import write_ranker
from xmlkernels.predict.source import forest_identity
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.further import train_further
from xmlkernels.ranker.matcher import ClusterMatcher, members


def rankers_of(predictor: TextPredictor) -> tuple[RankedPredictor, ...]:
    """Return the rankers that can be trained further; none of a model."""
    parts = predictor.rankers if isinstance(predictor, Forest) else (predictor,)
    return tuple(part for part in parts if isinstance(part, RankedPredictor))


def continue_rankers(predictor: TextPredictor, documents: Any, labels: csr_matrix) -> None:
    """Train the rankers of a predictor further on n documents.

    A label is trained on its own documents and on those whose shortlist holds it, and a tree's
    clusters likewise: those of the first level on all documents, finer ones below true clusters.

    Args:
        predictor: of `linear`; its rankers are replaced.
        documents: n texts, or CSR [n, V].
        labels: CSR [n, L].
    """
    for one in rankers_of(predictor):
        words = documents
        if not issparse(documents):
            assert one.vectorizer is not None
            words = one.vectorizer.transform(map(one.parts.words, documents))
        features = one.reranker.features(None, words)
        if one.matcher is None:
            pairs = csr_matrix(np.ones(labels.shape, np.int8))
        else:
            one.matcher = _clusters(one.matcher, features, labels)
            pairs = one.matcher.shortlist(features, threads=one.threads)
        ranker = train_further(one.reranker.ranker, features, labels, pairs)
        one.reranker = replace(one.reranker, ranker=ranker)


def _clusters(matcher: ClusterMatcher, features: Features, labels: csr_matrix) -> ClusterMatcher:
    """Train the classifiers of clusters further."""
    rankers, above = [], None
    for ranker, part in zip(matcher.rankers, matcher.clusters, strict=True):
        member = members(part)
        true = csr_matrix(labels @ member)
        pairs = csr_matrix(np.ones(true.shape, np.int8))
        if above is not None:  # all labels of the true clusters above, by their clusters here
            pairs = csr_matrix(above @ member)
        rankers.append(train_further(ranker, features, true, pairs))
        above = csr_matrix(true @ member.T)
    return replace(matcher, rankers=tuple(rankers))


def keep_rankers(predictor: TextPredictor) -> None:
    """Write the rankers into the folders that they were loaded from, with their calibrations."""
    made = []
    for one in rankers_of(predictor):
        assert one.folder is not None
        one.reranker = write_ranker(one.reranker, one.matcher, one.calibration, one.folder)
        made.append(one.reranker)
    if isinstance(predictor, Forest) and predictor.calibration is not None:
        first = predictor.rankers[0].folder
        assert first is not None
        replace(predictor.calibration, identity=forest_identity(made)).save(first.parent)
