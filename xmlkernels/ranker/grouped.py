"""Train the classifiers of labels that stand in groups: a group's labels share their documents.

A tree's clusters are such groups: whatever cluster is kept for a document, all its labels are on
the shortlist. So a shortlist is never written out label by label: its memory is that of the kept
clusters.

Letters: N documents, L labels, C groups, D width of the embedding, V columns of TF-IDF.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.data.formats.matrices import check_shape
from xmlkernels.errors import InputError
from xmlkernels.parallel import in_parallel, keep_compiled
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.joint import gather, keep_large, pairs_of, solve_jointly
from xmlkernels.ranker.linear import Arrays, LinearRanker, Settings, arrays_of, transposed
from xmlkernels.ranker.solve import solve
from xmlkernels.ticks import Ticks

log = logging.getLogger(__name__)

_MOST = 128  # labels trained together
# Working memory of a thread: weights of all columns and multipliers of all documents, label by
# label.
_BYTES = 1 << 28


def fit_groups(
    features: Features,
    labels: csr_matrix,
    group: np.ndarray,
    listed: csr_matrix | None = None,
    settings: Settings | None = None,
    *,
    excluded: np.ndarray | None = None,
    threads: int = 0,
    facts: dict[str, Any] | None = None,
    what: tuple[str, str] = ("classifiers", "labels"),
) -> LinearRanker:
    """Train each label on the documents for which its group is listed or holds a true label.

    A group without documents leaves its labels without weights: their margins are 0.

    Args:
        features: of N training documents.
        labels: [N, L] sparse; stored non-zeros are positives.
        group: int64 [L], the group of each label, from 0 to C - 1.
        listed: [N, C] sparse; every stored pair counts, whatever its value. None lists every group
            for every document.
        settings: the defaults when not given. `negatives` random documents are added to those of
            each group, not of each label.
        excluded: int64 [n, 2], pairs (document, label) that are not trained on unless they are
            true.
        threads: of numba; 0 leaves its number. The result does not depend on it.
        facts: JSON values to keep with the ranker.
        what: is trained, and of what: for the lines of progress.

    Raises:
        InputError: matrices of other shapes, or not one group for each label.
    """
    settings = settings or Settings()
    n = len(features)
    check_shape(labels.shape, n, None, "labels")
    count = int(group.max(initial=-1)) + 1
    if group.shape != (labels.shape[1],) or group.min(initial=0) < 0:
        got = f"{group.dtype} {list(group.shape)}"
        mend = "take them from one tree"
        raise InputError("group", f"one group for each of {labels.shape[1]} labels", got, mend)
    if listed is not None:
        check_shape(listed.shape, n, count, "listed groups")
    task = _Task.of(features, labels, settings, excluded)
    pieces = task.pieces(group, count, listed)
    parts: list[Any] = [None] * len(pieces)
    keep_compiled(gather, pairs_of, solve_jointly, keep_large, solve)

    ticks = Ticks(log, what[0], len(group), what[1])

    def train(begin: int, end: int) -> None:
        for number in range(begin, end):
            parts[number] = task.train(*pieces[number])
            ticks.add(len(pieces[number][0]))

    in_parallel(train, len(pieces), 1, threads)
    return task.ranker([labels for labels, _ in pieces], parts, facts or {})


@dataclass(frozen=True)
class _Task:
    """What all groups are trained by; `x` holds the D columns of the embedding before TF-IDF's."""

    x: csr_matrix
    squares: np.ndarray
    positives: Arrays
    excluded: Arrays
    widths: tuple[int, int]
    settings: Settings

    @classmethod
    def of(
        cls,
        features: Features,
        labels: csr_matrix,
        settings: Settings,
        excluded: np.ndarray | None,
    ) -> _Task:
        x = features.as_sparse()
        squares = np.asarray(x.multiply(x).sum(1), np.float32).ravel()
        pairs = np.zeros((0, 2), np.int64) if excluded is None else excluded
        barred = csr_matrix(
            (np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), labels.shape
        )
        positives = transposed(labels, drop_zeros=True)
        return cls(x, squares, positives, transposed(barred), features.widths, settings)

    def pieces(
        self, group: np.ndarray, count: int, listed: csr_matrix | None
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """List what is trained together: labels int64, and their documents int32 (None: all).

        The heaviest come first.
        """
        order = np.argsort(group, kind="stable")
        ends = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=count))])
        documents = None if listed is None else self._documents(group, count, listed)
        found: list[tuple[np.ndarray, np.ndarray | None]] = []
        for number in range(count):
            members = order[ends[number] : ends[number + 1]]
            docs = None if documents is None else documents[number]
            held = self.x.shape[0] if docs is None else len(docs)
            size = max(1, min(_MOST, _BYTES // (4 * max(1, held + self.x.shape[1]))))
            found += [(members[at : at + size], docs) for at in range(0, len(members), size)]
        if documents is not None:
            found.sort(key=lambda piece: -len(piece[0]) * len(piece[1]))  # type: ignore[arg-type]
        return found

    def _documents(self, group: np.ndarray, count: int, listed: csr_matrix) -> list[np.ndarray]:
        """Documents of each group, ascending: listed ones, true ones, and random ones."""
        n = self.x.shape[0]
        ends, docs = transposed(listed)
        true = np.repeat(group, np.diff(self.positives[0]))
        keys = [
            np.repeat(np.arange(count), np.diff(ends)) * n + docs,
            true * n + self.positives[1],
        ]
        if self.settings.negatives:
            random = np.random.default_rng(self.settings.seed)
            drawn = random.integers(n, size=(count, self.settings.negatives))
            keys.append((np.arange(count)[:, None] * n + drawn).ravel())
        every = np.unique(np.concatenate(keys))
        cuts = np.searchsorted(every, np.arange(1, count) * n)
        return [part.astype(np.int32) for part in np.split(every % n, cuts)]

    def train(self, labels: np.ndarray, docs: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """Return the bias float32 [n] and the weights, CSR [n, D + V], of some labels."""
        n, settings = len(labels), self.settings
        constant = np.zeros(n, np.float32)
        if docs is None:
            docs = np.arange(self.x.shape[0], dtype=np.int32)
        if not len(docs):
            none = np.zeros(n + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
            return constant, *none
        *x, names = gather(docs, *arrays_of(self.x), self.x.shape[1])
        squares = self.squares[docs]
        positives = pairs_of(docs, labels, *self.positives)
        excluded = pairs_of(docs, labels, *self.excluded)
        seed = np.uint64(settings.seed ^ ((int(labels[0]) + 1) * 0xD1342543DE82EF95) % 2**64)
        if settings.loss == "logistic":
            weights = self._one_by_one(x, len(names), squares, positives, excluded, seed, constant)
        else:
            weights = np.zeros((len(names), n), np.float32)
            how = tuple(
                float(getattr(settings, name))
                for name in ("cost", "positive_weight", "bias", "tolerance")
            )
            solve_jointly(
                tuple(x),
                squares,
                positives,
                excluded,
                (*how, settings.epochs),
                seed,
                weights,
                constant,
                np.zeros(n, np.int64),
            )
        # The embedding's weights stay, however small.
        first = int(np.searchsorted(names, self.widths[0]))
        return constant * settings.bias, *keep_large(weights, names, first, settings.prune)

    def _one_by_one(
        self,
        x: list[np.ndarray],
        columns: int,
        squares: np.ndarray,
        positives: Arrays,
        excluded: Arrays,
        seed: np.uint64,
        constant: np.ndarray,
    ) -> np.ndarray:
        """Weights float32 [columns, n] by the logistic loss; fills `constant`."""
        n, m, settings = len(constant), len(squares), self.settings
        every = np.ones((n, m), np.int8)
        barred = csr_matrix((np.ones(len(excluded[1])), excluded[1], excluded[0]), (m, n)).tocoo()
        every[barred.col, barred.row] = 0
        true = csr_matrix((np.ones(len(positives[1])), positives[1], positives[0]), (m, n))
        how = (
            True,
            float(settings.cost),
            float(settings.positive_weight),
            float(settings.bias),
            float(settings.tolerance),
            settings.epochs,
            0,
        )
        block, bias = np.zeros((n, columns), np.float32), np.zeros(n)
        dense = np.zeros((m, 0), np.float32)
        solve(
            0,
            n,
            np.arange(n),
            transposed(csr_matrix(every.T)),
            transposed(true),
            squares,
            (dense, *x),
            how,
            seed,
            block,
            bias,
            np.zeros(n, np.int64),
        )
        constant[:] = bias
        return np.ascontiguousarray(block.T)

    def ranker(
        self, labels: list[np.ndarray], parts: list[Any], facts: dict[str, Any]
    ) -> LinearRanker:
        """Put the groups' classifiers together, in the order of the labels."""
        count, width, columns = len(self.positives[0]) - 1, *self.widths
        bias, sizes = np.zeros(count, np.float32), np.zeros(count, np.int64)
        for some, part in zip(labels, parts, strict=True):
            bias[some], sizes[some] = part[0], np.diff(part[1])
        ends = np.concatenate([[0], np.cumsum(sizes)])
        indices, data = np.empty(ends[-1], np.int32), np.empty(ends[-1], np.float32)
        for some in reversed(
            labels
        ):  # each part is freed as it is copied: no weight is there twice
            _, own, names, values = parts.pop()
            place = np.repeat(ends[some] - own[:-1], np.diff(own)) + np.arange(len(names))
            indices[place], data[place] = names, values
        weights = csr_matrix((data, indices, ends), (count, width + columns))
        dense = weights[:, :width].toarray() if width else np.zeros((count, 0), np.float32)
        sparse = weights[:, width:] if width else weights
        return LinearRanker(dense, sparse, bias, self.settings, facts)
