"""Label trees, rankers and vocabularies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from harness import Kind
from kinds_data import draw
from safetensors import safe_open
from safetensors.numpy import save
from scipy.sparse import csr_matrix

from xmlkernels.checksums import ALGORITHM, seal
from xmlkernels.data.vectorizer import Vectorizer
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.linear import LinearRanker, Settings
from xmlkernels.ranker.matcher import ClusterMatcher
from xmlkernels.tree.label_tree import LabelTree

LABELS, WIDTH, WORDS = 12, 4, 10
TEXTS = ["one two three", "two three four", "three four five", "five one two"]


def make_tree(folder: Path) -> None:
    fine = np.arange(LABELS) // 2
    LabelTree.from_partitions([fine // 3, fine], {"dataset": "x", "levels": [2, 6]}).save(folder)


def consume_tree(folder: Path) -> None:
    tree = LabelTree.load(folder)
    for level in range(tree.levels):
        assert len(tree.bounds(level)) == tree.sizes[level] + 1
        assert len(tree.ancestors(level)) == len(tree.order)
    assert sorted(tree.place[tree.order]) == list(range(len(tree.order)))


def make_ranker(folder: Path) -> None:
    random = np.random.default_rng(0)
    dense = random.standard_normal((LABELS, WIDTH), np.float32)
    bias = np.zeros(LABELS, np.float32)
    LinearRanker(dense, draw(LABELS, WORDS, 3, 0), bias, Settings(), {"note": [1, None]}).save(
        folder / "ranker.safetensors"
    )


def consume_ranker(folder: Path) -> None:
    ranker = LinearRanker.load(folder / "ranker.safetensors")
    assert isinstance(ranker.facts, dict)
    features = Features(np.ones((2, WIDTH), np.float32), draw(2, WORDS, 3, 1))
    shortlist = csr_matrix(np.ones((2, len(ranker.bias)), np.float32))
    assert np.isfinite(
        ranker.log_probability(ranker.score(features, shortlist, threads=1).data)
    ).all()


def make_vocabulary(folder: Path) -> None:
    vectorizer = Vectorizer(min_df=1)
    vectorizer.fit(TEXTS)
    vectorizer.save(folder)


def consume_vocabulary(folder: Path) -> None:
    vectorizer = Vectorizer.load(folder)
    found = vectorizer.transform(TEXTS)
    assert found.shape == (len(TEXTS), len(vectorizer)) and np.isfinite(found.data).all()


def make_matcher(folder: Path) -> None:
    features = Features.join(None, draw(30, WORDS, 4, 2))
    clusters = [np.arange(LABELS) // 6, np.arange(LABELS) // 3]
    ClusterMatcher.fit(features, draw(30, LABELS, 2, 3), clusters, beam=2, threads=1).save(folder)


def consume_matcher(folder: Path) -> None:
    listed = ClusterMatcher.load(folder).shortlist(
        Features.join(None, draw(3, WORDS, 4, 4)), threads=1
    )
    assert listed.nnz == 0 or (
        listed.indices.max() < listed.shape[1] and np.isfinite(listed.data).all()
    )


def reseal(folder: Path) -> None:
    """Renew the checksum in the header of every safetensors file."""
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "numpy") as file:
                head = file.metadata()
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            head.pop(ALGORITHM)
            path.write_bytes(save(arrays, head | {ALGORITHM: seal(arrays, head)}))
        except Exception:
            continue  # the file is damaged beyond that


KINDS = [
    Kind("label tree", make_tree, consume_tree, reseal),
    Kind("ranker", make_ranker, consume_ranker, reseal),
    Kind("cluster matcher", make_matcher, consume_matcher, reseal),
    Kind("vocabulary", make_vocabulary, consume_vocabulary),
]
