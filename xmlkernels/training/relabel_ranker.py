"""Labels of a linear ranker come and go: rows of new ones, and their clusters in its tree.

Letters: N documents, L labels before, M labels after.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix, vstack

from xmlkernels.data.dataset import Split
from xmlkernels.errors import InputError
from xmlkernels.predict.ranked import RankedPredictor
from xmlkernels.predict.rewritten import write_lines, write_ranker
from xmlkernels.predict.source import VECTORIZER
from xmlkernels.ranker.blend import Reranker
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.linear import LinearRanker, fit
from xmlkernels.ranker.matcher import ClusterMatcher
from xmlkernels.training.relabelled import Change

_NEGATIVES = 200  # random documents of a new label, beside those of its cluster
_SEED = 0  # of the sample


def relabel_ranker(predictor: RankedPredictor, change: Change, folder: Path) -> Reranker:
    """Write a ranker with other labels; the classifiers of those that stay are as they were.

    A new label joins the cluster that the tree's classifiers give the highest probability, summed
    over its text and documents. Its classifier is trained, as all were, on its own documents and
    those whose shortlist holds its cluster: here of a sample of the training documents.

    Returns:
        What was written.

    Raises:
        InputError: the dataset kept no texts.
    """
    reranker, matcher = predictor.reranker, predictor.matcher
    ranker, kept = reranker.ranker, change.kept
    dense, sparse, bias = ranker.dense[kept], ranker.sparse[kept], ranker.bias[kept]
    if matcher is not None:
        matcher = matcher.among(kept)
    if change.new:
        texts, truth = _documents(change)
        features = _features(predictor, texts)
        listed = None
        if matcher is not None:
            clusters = matcher.kept(features, threads=predictor.threads)
            own = _clusters(change, clusters)
            matcher = _joined(matcher, own)
            listed = clusters[:, own]
            listed = csr_matrix((np.ones(listed.nnz), listed.indices, listed.indptr), listed.shape)
        settings = replace(ranker.settings, negatives=max(_NEGATIVES, ranker.settings.negatives))
        truth = csr_matrix(truth[:, len(kept) :])
        made = fit(features, truth, listed, settings, threads=predictor.threads)
        dense = np.concatenate([dense, made.dense])
        sparse = csr_matrix(vstack([sparse, made.sparse], "csr"))
        bias = np.concatenate([bias, made.bias])
    return _write(
        predictor, change, folder, replace(ranker, dense=dense, sparse=sparse, bias=bias), matcher
    )


def _documents(change: Change) -> tuple[list[str], csr_matrix]:
    """Return given and sampled texts, and their labels by number after."""
    assert change.train is not None
    split: Split = change.train
    count = min(change.sample, len(split))
    numbers = np.sort(np.random.default_rng(_SEED).choice(len(split), count, replace=False))
    found = split.some_texts(set(numbers.tolist()))
    if len(found) != count:
        mend = "prepare the data with --keep-texts"
        raise InputError(str(split.folder), "the documents' texts", "none", mend)
    labels = change.after(split.labels[numbers])
    texts = [*change.lines, *(found[number] for number in numbers.tolist())]
    return texts, csr_matrix(vstack([change.truth, labels], "csr"))


def _features(predictor: RankedPredictor, texts: Sequence[str]) -> Features:
    assert predictor.vectorizer is not None
    words = predictor.vectorizer.transform(map(predictor.parts.words, texts))
    return predictor.reranker.features(None, words)


def _clusters(change: Change, kept: csr_matrix) -> np.ndarray:
    """Choose the finest cluster of each new label, int64 [new], from the best of all documents."""
    probability = csr_matrix((np.exp(kept.data), kept.indices, kept.indptr), kept.shape)
    own = change.truth[:, len(change.kept) :].T @ probability[: len(change.lines)]
    return np.asarray(own.toarray().argmax(1), np.int64)


def _joined(matcher: ClusterMatcher, own: np.ndarray) -> ClusterMatcher:
    """Put new labels into finest clusters, and into the clusters above those."""
    finest = matcher.clusters[-1]
    first = np.zeros(int(finest.max()) + 1, np.int64)
    first[finest] = np.arange(len(finest))
    parts = [np.concatenate([part, part[first[own]]]) for part in matcher.clusters]
    return replace(matcher, clusters=tuple(parts))


def _write(
    predictor: RankedPredictor,
    change: Change,
    folder: Path,
    ranker: LinearRanker,
    matcher: ClusterMatcher | None,
) -> Reranker:
    """Write the ranker and what lies beside it, the calibration too."""
    assert predictor.folder is not None
    shutil.copytree(predictor.folder / VECTORIZER, folder / VECTORIZER)
    write_lines(folder, change.every, change.ids(predictor))
    calibration = predictor.calibration
    if calibration is not None:
        calibration = change.calibrated(calibration, "")
    whole = replace(predictor.reranker, ranker=ranker)
    return write_ranker(whole, matcher, calibration, folder)
