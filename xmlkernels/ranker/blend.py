"""The last word on a shortlist: the plain model's score and the ranker's margin together.

Letters: N documents, L labels, D width of the embedding, V columns of TF-IDF.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix, vstack

from xmlkernels.data.formats.matrices import check_shape
from xmlkernels.errors import InputError
from xmlkernels.metrics import candidates_needed, drop_filtered, evaluate, top_rows_from_csr
from xmlkernels.parallel import in_parallel, keep_compiled
from xmlkernels.ranker.descend import best_stored, mark_undominated
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.linear import LinearRanker
from xmlkernels.records import check_record
from xmlkernels.ticks import Ticks

log = logging.getLogger(__name__)
_TINY = float(np.finfo(np.float64).tiny)
_PAIRS, _ROWS = 1 << 23, 4096  # pairs scored at one time; documents that a thread takes at once
_FEW = 256  # a list of so many is kept by insertion, a longer one is sorted
SHARES = tuple(round(0.05 * step, 2) for step in range(21))
How = Literal["log_odds", "product"]
HOW: tuple[How, ...] = ("log_odds", "product")


class Weights(TypedDict):
    """JSON of the weights of a `Reranker`."""

    share: float
    how: str
    embedding_weight: float
    tfidf_weight: float


@dataclass(frozen=True)
class Reranker:
    """A ranker, how it weighs its two blocks of features, and its share in the final score.

    The final score is either of
    - log_odds: (1 - share) · logit + share · margin,
    - product: (1 - share) · ln p_model + share · ln p_ranker, a weighted product of probabilities,
    given as log-odds. At share 0 it is the plain model's logit, at share 1 the ranker's margin. A
    product that float64 cannot tell from 1 has the log-odds 708.4 and, beyond that, what its margin
    has above 1: such labels keep the order of their margins.

    Attributes:
        ranker: the classifiers.
        share: of the ranker, from 0 to 1.
        how: which of the two.
        embedding_weight, tfidf_weight: of the blocks, as `Features.join` takes them.
    """

    ranker: LinearRanker
    share: float = 0.5
    how: How = "log_odds"
    embedding_weight: float = 1.0
    tfidf_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(
                "share",
                "a number from 0 to 1",
                repr(self.share),
                "0 is the plain model, 1 the ranker alone",
            )
        if self.how not in HOW:
            raise InputError("how", " or ".join(HOW), repr(self.how), "choose one of them")

    def features(self, embedding: np.ndarray | None, tfidf: csr_matrix | None) -> Features:
        """Return the ranker's features.

        A block that the ranker was trained without may be passed and is left out.
        """
        embedding = embedding if self.ranker.dense.shape[1] else None
        tfidf = tfidf if self.ranker.sparse.shape[1] else None
        return Features.join(
            embedding, tfidf, embedding_weight=self.embedding_weight, tfidf_weight=self.tfidf_weight
        )

    def rerank(
        self,
        logits: csr_matrix,
        embedding: np.ndarray | None = None,
        tfidf: csr_matrix | None = None,
    ) -> csr_matrix:
        """Return new logits for the stored pairs of a shortlist.

        Args:
            logits: [N, L] sparse, the plain model's logits of the pairs to score.
            embedding: float [N, D], or None where the ranker has none.
            tfidf: [N, V], or None where the ranker has none.

        Returns:
            CSR float32 [N, L] with the same pattern.

        Raises:
            InputError: shapes that do not fit the ranker.
        """
        margins = self.ranker.score(self.features(embedding, tfidf), logits)
        return self.mix(logits, margins)

    def mix(self, logits: csr_matrix, margins: csr_matrix) -> csr_matrix:
        """Return new logits from margins of model and ranker, stored for the same pairs."""
        plain = logits.tocsr()
        check_shape(margins.shape, plain.shape[0], plain.shape[1], "margins")
        if not (
            np.array_equal(plain.indptr, margins.indptr)
            and np.array_equal(plain.indices, margins.indices)
        ):
            raise InputError(
                "margins", "the pairs of the logits", "other pairs", "score this shortlist"
            )
        if self.share in (0, 1):
            return margins if self.share else plain.astype(np.float32)
        z, margin = plain.data.astype(np.float64), margins.data.astype(np.float64)
        if self.how == "log_odds":
            mixed = (1 - self.share) * z + self.share * margin
        else:
            model = -np.logaddexp(0, -z)
            log_p = (1 - self.share) * model + self.share * self.ranker.log_probability(margin)
            mixed = log_odds(log_p) + np.where(log_p > -_TINY, np.maximum(margin - 1, 0), 0)
        return csr_matrix((mixed.astype(np.float32), plain.indices, plain.indptr), plain.shape)

    def save(self, path: str | Path) -> None:
        """Write ranker and weights into one file, whole or not at all."""
        weights = {
            name: getattr(self, name)
            for name in ("share", "how", "embedding_weight", "tfidf_weight")
        }
        replace(self.ranker, facts=self.ranker.facts | {"weights": weights}).save(path)

    @classmethod
    def load(cls, path: str | Path) -> Reranker:
        """Load what `save` wrote.

        Raises:
            InputError: Where the file is no ranker, is damaged, or was saved without weights.
        """
        ranker, name, mend = (
            LinearRanker.load(path),
            f"{path}, head, facts",
            "train the ranker again",
        )
        if "weights" not in ranker.facts:
            raise InputError(str(path), "a ranker with its weights", "none", mend)
        weights: Any = check_record(
            ranker.facts["weights"], Weights, where=f"{name}.weights", mend=mend
        )
        try:
            return cls(ranker, **weights)
        except TypeError as error:
            raise InputError(
                f"{name}.weights", "the weights of a ranker", str(error), mend
            ) from error


def log_odds(log_probability: np.ndarray) -> np.ndarray:
    """Return ln p/(1-p) for ln p ≤ 0: finite at p = 1 too, and strictly rising up to there."""
    log_p = np.minimum(log_probability, -_TINY)
    return np.asarray(log_p - np.log(-np.expm1(log_p)))


def choose_share(
    reranker: Reranker,
    logits: csr_matrix,
    margins: csr_matrix,
    labels: csr_matrix,
    filter_pairs: np.ndarray,
    *,
    by: tuple[str, ...] = ("P@1", "P@3", "P@5"),
) -> tuple[Reranker, dict[tuple[How, float], dict[str, float]]]:
    """Choose the kind of blend and the share with the best mean of some metrics.

    The metrics are those of held-out documents; the first tried of equals wins.

    Args:
        reranker: its own share and kind of blend are not looked at.
        logits, margins: of the held-out documents' shortlists, CSR [N, L] with one pattern.
        labels: [N, L], what is right.
        filter_pairs: int64 [n, 2] of (document, label), removed before the cut.
        by: names as `evaluate` gives them, @1 to @5, without propensities.

    Returns:
        The reranker with them, and the metrics of everything that was tried, by (kind, share).
    """
    tried: dict[tuple[How, float], dict[str, float]] = {}
    ticks = Ticks(log, "choosing share and kind of blend", len(HOW) * len(SHARES), "blends")
    for how in HOW:
        for share in SHARES:
            scores = replace(reranker, share=share, how=how).mix(logits, margins)
            tried[how, share] = evaluate(best(scores, filter_pairs, 5)[1], labels)
            ticks.add()
    known = tried[HOW[0], 0.0]
    wrong = [name for name in by if name not in known]
    if wrong or not by:
        raise InputError(
            "by", f"some of {', '.join(known)}", " ".join(wrong) or "none", "choose of these"
        )
    how, share = max(tried, key=lambda key: sum(tried[key][name] for name in by))
    return replace(reranker, share=share, how=how), tried


def combine(
    files: Sequence[csr_matrix], odds: Sequence[np.ndarray], weights: Sequence[float], how: str
) -> csr_matrix:
    """Return the weighted mean over files, as log-odds.

    float64 CSR [N, L] with every pair that any file has.

    Args:
        files: CSR [N, L] each; only where they have entries counts.
        odds: the log-odds of those entries.
        weights: of the files, not all 0.
        how: "probability" or "log_odds"; an absent pair has the
            probability 0, or the lowest log-odds of its document in that file.
    """
    shape, total = files[0].shape, sum(weights)
    used = [(m, z, w / total) for m, z, w in zip(files, odds, weights, strict=True) if w > 0]
    # As it is: there is nothing to add, and no way through probabilities that could make ties.
    if len(used) == 1:
        matrix, z, _ = used[0]
        return csr_matrix((z, matrix.indices, matrix.indptr), shape)
    return _mean_probability(used, shape) if how == "probability" else _mean_odds(used, shape)


def towards_rare(scores: csr_matrix, weight: np.ndarray, power: float) -> csr_matrix:
    """Multiply every probability by a power of its label's weight, relative to the largest.

    With inverse propensities as weights, a label's score is then between its probability (power 0)
    and its expected share of PSP@k (power 1). Small powers cost little precision, for they change
    the order of labels of nearly equal probability first. Source: Menon et al., "Long-tail
    learning via logit adjustment" (ICLR 2021), with the weights of Jain, Prabhu & Varma (KDD 2016).

    Args:
        scores: CSR [N, L], log-odds.
        weight: [L], above 0: `metrics.inverse_propensity`.
        power: 0 or more.

    Returns:
        Log-odds of the products, float64 CSR [N, L] of the same pattern.
    """
    log_p = rare_first(scores.data, (weight / weight.max())[scores.indices], power)
    return csr_matrix((log_odds(log_p), scores.indices, scores.indptr), scores.shape)


def rare_first(odds: np.ndarray, weight: np.ndarray, power: float) -> np.ndarray:
    """Return ln p of log-odds plus `power` times the logarithm of their labels' weights, fp64."""
    z = odds.astype(np.float64)
    return np.asarray(power * np.log(weight.astype(np.float64)) - np.logaddexp(0, -z))


