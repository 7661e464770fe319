"""What a report shows, computed from a run: intervals, calibration, documents that stand out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xmlkernels.metrics import evaluate
from xmlkernels.metrics.points import blocks, checked
from xmlkernels.metrics.ranking import terms
from xmlkernels.report.run import Run

BINS = 10
PREDICTIONS = 10  # places per document whose probabilities are looked at
EXAMPLES = 5
_DEPTHS = (1, 2, 3, 5, 10, 20, 50, 100)
_CUT = 5


@dataclass(frozen=True)
class Calibration:
    """How often predictions of some probability are right.

    Attributes:
        count: predictions in each of ten bins of equal width, int64 [10].
        said: their mean probability; nan where there are none, float64 [10].
        right: the share of them that is right, likewise.
        error: the expected calibration error (Naeini et al. 2015), 0 to 1: the mean distance of
            both, weighed by predictions.
    """

    count: np.ndarray
    said: np.ndarray
    right: np.ndarray
    error: float


@dataclass(frozen=True)
class Document:
    """A document that stands out.

    Attributes:
        number: in its split, from 0.
        gain: its nDCG@5, percent.
        true: its labels.
        predicted: the five best labels, each with its probability and whether it is right.
    """

    number: int
    gain: float
    true: list[int]
    predicted: list[tuple[int, float, bool]]


def probabilities(values: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-v)) as float64, 0 for -inf."""
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-values.astype(np.float64))))


def recall_by_depth(run: Run) -> dict[int, float]:
    """Return the recall, in percent, of the predictions that were kept, to several depths."""
    assert run.split is not None
    kept = run.rows.shape[1]
    depths = [k for k in _DEPTHS if k < kept] + [kept]
    found = evaluate(run.rows, run.split.labels, ks=depths)
    return {k: found[f"R@{k}"] for k in depths}


def calibration(run: Run, scores: np.ndarray) -> Calibration:
    """Compare probabilities of the ten best labels of each document with what is true.

    Args:
        run: whose predictions.
        scores: their log-odds [N, K], `run.values` or `run.given`.
    """
    assert run.split is not None
    targets, _ = checked(run.rows, run.split.labels, (PREDICTIONS,))
    count, said, right = np.zeros((3, BINS))
    start = 0
    for rows, hits, _ in blocks(run.rows, targets, PREDICTIONS):
        values = scores[start : start + len(rows), :PREDICTIONS]
        start += len(rows)
        shown = rows[:, : values.shape[1]] >= 0
        p = probabilities(values[shown])
        place = np.minimum((p * BINS).astype(np.int64), BINS - 1)
        count += np.bincount(place, minlength=BINS)
        said += np.bincount(place, p, minlength=BINS)
        right += np.bincount(place, hits[:, : values.shape[1]][shown], minlength=BINS)
    error = float(np.abs(said - right).sum() / max(1.0, count.sum()))
    with np.errstate(invalid="ignore", divide="ignore"):
        return Calibration(count.astype(np.int64), said / count, right / count, error)


def best_and_worst(run: Run) -> tuple[list[Document], list[Document]]:
    """Choose documents with labels: the best by nDCG@5, and the worst.

    Of equal ones those come first that teach most: the best with the most labels, the worst whose
    first prediction was the surest.
    """
    assert run.split is not None
    targets, _ = checked(run.rows, run.split.labels, (_CUT,))
    gains = []
    for rows, hits, part in blocks(run.rows, targets, _CUT):
        above, _ = terms(rows, hits, part, None)["nDCG"]
        gains.append(above[:, -1])
    gain, own = np.concatenate(gains), np.diff(targets.indptr)
    first = run.values[:, 0].astype(np.float64)
    some = np.flatnonzero(own > 0)
    best = some[np.lexsort((-first[some], -own[some], -gain[some]))][:EXAMPLES]
    worst = some[np.lexsort((-first[some], gain[some]))][:EXAMPLES]
    return _documents(run, best, gain), _documents(run, worst, gain)


def _documents(run: Run, numbers: Sequence[int] | np.ndarray, gain: np.ndarray) -> list[Document]:
    assert run.split is not None
    out = []
    for number in map(int, numbers):
        true = run.split.labels[number].indices.tolist()
        rows = run.rows[number, :_CUT]
        chance = probabilities(run.given[number, :_CUT])
        predicted = [
            (int(label), float(p), int(label) in true)
            for label, p in zip(rows, chance, strict=True)
            if label >= 0
        ]
        out.append(Document(number, 100 * float(gain[number]), true, predicted))
    return out
