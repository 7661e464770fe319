"""Metrics of the ranking of each document's labels, in percent.

Sources: Jain, Prabhu & Varma, "Extreme Multi-label Loss Functions for Recommendation, Tagging,
Ranking & Other Missing Label Applications" (KDD 2016), section 4, for propensities; the Extreme
Classification Repository for P@k, nDCG@k and their propensity-scored forms, which are ratios of
means, not means of ratios; Chalkidis et al., "Large-Scale Multi-Label Text Classification on EU
Legislation" (ACL 2019), section 4, for RP@k.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.errors import InputError
from xmlkernels.metrics.points import (
    best_weights,
    blocks,
    canonical,
    checked,
    checked_weights,
    ratio,
)

Term = tuple[np.ndarray, np.ndarray | None]
NAMES = ("P", "nDCG", "PSP", "PSnDCG", "R", "RP", "sampleF1", "microF1")


def inverse_propensity(train_labels: csr_matrix, A: float, B: float) -> np.ndarray:
    """Return the inverse propensity of each label, float64 [L].

    It is 1 + C·(n_l + B)^-A with C = (ln N - 1)·(B + 1)^A.

    Args:
        train_labels: [N, L], the training matrix without label texts or other virtual points: they
            would change N and n_l.
        A, B: constants of the dataset: 0.5, 0.4 for Wikipedia; 0.6, 2.6 for Amazon; 0.55, 1.5 for
            others.

    Raises:
        InputError: no training points, or constants out of range.
    """
    labels = canonical(train_labels, "train_labels")
    if labels.shape[0] == 0:
        raise InputError(
            "train_labels", "at least one training point", "none", "pass the training label matrix"
        )
    if not (np.isfinite(A) and np.isfinite(B) and B > 0):
        raise InputError(
            "propensity constants",
            "finite A and B > 0",
            f"A={A}, B={B}",
            "take 0.55 and 1.5 if in doubt",
        )
    frequency = np.bincount(labels.indices, minlength=labels.shape[1])
    scale = (np.log(labels.shape[0]) - 1) * (B + 1) ** A
    weight = 1 + scale * (np.arange(frequency.max() + 1, dtype=np.float64) + B) ** -A
    return np.asarray(weight[frequency])


def evaluate(
    top_rows: np.ndarray,
    targets: csr_matrix,
    inv_propensity: np.ndarray | None = None,
    ks: Sequence[int] = (1, 2, 3, 4, 5),
) -> dict[str, float]:
    """Compute P, nDCG, R, RP, sampleF1 and microF1 at k, with propensities PSP and PSnDCG; percent.

    R@k of a point is its hits over its positives (over 1 where it has none), RP@k over the smaller
    of k and its positives. sampleF1@k is the mean of the points' F1, microF1@k the F1 of all pairs
    together; in both a place without a prediction is none, as in `macro_metrics`. PSP@k and
    PSnDCG@k divide the mean of the predictions by the mean of the best possible ranking; where
    nothing is positive at all they are 0.

    Args:
        top_rows: int64 [N, K]; where K < k the missing places count as wrong.
        targets: [N, L].
        inv_propensity: float [L], see `inverse_propensity`.
        ks: cut-offs, in any order.

    Raises:
        InputError: shapes that do not match, a label out of range or twice in a row, no test point,
            k below 1.
    """
    curves = _curves(top_rows, targets, inv_propensity, ks)
    return {
        f"{name}@{k}": curves[name][k] for name in NAMES if name in curves for k in sorted(set(ks))
    }


def propensity_scored_recall(
    top_rows: np.ndarray,
    targets: csr_matrix,
    inv_propensity: np.ndarray,
    ks: Sequence[int] = (1, 2, 3, 4, 5),
) -> dict[str, float]:
    """Compute `PSR@k`, percent: mean propensity-scored recall over the best ranking's.

    Args and errors: as for `evaluate`.
    """
    return {
        f"PSR@{k}": value
        for k, value in sorted(_curves(top_rows, targets, inv_propensity, ks)["PSR"].items())
    }


def terms(
    rows: np.ndarray, hits: np.ndarray, part: csr_matrix, weight: np.ndarray | None
) -> dict[str, Term]:
    """Return what each point of a block adds to every metric, at every cut-off.

    Args:
        rows, hits, part: of `points.blocks`, as deep as the last cut-off.
        weight: inverse propensities, float64 [L], or None.

    Returns:
        Metric → float64 [n, deepest] above the line and, of a ratio of sums, below it.
    """
    deepest = rows.shape[1]
    places = np.arange(1, deepest + 1)
    gain = 1 / np.log2(places + 1)
    # By number of positives; [0] only divides zeros.
    best_gain = np.concatenate([[1.0], np.cumsum(gain)])
    count = np.diff(part.indptr)[:, None]
    some = np.maximum(count, 1)
    norm = best_gain[np.minimum(count, places)]
    shown = (rows >= 0).cumsum(1)
    value = hits.astype(np.float64)
    right = value.cumsum(1)
    found: dict[str, Term] = {
        "P": (right, None),
        "nDCG": ((value * gain).cumsum(1) / norm, None),
        "R": (right / some, None),
        "RP": (right / np.minimum(some, places), None),
        "sampleF1": (ratio(2 * right, shown + count), None),
        "microF1": (2 * right, (shown + count).astype(np.float64)),
    }
    if weight is not None:
        value, best = np.where(hits, weight[rows], 0.0), best_weights(part, weight, deepest)
        own, most = value.cumsum(1), best.cumsum(1)
        # 1/k is above and below the line in PSP@k and cancels.
        found["PSP"] = own, most
        found["PSnDCG"] = (value * gain).cumsum(1) / norm, (best * gain).cumsum(1) / norm
        found["PSR"] = own / some, most / some
    return found


def value_of(
    name: str, above: np.ndarray, below: np.ndarray | None, points: float | np.ndarray
) -> np.ndarray:
    """Return a metric as a fraction, from the sums of its terms over some points.

    Args:
        name: of the metric.
        above, below: float64 [..., deepest].
        points: how many were summed.
    """
    if below is not None:
        return ratio(above, below)
    return above / np.arange(1, above.shape[-1] + 1) / points if name == "P" else above / points


def _curves(
    top_rows: np.ndarray, targets: csr_matrix, inv_propensity: np.ndarray | None, ks: Sequence[int]
) -> dict[str, dict[int, float]]:
    """Metric → cut-off → percent."""
    targets, ks = checked(top_rows, targets, ks)
    n = targets.shape[0]
    weight = None
    if inv_propensity is not None:
        weight = checked_weights(inv_propensity, targets.shape[1])
    sums: dict[str, Term] = {}
    for rows, hits, part in blocks(top_rows, targets, max(ks)):
        for name, (above, below) in terms(rows, hits, part, weight).items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (
                above.sum(0) + before[0],
                None if below is None else below.sum(0) + before[1],
            )
    curves = {name: value_of(name, *both, n) for name, both in sums.items()}
    return {name: {k: 100 * float(curve[k - 1]) for k in ks} for name, curve in curves.items()}
