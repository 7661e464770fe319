"""Balanced clusters of labels by repeated spherical 2-means, at any levels.

Source: Prabhu et al., Parabel (WWW 2018), section 3.1 (balanced spherical 2-means); the starts, the
parts of unequal numbers and the threads are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from threading import local as thread_local

import numpy as np

from xmlkernels.errors import InputError
from xmlkernels.parallel import in_parallel, keep_compiled
from xmlkernels.ticks import Ticks
from xmlkernels.tree.features import LabelFeatures
from xmlkernels.tree.large_node import add_columns, add_dense, split_large
from xmlkernels.tree.two_means import score_some, split_node, start_on_sample

log = logging.getLogger(__name__)

# None of these depends on the machine: they decide the clusters.
LARGE = 4096  # rows from which all threads work on one node
SAMPLE = 512  # rows of a node on which its starts are tried
# rows up to which a node is split by its pairwise similarities, from four times as many starts; at
# most SAMPLE
PAIRWISE = 64

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Means:
    """Settings of 2-means.

    `starts` pairs of first centres are tried; iteration stops at this rise of the mean similarity,
    or after `rounds`.
    """

    starts: int = 8
    tolerance: float = 1e-4
    rounds: int = 100
    seed: int = 0


@dataclass(frozen=True)
class _Node:
    """Labels begin:end of the order, to become `clusters` clusters."""

    begin: int
    end: int
    clusters: int

    @property
    def size(self) -> int:
        return self.end - self.begin


def cluster(
    features: LabelFeatures,
    counts: Sequence[int],
    means: Means | None = None,
    tell: Tell = lambda line: None,
) -> list[np.ndarray]:
    """Partition the labels into about counts[r] clusters at level r, nested in the level above.

    Sizes are as equal as halving makes them.

    A level of at least as many clusters as labels has one label in each. Labels without features
    are no neighbours of anything: they make clusters of their own, in the order of their ids. The
    result depends on features, counts and settings, not on the number of threads.

    Args:
        counts: clusters of each level, coarse to fine, not falling; no need to be powers of 2 or
            multiples.

    Returns:
        One int64 array [L] per level, numbered from 0 in tree order: what
        `LabelTree.from_partitions` takes.

    Raises:
        InputError: no level, a count below 1 or below the level above it, no labels, a setting out
            of range.
    """
    means = means or Means()
    labels = len(features)
    _check(counts, means, labels)
    splitter = _Splitter(features, means)
    order = np.arange(labels)
    nodes = [_Node(0, labels, counts[0])]
    partitions = []
    for level, count in enumerate(counts):
        if level:
            nodes = _share(nodes, count)
        finest = level == len(counts) - 1
        splitter.begin(level, nodes)
        while any(node.clusters > 1 and node.size > 1 for node in nodes):
            nodes = splitter.halve(order, nodes, finest)
        partition = np.empty(labels, np.int64)
        for number, node in enumerate(nodes):
            partition[order[node.begin : node.end]] = number
        partitions.append(partition)
        tell(f"level {level}: {len(nodes):,} clusters")
    return partitions


class _Splitter:
    def __init__(self, features: LabelFeatures, means: Means) -> None:
        keep_compiled(split_node, start_on_sample, score_some, add_columns, add_dense)
        self.features, self.means = features, means
        self.sparse = (
            features.sparse.indptr.astype(np.int64),
            features.sparse.indices,
            features.sparse.data,
        )
        self.dense = (
            np.zeros((len(features), 0), np.float32) if features.dense is None else features.dense
        )
        self.empty = features.empty
        self.ticks = Ticks(log, "clusters", None, "labels placed")
        self._own = thread_local()

    def begin(self, level: int, nodes: list[_Node]) -> None:
        """Tell from now on how far this level is: each halving of a node places its labels."""
        work = [node.size * (node.clusters - 1).bit_length() for node in nodes]
        what = f"level {level}, {sum(node.clusters for node in nodes):,} clusters"
        self.ticks = Ticks(log, what, sum(work), "labels placed")

    def halve(self, order: np.ndarray, nodes: list[_Node], finest: bool) -> list[_Node]:
        """Cut every node that must become several clusters in two.

        `order` is rearranged inside nodes.
        """
        made: list[list[_Node]] = [[node] for node in nodes]
        todo: list[int] = []
        for i, node in enumerate(nodes):
            if node.clusters == 1 or node.size == 1:
                made[i] = [replace(node, clusters=1)]
            elif node.size <= node.clusters:
                order[node.begin : node.end].sort()
                made[i] = [_Node(at, at + 1, 1) for at in range(node.begin, node.end)]
            else:
                todo.append(i)
        small = [i for i in todo if nodes[i].size < LARGE]

        def work(begin: int, end: int) -> None:
            for i in small[begin:end]:
                made[i] = self._cut(order, nodes[i], finest)
                self.ticks.add(nodes[i].size)

        for i in todo:
            if nodes[i].size >= LARGE:
                made[i] = self._cut(order, nodes[i], finest)
                self.ticks.add(nodes[i].size)
        in_parallel(work, len(small), max(1, len(small) // 256))
        return [node for group in made for node in group]

    def _cut(self, order: np.ndarray, node: _Node, finest: bool) -> list[_Node]:
        rows = np.sort(order[node.begin : node.end])
        bare = self.empty[rows]
        bare_count = int(bare.sum())
        apart = 0 if bare_count in (0, node.size) else _clusters_apart(node, bare_count, finest)
        if apart:
            order[node.begin : node.end] = np.concatenate([rows[~bare], rows[bare]])
            middle = node.end - bare_count
            return [
                _Node(node.begin, middle, node.clusters - apart),
                _Node(middle, node.end, apart),
            ]
        left = (node.clusters + 1) // 2
        # Rounded half up; each side has at least as many labels as clusters because the node has.
        first = (2 * node.size * left + node.clusters) // (2 * node.clusters)
        if bare_count == node.size:
            is_first = np.arange(node.size) < first
        else:
            # Too few without features for a cluster at this level: they ride along at the end.
            is_first = np.zeros(node.size, bool)
            is_first[~bare] = self._split(rows[~bare], first, node)
        order[node.begin : node.end] = np.concatenate([rows[is_first], rows[~is_first]])
        middle = node.begin + first
        return [_Node(node.begin, middle, left), _Node(middle, node.end, node.clusters - left)]

    def _split(self, rows: np.ndarray, first: int, node: _Node) -> np.ndarray:
        n, means = len(rows), self.means
        if first >= n:
            return np.ones(n, bool)
        # A node is known by its place and size, which no other node of any round shares.
        random = np.random.Generator(
            np.random.Philox(key=means.seed, counter=[node.begin, node.size, n, 0])
        )
        taken = min(n, SAMPLE)
        sample = np.arange(n) if n <= SAMPLE else np.sort(random.choice(n, taken, replace=False))
        sample_first = min(max(round(taken * first / n), 1), taken - 1)
        starts = means.starts * (4 if n <= PAIRWISE else 1)  # nearly free there
        pair, second = random.integers(0, taken, starts), random.integers(1, taken, starts)
        pairs = np.stack([pair, (pair + second) % taken], axis=1)
        noise = random.standard_normal((starts, taken), np.float32)
        tried = (rows, first, sample, sample_first, pairs, noise)
        bounds = (means.tolerance, means.rounds, self._map())
        side: np.ndarray
        if n >= LARGE:
            tick = partial(self.ticks.add, 0)
            side = split_large(self.sparse, self.dense, *tried, *bounds, tick)
        else:
            side = split_node(*self.sparse, self.dense, *tried, PAIRWISE, *bounds)
        return side

    def _map(self) -> np.ndarray:
        """Return this thread's int32 [V] of −1, which the loops use and restore."""
        if not hasattr(self._own, "map"):
            self._own.map = np.full(self.features.sparse.shape[1], -1, np.int32)
        own: np.ndarray = self._own.map
        return own


