"""Fit calibrated probabilities on a split that a model was not trained on, and measure them.

Sources: Platt, "Probabilistic Outputs for Support Vector Machines" (1999); Zadrozny and Elkan,
"Transforming Classifier Scores into Accurate Multiclass Probability Estimates" (KDD 2002), for
isotonic regression; Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), for the
expected calibration error. Labels are grouped by frequency because rare labels' scores are too
high or too low in another way than those of frequent ones.

Letters: N documents, k labels of each, L labels, G bands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.errors import InputError
from xmlkernels.label_counts import LabelCounts
from xmlkernels.metrics import best_cut, cut_metrics, evaluate, inverse_propensity
from xmlkernels.predict.calibration import MOST_BANDS, MOST_KNOTS, Calibration, sigmoid

Method = Literal["auto", "isotonic", "platt"]
DEPTH = 10  # best labels of a document that a calibration is fitted on
SHOWN = 5  # best labels of a document that its error is measured on, as metrics go to 5
_LEAST = 50  # right answers that a band needs, or it joins its neighbour
_ISOTONIC = 200  # right answers from which "auto" lets a curve have any rising shape
_ECE_BINS = 15
_FLATTEST = 1e-3  # slope of a Platt curve, so that it rises


@dataclass(frozen=True)
class Answers:
    """The best labels of the documents of a split, and which are true.

    Attributes:
        scores: fp64 [N, k], best first.
        labels: int64 [N, k], -1 where there are fewer.
        true: bool [N, k].
        truth: CSR [N, L], all true labels.
    """

    scores: np.ndarray
    labels: np.ndarray
    true: np.ndarray
    truth: csr_matrix

    @classmethod
    def of(cls, scores: np.ndarray, labels: np.ndarray, truth: csr_matrix) -> Answers:
        """Compare the best answers, at most DEPTH of a document, with the labels of a split."""
        scores, labels = scores[:, :DEPTH].astype(np.float64), labels[:, :DEPTH]
        columns = truth.shape[1]
        documents = np.repeat(np.arange(truth.shape[0]), np.diff(truth.indptr))
        pairs = np.sort(documents * columns + truth.indices)
        asked = np.arange(len(labels))[:, None] * columns + np.maximum(labels, 0)
        at = np.searchsorted(pairs, asked)
        true = np.append(pairs, -1)[at] == asked
        return cls(scores, labels, true & (labels >= 0), truth)


def fit_calibration(
    answers: Answers,
    train: csr_matrix,
    *,
    bands: int = 5,
    method: Method = "auto",
    precision: float = 0.8,
    propensity: tuple[float, float] = (0.55, 1.5),
    identity: str = "",
) -> Calibration:
    """Fit a curve and a threshold for each band of labels, and a cut for all.

    Args:
        answers: on the validation split.
        train: CSR [N, L], labels of the training documents, whose counts make the bands.
        bands: at most so many; a band has 50 right and 50 wrong answers or more.
        method: isotonic regression, Platt's sigmoid, or isotonic where a band has 200 right
            answers or more.
        precision: the share of right answers that thresholds are to give.
        propensity: the dataset's constants A and B.
        identity: of the model.

    Raises:
        InputError: options out of range, or too few right or wrong answers to fit one curve.
    """
    if not 1 <= bands <= MOST_BANDS:
        raise InputError("--bands", f"1 to {MOST_BANDS}", str(bands), "choose another number")
    if not 0 < precision <= 1:
        raise InputError("--precision", "a share above 0, at most 1", str(precision), "correct it")
    kept = answers.labels >= 0
    scores, labels, true = answers.scores[kept], answers.labels[kept], answers.true[kept]
    if true.sum() < _LEAST or (~true).sum() < _LEAST:
        got = f"{true.sum():,} right and {(~true).sum():,} wrong ones"
        mend = "calibrate with more validation documents"
        raise InputError("validation", f"{_LEAST} right and {_LEAST} wrong answers", got, mend)
    counts = LabelCounts(train)
    ends = _ends(counts.of(labels), true, bands)
    every = np.zeros(train.shape[1], np.int64)
    seen, times = np.unique(train.indices, return_counts=True)
    every[seen] = times
    band = np.searchsorted(ends[:-1], every).astype(np.uint8)
    own = band[labels]
    curves, methods, thresholds = [], [], []
    for number in range(len(ends)):
        x, y = scores[own == number], true[own == number]
        how = method
        if how == "auto":
            how = "isotonic" if y.sum() >= _ISOTONIC else "platt"
        curves.append(_curve(_isotonic(x, y) if how == "isotonic" else _platt(x, y)))
        methods.append(how)
        thresholds.append(_threshold(x, y, precision))
    fitted = Calibration(
        band,
        np.stack(curves),
        np.array(thresholds),
        inverse_propensity(train, *propensity).astype(np.float32),
        precision,
        0.0,
        tuple(methods),
        tuple(int(end) for end in ends),
        identity,
    )
    odds = fitted.log_odds(answers.scores, answers.labels)
    return replace(fitted, f1_cut=best_cut(odds, answers.labels, answers.truth))


def _ends(counts: np.ndarray, true: np.ndarray, bands: int) -> np.ndarray:
    """Return the largest count of each band, so that bands have about as many right answers."""
    right, times = np.unique(counts[true], return_counts=True)
    wrong = np.sort(counts[~true])
    upto, chosen = np.cumsum(times), []
    before = seen = 0
    for part in range(1, bands):
        at = int(np.argmin(np.abs(upto - part * upto[-1] / bands)))
        negatives = int(np.searchsorted(wrong, right[at], "right"))
        inside, left = upto[at] - before, upto[-1] - upto[at]
        if min(inside, left, negatives - seen, len(wrong) - negatives) >= _LEAST:
            chosen.append(int(right[at]))
            before, seen = upto[at], negatives
    return np.array([*chosen, int(counts.max(initial=0))])


def _isotonic(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and log-odds of a rising curve of any shape, fitted on bins of the scores."""
    from sklearn.isotonic import IsotonicRegression

    shares = np.linspace(0, 1, MOST_KNOTS // 2)
    edges = np.unique(np.concatenate([np.quantile(x, shares), np.quantile(x[y], shares)]))
    place = np.searchsorted(edges[1:-1], x, "right")
    size = np.bincount(place)
    used = size > 0
    right, middle = np.bincount(place, y)[used], np.bincount(place, x)[used] / size[used]
    size = size[used]
    # Half an answer more of each kind: a bin of right answers alone is not certain.
    rate = IsotonicRegression().fit_transform(
        middle, (right + 0.5) / (size + 1), sample_weight=size
    )
    heads = np.flatnonzero(np.append(True, np.diff(rate) > 0))  # of equal rates one knot
    centre = np.add.reduceat(middle * size, heads) / np.add.reduceat(size, heads)
    return centre, np.log(rate[heads]) - np.log1p(-rate[heads])


def _platt(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and log-odds of the two ends of a straight line through log-odds.

    Platt's targets, (n₊ + 1) / (n₊ + 2) and 1 / (n₋ + 2), keep it finite where scores separate
    right from wrong.
    """
    from sklearn.linear_model import LogisticRegression

    shift, spread = float(x.mean()), float(x.std()) or 1.0
    right, wrong = int(y.sum()), int((~y).sum())
    target = np.where(y, (right + 1) / (right + 2), 1 / (wrong + 2))
    both = np.tile((x - shift) / spread, 2)[:, None]
    kinds, weight = np.repeat([True, False], len(x)), np.concatenate([target, 1 - target])
    found = LogisticRegression(C=1e8, tol=1e-8, max_iter=1000).fit(both, kinds, weight)
    slope = max(float(found.coef_[0, 0]) / spread, _FLATTEST)
    ends = np.array([x.min(), max(x.max(), x.min() + 1e-6)])
    return ends, float(found.intercept_[0]) + slope * (ends - shift)


def _curve(found: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return knots fp64 [MOST_KNOTS, 2]; the last one is repeated."""
    pairs = np.stack(found, axis=1)
    return np.concatenate([pairs, np.repeat(pairs[-1:], MOST_KNOTS - len(pairs), axis=0)])


def _threshold(x: np.ndarray, y: np.ndarray, precision: float) -> float:
    """Return the lowest score whose answers, with all better ones, are right that often."""
    order = np.argsort(-x, kind="stable")
    ranked = x[order]
    share = np.cumsum(y[order]) / np.arange(1, len(x) + 1)
    last = np.append(ranked[1:] < ranked[:-1], True)  # equal scores are taken together
    good = np.flatnonzero((share >= precision) & last)
    return float(ranked[good[-1]]) if good.size else float("inf")


def calibration_error(probability: np.ndarray, true: np.ndarray) -> float:
    """Return the expected calibration error, from 0 to 1, over 15 bins of equal width.

    Args:
        probability: of each answer.
        true: bool, of the same shape.
    """
    place = np.minimum((probability * _ECE_BINS).astype(np.int64), _ECE_BINS - 1)
    gap = np.bincount(place, probability, _ECE_BINS) - np.bincount(place, true, _ECE_BINS)
    return float(np.abs(gap).sum() / max(1, len(place)))


def measure_calibration(calibration: Calibration, answers: Answers) -> dict[str, Any]:
    """Measure a calibration on a split.

    Returns:
        `before` and `after`: the expected calibration error of the five best labels of each
        document by σ(score) and by calibrated probabilities; `before_10`, `after_10` of the ten
        best. `precision` and `recall` of the labels that reach their thresholds, as shares.
        `f1`: `cut_metrics` of the labels that reach the probability of the highest micro-F1.
        `ranked`: P@1, 3 and 5 in percent where the labels are ranked by calibrated probability, as
        bands then compete on one scale, and `ranked_by_score` as they are.
    """
    odds = calibration.log_odds(answers.scores, answers.labels)
    report: dict[str, Any] = {}
    for depth, suffix in ((SHOWN, ""), (DEPTH, f"_{DEPTH}")):
        kept = answers.labels[:, :depth] >= 0
        true = answers.true[:, :depth][kept]
        for what, values in (("before", answers.scores), ("after", odds)):
            report[what + suffix] = calibration_error(sigmoid(values[:, :depth][kept]), true)
    reached = calibration.good_enough(answers.scores, answers.labels)
    right = int((reached & answers.true).sum())
    report["precision"] = right / int(reached.sum()) if reached.any() else None
    report["recall"] = right / max(1, answers.truth.nnz)
    kept = calibration.good_enough(answers.scores, answers.labels, "f1")
    report["f1"] = cut_metrics(np.where(kept, answers.labels, -1), answers.truth)
    anew = np.take_along_axis(answers.labels, np.argsort(-odds, axis=1, kind="stable"), 1)
    for name, labels in (("ranked", anew), ("ranked_by_score", answers.labels)):
        found = evaluate(labels, answers.truth)
        report[name] = {key: found[key] for key in ("P@1", "P@3", "P@5")}
    return report
