"""Balanced 2-means: planted hierarchies, the best of all splits, sizes, threads, labels without
features.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from planted import planted, recovered
from scipy.sparse import csr_matrix, random

from xmlkernels.errors import InputError
from xmlkernels.tree import cluster as module
from xmlkernels.tree.cluster import Means, cluster
from xmlkernels.tree.features import LabelFeatures, label_features
from xmlkernels.tree.label_tree import LabelTree


def noise(labels: int, seed: int = 0, columns: int = 60) -> csr_matrix:
    return csr_matrix(random(labels, columns, 0.2, "csr", np.float32, np.random.default_rng(seed)))


def dense_noise(labels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(labels, 6)).astype(np.float32)


@pytest.fixture(params=["pairwise", "small", "large"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node by one of the three ways of splitting it."""
    if request.param != "pairwise":
        monkeypatch.setattr(module, "PAIRWISE", 0)
        monkeypatch.setattr(module, "LARGE", 0 if request.param == "large" else 1 << 40)
    else:
        monkeypatch.setattr(module, "PAIRWISE", 1 << 40)
    monkeypatch.setattr(module, "SAMPLE", 1 << 40 if request.param == "pairwise" else 64)


@pytest.mark.parametrize(
    ("branching", "counts"), [((2, 2, 4), [2, 4, 16]), ((3, 4), [3, 12]), ((5, 2), [10])]
)
def test_recovers_a_planted_hierarchy(
    path: None, branching: tuple[int, ...], counts: list[int]
) -> None:
    for seed in range(3):
        leaf, features = planted(branching, 9, seed)
        found = cluster(label_features(features), counts, Means(seed=seed))
        for partition, count in zip(found, counts, strict=True):
            assert recovered(partition, leaf // (int(np.prod(branching)) // count))


def objective(features: LabelFeatures, first: np.ndarray) -> float:
    blocks = [features.sparse.toarray(), *([] if features.dense is None else [features.dense])]
    return sum(
        float(np.linalg.norm(block[half].sum(axis=0)))
        for block in blocks
        for half in (first, ~first)
    )


@pytest.mark.parametrize("blocks", ["sparse", "dense", "both"])
@pytest.mark.parametrize("labels", [8, 11])
def test_finds_the_best_of_all_splits(path: None, blocks: str, labels: int) -> None:
    best = 0
    for seed in range(5):
        features = label_features(
            None if blocks == "dense" else noise(labels, seed),
            None if blocks == "sparse" else dense_noise(labels, seed),
        )
        every = []
        for chosen in combinations(range(labels), (labels + 1) // 2):
            first = np.zeros(labels, bool)
            first[list(chosen)] = True
            every.append(objective(features, first))
        found = objective(features, cluster(features, [2], Means(starts=32))[0] == 0)
        assert found <= max(every) + 1e-4 and np.mean(found > np.array(every)) > 0.9
        best += found > max(every) - 1e-4
    assert best >= 4


def test_a_split_is_a_fixed_point(path: None) -> None:
    """No row can be exchanged for one of the other half that is nearer to its centre."""
    features = label_features(noise(200, 3), dense_noise(200, 3))
    first = cluster(features, [2], Means(tolerance=0))[0] == 0
    score = np.zeros(200)
    for block in (features.sparse.toarray(), features.dense):
        centres = [
            block[half].sum(axis=0) / np.linalg.norm(block[half].sum(axis=0))
            for half in (first, ~first)
        ]
        score += block @ (centres[0] - centres[1])
    assert first.sum() == 100 and score[first].min() >= score[~first].max() - 1e-4


@pytest.mark.parametrize("counts", [[8, 64], [1, 2, 128], [3, 10, 47], [7, 7, 100, 101], [1]])
def test_levels_nest_and_clusters_are_of_like_size(counts: list[int]) -> None:
    found = cluster(label_features(noise(403)), counts)
    tree = LabelTree.from_partitions(found)
    assert tree.sizes == (*counts, 403)
    for level, count in enumerate(counts):
        sizes = np.bincount(found[level])
        power = count & (count - 1) == 0
        assert sizes.max() - sizes.min() <= (1 if power else 403 / count + 1)
    # numbered in tree order: the tree of the partitions has the same clusters under the same
    # numbers
    assert all((part[tree.order] == tree.ancestors(r)).all() for r, part in enumerate(found))


@pytest.mark.parametrize("labels", [1, 2, 3, 5, 33])
def test_more_clusters_than_labels_are_singletons(labels: int) -> None:
    found = cluster(label_features(noise(labels, columns=9)), [2, 64, 1024])
    tree = LabelTree.from_partitions(found)
    assert tree.sizes == (min(2, labels), labels, labels, labels)


def test_nearly_as_many_clusters_as_labels() -> None:
    found = cluster(label_features(noise(100)), [8, 90])
    assert [part.max() + 1 for part in found] == [8, 90] and np.bincount(found[1]).max() <= 2


@pytest.mark.parametrize("kind", ["sparse", "both"])
def test_threads_do_not_change_the_tree(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(module, "LARGE", 300)
    monkeypatch.setattr(module, "SAMPLE", 100)
    features = label_features(noise(700, columns=200), dense_noise(700) if kind == "both" else None)
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(cluster(features, [4, 60, 200]))
    assert all((a == b).all() for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert any(
        (a != b).any()
        for a, b in zip(found[0], cluster(features, [4, 60, 200], Means(seed=1)), strict=True)
    )


def bare(labels: int, empty: list[int]) -> LabelFeatures:
    keep = np.ones((labels, 1), np.float32)
    keep[empty] = 0
    full = noise(labels, columns=30) + csr_matrix(np.eye(labels, 30, dtype=np.float32))
    full = csr_matrix(
        full
        + csr_matrix((np.ones(labels, np.float32), (np.arange(labels), np.arange(labels) % 30)))
    )
    return label_features(csr_matrix(full.multiply(keep), dtype=np.float32))


@pytest.mark.parametrize(
    "empty", [[5], [0, 7, 50, 99], list(range(0, 100, 2)), list(range(2, 100))]
)
@pytest.mark.parametrize("counts", [[16], [2, 16], [4, 8, 40]])
def test_labels_without_features_have_leaves_of_their_own(
    empty: list[int], counts: list[int]
) -> None:
    found = cluster(bare(100, empty), counts)
    without = np.isin(np.arange(100), empty)
    leaves = [without[found[-1] == leaf] for leaf in range(found[-1].max() + 1)]
    assert all(group.all() or not group.any() for group in leaves) and len(leaves) == counts[-1]
    assert LabelTree.from_partitions(found).sizes == (*counts, 100)


def test_no_label_has_features() -> None:
    found = cluster(label_features(csr_matrix((10, 4), dtype=np.float32)), [2, 5])
    assert found[0].tolist() == [0] * 5 + [1] * 5
    assert np.bincount(found[1]).tolist() == [2, 1, 2, 3, 2] and (np.diff(found[1]) >= 0).all()


def test_equal_labels_are_split_by_number() -> None:
    same = label_features(csr_matrix(np.ones((8, 3), np.float32)))
    assert cluster(same, [2])[0].tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("counts", "means", "says"),
    [
        ([], {}, r"counts: expected the clusters of at least one level, got \[\]"),
        ([0], {}, r"counts: expected at least one cluster at each level, got \[0\]"),
        ([8, 4], {}, r"counts: expected levels from coarse to fine, got \[8, 4\]"),
        ([2], {"starts": 0}, "starts: expected at least 1, got 0"),
        ([2], {"rounds": 0}, "rounds: expected at least 1, got 0"),
        ([2], {"tolerance": -1.0}, "tolerance: expected 0 or more, got -1"),
        ([2], {"seed": -1}, "seed: expected an integer from 0"),
    ],
)
def test_settings_that_cannot_be(counts: list[int], means: dict[str, float], says: str) -> None:
    with pytest.raises(InputError, match=says):
        cluster(label_features(noise(5)), counts, Means(**means))  # type: ignore[arg-type]


def test_no_labels() -> None:
    with pytest.raises(InputError, match="features: expected at least one label, got 0"):
        cluster(label_features(csr_matrix((0, 3), dtype=np.float32)), [2])