def _clusters_apart(node: _Node, bare: int, finest: bool) -> int:
    """Return the number of clusters for labels without features: their share of all.

    0 where the share is less than one and a later level will make some.
    """
    share = round(node.clusters * bare / node.size)
    if share == 0 and not finest and node.clusters < 32:
        return 0
    return min(max(share, 1, node.clusters - (node.size - bare)), node.clusters - 1, bare)


def _share(nodes: list[_Node], count: int) -> list[_Node]:
    """Share the clusters of a level among the nodes of the level above.

    Equally where it divides, else by size.

    Every node gets at least one cluster and no more than it has labels; together they get `count`.
    """
    sizes = np.array([node.size for node in nodes])
    labels = int(sizes.sum())
    if count >= labels:
        return [replace(node, clusters=node.size) for node in nodes]
    fair = (
        np.full(len(nodes), count / len(nodes))
        if count % len(nodes) == 0
        else sizes * (count / labels)
    )
    shares = np.clip(np.floor(fair).astype(np.int64), 1, sizes)
    while (short := count - int(shares.sum())) != 0:
        step = 1 if short > 0 else -1
        free = np.flatnonzero(shares < sizes if step > 0 else shares > 1)
        # Those that are furthest from their fair share; of equal ones the first.
        wanting = free[np.argsort(-step * (fair - shares)[free], kind="stable")]
        shares[wanting[: abs(short)]] += step
    return [replace(node, clusters=int(share)) for node, share in zip(nodes, shares, strict=True)]


def _check(counts: Sequence[int], means: Means, labels: int) -> None:
    rules = [
        (labels >= 1, "features", "at least one label", labels),
        (len(counts) >= 1, "counts", "the clusters of at least one level", list(counts)),
        (
            all(count >= 1 for count in counts),
            "counts",
            "at least one cluster at each level",
            list(counts),
        ),
        (list(counts) == sorted(counts), "counts", "levels from coarse to fine", list(counts)),
        (means.starts >= 1, "starts", "at least 1", means.starts),
        (means.rounds >= 1, "rounds", "at least 1", means.rounds),
        (means.tolerance >= 0, "tolerance", "0 or more", means.tolerance),
        (0 <= means.seed < 2**64, "seed", "an integer from 0 to 2**64 - 1", means.seed),
    ]
    for good, where, expected, got in rules:
        if not good:
            raise InputError(where, expected, str(got), "mend the setting of the clusters")
