"""Shortlists without a neural model: linear classifiers of clusters, down a tree by beam search.

Letters: N documents, L labels, R cluster levels, n_r clusters of level r (coarse to fine).

Source: Prabhu et al., "Parabel" (WWW 2018), and Yu et al., "PECOS: Prediction for Enormous and
Correlated Output Spaces" (JMLR 2022), section 4: a cluster's classifier sees the documents for
which its parent was kept or is true.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.errors import InputError
from xmlkernels.parallel import in_parallel, keep_compiled
from xmlkernels.ranker.blend import log_odds
from xmlkernels.ranker.descend import keep_children
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.grouped import fit_groups
from xmlkernels.ranker.linear import LinearRanker, Settings, arrays_of
from xmlkernels.records import Count, Meta, Positive, check_record
from xmlkernels.ticks import Ticks

log = logging.getLogger(__name__)

_Level = tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray, bool]

_ROWS = 4096  # documents that a thread takes at one time


class Facts(TypedDict):
    """What the file of each level keeps besides its classifiers."""

    clusters: list[Count]
    beam: Positive
    levels: Annotated[int, Meta(ge=1, le=16)]


@dataclass(frozen=True)
class ClusterMatcher:
    """Which labels a document may have, by the clusters that its features point to.

    Attributes:
        rankers: one for each cluster level, coarse to fine.
        clusters: int64 [L] for each level: the cluster of each label id. Finer clusters lie inside
            coarser ones.
        beam: clusters kept at every level.
    """

    rankers: tuple[LinearRanker, ...]
    clusters: tuple[np.ndarray, ...]
    beam: int

    @classmethod
    def fit(
        cls,
        features: Features,
        labels: csr_matrix,
        clusters: Sequence[np.ndarray],
        *,
        beam: int = 10,
        settings: Settings | None = None,
        threads: int = 0,
    ) -> ClusterMatcher:
        """Train the clusters' classifiers.

        Those of the coarsest level see every document, the others those below the clusters kept or
        true.

        Args:
            features: of N training documents.
            labels: [N, L].
            clusters: the attribute of this class; `tree.ancestors(r)[tree.place]` of a LabelTree,
                for each r.
            beam: clusters kept at every level, here and when it is used.
            settings: of the classifiers.

        Raises:
            InputError: no clusters, not one for each label, not nested, or a beam below 1.
        """
        parts = _checked(clusters, labels.shape[1], beam)
        rankers: list[LinearRanker] = []
        kept: csr_matrix | None = None
        for level, part in enumerate(parts):
            true = _binary(labels @ members(part))
            parents = _parents(parts, level)
            what = (f"classifiers of level {level}", "clusters")
            rankers.append(
                fit_groups(features, true, parents, kept, settings, threads=threads, what=what)
            )
            if level + 1 < len(parts):
                kept = cls(tuple(rankers), parts[: level + 1], beam).kept(features, threads=threads)
        return cls(tuple(rankers), parts, beam)

    def shortlist(self, features: Features, *, threads: int = 0) -> csr_matrix:
        """Return the labels of the kept clusters, CSR float32 [N, L].

        Values are the log-odds of the clusters.
        """
        listed = self.kept(features, threads=threads) @ members(self.clusters[-1]).T
        listed.data = log_odds(listed.data).astype(np.float32)
        listed.sort_indices()
        return listed.astype(np.float32)

    def shortlist_among(
        self, features: Features, labels: np.ndarray, *, threads: int = 0
    ) -> csr_matrix:
        """Return all of some labels, CSR float32 [N, L], also those of clusters beyond the beam.

        Args:
            features: of N documents.
            labels: int64 [A], ascending, at least one.
            threads: as of `in_parallel`.

        Returns:
            The log-odds of each label's cluster, as of `shortlist`.
        """
        some = self.among(labels)
        beam = max(len(ranker.bias) for ranker in some.rankers)
        found = replace(some, beam=beam).shortlist(features, threads=threads)
        shape = (len(features), len(self.clusters[0]))
        return csr_matrix((found.data, labels[found.indices], found.indptr), shape)

    def among(self, labels: np.ndarray) -> ClusterMatcher:
        """Return the matcher of some labels, int64 [A], ascending, and of their clusters alone."""
        rankers, parts = [], []
        for ranker, clusters in zip(self.rankers, self.clusters, strict=True):
            there, own = np.unique(clusters[labels], return_inverse=True)
            rankers.append(
                replace(
                    ranker,
                    dense=ranker.dense[there],
                    sparse=ranker.sparse[there],
                    bias=ranker.bias[there],
                )
            )
            parts.append(own.astype(np.int64))
        return ClusterMatcher(tuple(rankers), tuple(parts), self.beam)

    def save(self, folder: str | Path) -> None:
        """Write level0.safetensors, level1.safetensors … into a folder, each file whole.

        The folder is made where it does not exist.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        for level, (ranker, part) in enumerate(zip(self.rankers, self.clusters, strict=True)):
            facts = {"clusters": part.tolist(), "beam": self.beam, "levels": len(self.rankers)}
            replace(ranker, facts=ranker.facts | facts).save(
                Path(folder) / f"level{level}.safetensors"
            )

    @classmethod
    def load(cls, folder: str | Path) -> ClusterMatcher:
        """Load what `save` wrote.

        Raises:
            InputError: Where a level is missing, damaged or of another matcher.
        """
        mend = "train it again"
        rankers = [LinearRanker.load(Path(folder) / "level0.safetensors")]
        facts: list[Facts] = []
        while True:
            level = len(rankers) - 1
            where = f"{Path(folder) / f'level{level}.safetensors'}, head, facts"
            if level == 0 and "clusters" not in rankers[0].facts:
                raise InputError(
                    str(folder), "the levels of a cluster matcher", "none (no clusters)", mend
                )
            facts.append(check_record(rankers[level].facts, Facts, where=where, mend=mend))
            if len(rankers) == facts[0]["levels"]:
                break
            rankers.append(LinearRanker.load(Path(folder) / f"level{len(rankers)}.safetensors"))
        parts = _checked(
            [np.array(f["clusters"], np.int64) for f in facts],
            len(facts[0]["clusters"]),
            facts[0]["beam"],
        )
        columns = rankers[0].sparse.shape[1]
        for level, (ranker, part) in enumerate(zip(rankers, parts, strict=True)):
            if (found := ranker.sparse.shape[1]) != columns:
                expected = f"{columns} columns, those of level 0"
                raise InputError(f"{folder}, level {level}", expected, str(found), mend)
            count = int(part.max(initial=-1)) + 1
            if len(ranker.bias) != count:
                got = str(len(ranker.bias))
                raise InputError(
                    f"{folder}, level {level}",
                    f"{count} classifiers, one for each cluster",
                    got,
                    mend,
                )
        return cls(tuple(rankers), parts, facts[0]["beam"])

    @cached_property
    def _levels(self) -> list[tuple[np.ndarray, _Level]]:
        """Of each level its clusters by their parents, and what `keep_children` knows of them.

        Made once: turning the weights around takes longer than the clusters of a text.
        """
        found: list[tuple[np.ndarray, _Level]] = []
        for level, ranker in enumerate(self.rankers):
            parents, used = _parents(self.clusters, level), np.unique(self.clusters[level])
            order = used[np.argsort(parents[used], kind="stable")]
            ends = np.concatenate([[0], np.cumsum(np.bincount(parents[used]))])
            weights = arrays_of(ranker.as_sparse()[order].T.tocsr())
            how = (ends, weights, ranker.bias[order], ranker.settings.loss == "logistic")
            found.append((order, how))
        return found

    def kept(self, features: Features, *, threads: int = 0) -> csr_matrix:
        """Return the best clusters of the last level.

        CSR float64 [N, n_r] of the log of the product of probabilities.
        """
        n, x = len(features), arrays_of(features.as_sparse())
        # The root, all but certain.
        names = np.zeros((n, 1), np.int32)
        values = np.full((n, 1), -np.finfo(np.float64).tiny)
        keep_compiled(keep_children)
        for level, (order, how) in enumerate(self._levels):
            above = names, values
            names = np.full((n, self.beam), -1, np.int32)
            values = np.full((n, self.beam), -np.inf)

            def descend(begin: int, end: int) -> None:
                keep_children(begin, end, x, above, *how, values, names)  # noqa: B023

            ticks = Ticks(log, f"clusters of level {level} for each document", n, "documents")
            in_parallel(descend, n, _ROWS, threads, done=ticks.add)
            names = np.where(names >= 0, order[names], -1).astype(np.int32)
        place = np.nonzero(names >= 0)
        shape = (n, self.rankers[-1].sparse.shape[0])
        found = csr_matrix((values[place], (place[0], names[place])), shape)
        found.sort_indices()
        return found