# Of each file: its pairs, their log-odds, its share; shares add up to 1.
_Used = Sequence[tuple[csr_matrix, np.ndarray, float]]


def _mean_probability(used: _Used, shape: tuple[int, int]) -> csr_matrix:
    """Log-odds of the mean probability of each pair, an absent one counting 0.

    In logarithms throughout: p or 1 - p of log-odds beyond ±708 is 0 in float64, and all such
    labels would tie.
    """
    rows = np.concatenate(
        [np.repeat(np.arange(shape[0]), np.diff(matrix.indptr)) for matrix, _, _ in used]
    )
    columns = np.concatenate([matrix.indices for matrix, _, _ in used])
    order = np.lexsort((columns, rows))
    rows, columns = rows[order], columns[order]
    z = np.concatenate([odds for _, odds, _ in used])[order]
    weight = np.concatenate([np.full(len(odds), share) for _, odds, share in used])[order]
    # Of each pair.
    first = np.flatnonzero((np.diff(rows, prepend=-1) != 0) | (np.diff(columns, prepend=-1) != 0))
    if not first.size:
        return csr_matrix(shape)
    yes = np.logaddexp.reduceat(np.log(weight) - np.logaddexp(0, -z), first)
    no = np.logaddexp.reduceat(np.log(weight) - np.logaddexp(0, z), first)
    missing = np.diff(first, append=len(z)) < len(used)
    absent = np.where(missing, np.maximum(1 - np.add.reduceat(weight, first), 0), 0)
    with np.errstate(divide="ignore"):  # where nothing is absent
        mean = yes - np.logaddexp(no, np.log(absent))
    indptr = np.searchsorted(rows[first], np.arange(shape[0] + 1))
    return csr_matrix((mean, columns[first], indptr), shape)


def _mean_odds(used: _Used, shape: tuple[int, int]) -> csr_matrix:
    """Return the mean log-odds of each pair.

    A pair that a file lacks counts as the lowest of its document in that file.
    """
    base, heard = np.zeros(shape[0]), np.zeros(shape[0])
    parts = []
    for matrix, z, share in used:
        rows = np.repeat(np.arange(shape[0]), np.diff(matrix.indptr))
        lowest = np.full(shape[0], np.inf)
        np.minimum.at(lowest, rows, z)
        known = np.isfinite(lowest)
        lowest[~known] = (
            0  # a document for which this file has nothing to say: the others' mean is taken
        )
        base += share * lowest
        heard += share * known
        parts.append((rows, matrix.indices, share * (z - lowest[rows])))
    rows, columns, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    # Through COO: adding CSR matrices would drop pairs whose sum is 0.
    mean = coo_matrix((values, (rows, columns)), shape).tocsr()
    of_row = np.repeat(np.arange(shape[0]), np.diff(mean.indptr))
    mean.data = (mean.data + base[of_row]) / heard[of_row]
    return mean


def best_of_all(
    ranker: LinearRanker,
    features: Features,
    k: int,
    *,
    threads: int = 0,
    among: np.ndarray | None = None,
) -> csr_matrix:
    """Return the margins of the k labels with the largest ones, for each document.

    CSR float32 [N, L]. `among` int64 [A], ascending, has the labels to choose from; None is all L.
    """
    labels = len(ranker.bias)
    own = np.arange(labels, dtype=np.int32) if among is None else among.astype(np.int32)
    step = max(1, _PAIRS // max(1, len(own)))
    parts = []
    for first in range(0, len(features), step):
        some = features.rows(first, first + step)
        every = np.tile(own, len(some))
        pairs = csr_matrix(
            (np.ones(every.size, np.int8), every, np.arange(len(some) + 1) * len(own)),
            (len(some), labels),
        )
        values, rows = _top_rows(ranker.score(some, pairs, threads=threads), k)
        place = np.nonzero(rows >= 0)
        parts.append(csr_matrix((values[place], (place[0], rows[place])), pairs.shape))
    return csr_matrix(vstack(parts, "csr")) if parts else csr_matrix((0, labels), dtype=np.float32)


def contenders(
    logits: csr_matrix, margins: csr_matrix, k: int, *, threads: int = 0
) -> tuple[csr_matrix, csr_matrix]:
    """Leave of a shortlist what can be among a document's k best under some blend.

    A pair that k others of its document beat in logit and in margin is not, whatever their shares.
    Of the hundred labels of a cluster, which have one logit, k are left.

    Args:
        logits, margins: CSR [N, L] with one pattern, as `Reranker.mix` takes them.
    """
    kept = np.empty(logits.nnz, np.bool_)
    indptr = logits.indptr.astype(np.int64)
    first, second = logits.data.astype(np.float64), margins.data.astype(np.float64)
    keep_compiled(mark_undominated)
    in_parallel(
        lambda a, b: mark_undominated(a, b, indptr, first, second, k, kept),
        logits.shape[0],
        _ROWS,
        threads,
    )
    ends = np.concatenate([[0], np.cumsum(kept)])[indptr]
    some = [
        csr_matrix((matrix.data[kept], logits.indices[kept], ends), logits.shape)
        for matrix in (logits, margins)
    ]
    return some[0], some[1]


def _top_rows(scores: csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Do as `top_rows_from_csr`, by a compiled loop where k is small."""
    matrix = scores.tocsr()
    plain = matrix.has_canonical_format and matrix.dtype in (np.float32, np.float64)
    if k > _FEW or not plain or np.isnan(matrix.data).any():
        return top_rows_from_csr(matrix, k)
    n = matrix.shape[0]
    values = np.full((n, k), -np.inf, matrix.dtype)
    rows = np.full((n, k), -1, np.int64)
    indptr, indices = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64)
    keep_compiled(best_stored)
    in_parallel(
        lambda a, b: best_stored(a, b, indptr, indices, matrix.data, values, rows), n, _ROWS
    )
    return values, rows


def best(scores: csr_matrix, filter_pairs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return values and labels [N, k] of the k best stored pairs of each document, best first.

    Filtered pairs are removed before the cut.
    """
    labels = scores.shape[1]
    values, rows = _top_rows(scores, candidates_needed(k, filter_pairs, labels))
    rows, values = drop_filtered(rows, values, filter_pairs, k, num_labels=labels)
    return values, rows