def _checked(clusters: Sequence[np.ndarray], labels: int, beam: int) -> tuple[np.ndarray, ...]:
    parts = tuple(np.asarray(part) for part in clusters)
    if not parts or any(
        p.shape != (labels,) or p.dtype.kind not in "iu" or (labels and p.min() < 0) for p in parts
    ):
        got = ", ".join(f"{p.dtype} {list(p.shape)}" for p in parts) or "none"
        raise InputError(
            "clusters",
            f"the cluster of each of {labels} labels, level by level",
            got,
            "take them from one tree",
        )
    for level, (coarse, fine) in enumerate(itertools.pairwise(parts)):
        if len(np.unique(np.stack([coarse, fine]), axis=1).T) != len(np.unique(fine)):
            raise InputError(
                f"clusters, level {level + 1}",
                "clusters inside those above",
                "one in two",
                "take one tree's",
            )
    if beam < 1:
        raise InputError("beam", "1 or more", repr(beam), "keep at least one cluster")
    return tuple(part.astype(np.int64) for part in parts)


def members(part: np.ndarray) -> csr_matrix:
    """float64 [L, n]: 1 where the label is in the cluster."""
    shape = (len(part), int(part.max(initial=-1)) + 1)
    return csr_matrix((np.ones(len(part)), part, np.arange(len(part) + 1)), shape)


def _parents(parts: Sequence[np.ndarray], level: int) -> np.ndarray:
    """int64 [n_r]: the cluster of the level above in which each cluster lies; 0 at the first."""
    parents = np.zeros(int(parts[level].max(initial=-1)) + 1, np.int64)
    if level:
        parents[parts[level]] = parts[level - 1]
    return parents


def _binary(matrix: csr_matrix) -> csr_matrix:
    """Ones where something is stored."""
    return csr_matrix((np.ones(matrix.nnz), matrix.indices, matrix.indptr), matrix.shape)
