"""Ranking metrics of extreme classification, in percent.

Letters: N test points, L labels, K predictions kept per point; `top_rows` int64 [N, K] holds label
numbers in descending order of score, -1 where there is none; `targets` [N, L] is a sparse matrix
whose stored non-zeros are the positives. A place without a prediction counts as wrong, and a point
without positives stays in every mean.

Sources: Jain, Prabhu & Varma, "Extreme Multi-label Loss Functions for Recommendation, Tagging,
Ranking & Other Missing Label Applications" (KDD 2016), section 4, for propensities; the Extreme
Classification Repository for P@k, nDCG@k and their propensity-scored forms, which are ratios of
means, not means of ratios.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.sparse import csr_matrix, issparse

from xmlkernels.errors import InputError
from xmlkernels.label_counts import LabelCounts
from xmlkernels.topk import candidates_needed, drop_filtered, top_rows_from_csr

__all__ = [
    "candidates_needed",
    "decile_table",
    "drop_filtered",
    "evaluate",
    "inverse_propensity",
    "macro_metrics",
    "propensity_scored_recall",
    "top_rows_from_csr",
]

_BLOCK = 1 << 20  # predictions looked at together: bounds the working memory at any N and K


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
    labels = _canonical(train_labels, "train_labels")
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
    """P@k, nDCG@k, R@k and, where inverse propensities are given, PSP@k and PSnDCG@k; percent.

    R@k of a point is its hits over its positives (over 1 where it has none). PSP@k and PSnDCG@k
    divide the mean of the predictions by the mean of the best possible ranking; where nothing is
    positive at all they are 0.

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
    wanted = ("P", "nDCG", "PSP", "PSnDCG", "R")
    return {
        f"{name}@{k}": curves[name][k]
        for name in wanted
        if name in curves
        for k in sorted(curves[name])
    }


def propensity_scored_recall(
    top_rows: np.ndarray,
    targets: csr_matrix,
    inv_propensity: np.ndarray,
    ks: Sequence[int] = (1, 2, 3, 4, 5),
) -> dict[str, float]:
    """`PSR@k`, percent: the mean propensity-scored recall over that of the best possible ranking.

    Args and errors: as for `evaluate`.
    """
    return {
        f"PSR@{k}": value
        for k, value in sorted(_curves(top_rows, targets, inv_propensity, ks)["PSR"].items())
    }


def macro_metrics(
    top_rows: np.ndarray, targets: csr_matrix, ks: Sequence[int] = (1, 2, 3, 4, 5)
) -> dict[str, float]:
    """`macroP@k macroR@k macroF1@k coverage@k abandonment@k`, percent.

    Precision, recall and F1 are taken per label over the test points and averaged over all L
    labels, 0 where undefined. coverage@k: of the labels with a test positive, the share predicted
    rightly at least once. abandonment@k: the share of points without a single right prediction
    among k.

    Args and errors: as for `evaluate`.
    """
    targets, ks = _check(top_rows, targets, ks)
    n, labels = targets.shape
    known = np.unique(targets.indices)  # all other labels add 0 to every sum
    for rows, _, _ in _blocks(top_rows, targets, max(ks)):
        known = np.union1d(known, rows[rows >= 0])

    def count(found: np.ndarray) -> np.ndarray:
        return np.bincount(np.searchsorted(known, found), minlength=len(known))

    positives = count(targets.indices)
    predicted, right = np.zeros((2, len(ks), len(known)), np.int64)
    abandoned = np.zeros(max(ks), np.int64)
    for rows, hits, _ in _blocks(top_rows, targets, max(ks)):
        for number, places in enumerate(_between(ks)):
            shown, hit = rows[:, places], hits[:, places]
            predicted[number] += count(shown[shown >= 0])
            right[number] += count(shown[hit])
        abandoned += (~np.logical_or.accumulate(hits, axis=1)).sum(0)
    result: dict[str, dict[int, float]] = {
        name: {} for name in ("macroP", "macroR", "macroF1", "coverage", "abandonment")
    }
    for k, hit, shown in zip(ks, right.cumsum(0), predicted.cumsum(0), strict=True):
        result["macroP"][k] = float(_ratio(hit, shown).sum() / labels)
        result["macroR"][k] = float(_ratio(hit, positives).sum() / labels)
        result["macroF1"][k] = float(_ratio(2 * hit, shown + positives).sum() / labels)
        result["coverage"][k] = float((hit > 0).sum() / max(1, (positives > 0).sum()))
        result["abandonment"][k] = float(abandoned[k - 1] / n)
    return {
        f"{name}@{k}": 100 * value for name, curve in result.items() for k, value in curve.items()
    }


def decile_table(
    top_rows: np.ndarray,
    targets: csr_matrix,
    train_labels: csr_matrix,
    ks: Sequence[int] = (1, 3, 5),
) -> list[dict[str, float | int]]:
    """Return what each tenth of the labels, by training frequency, holds and gains.

    Rarest labels first.

    Labels are sorted by training frequency (equal frequency: by number) and cut into ten groups of
    equal label count, the first L mod 10 groups one label larger; labels that no training point has
    are in the first groups. With L < 10 there are L groups.

    Returns:
        Per group: `decile` (1 = rarest), `labels`, `min_frequency`, `max_frequency` (training
        points per label), `positives` (in the test points), `share` (percent of all test
        positives), `R@k` (percent of the group's test positives among the k predictions) and `P@k`
        (the group's share of P@k in percentage points: they add up to it).

    Raises:
        InputError: as for `evaluate`, and where `train_labels` has another number of labels.
    """
    targets, ks = _check(top_rows, targets, ks)
    train = _canonical(train_labels, "train_labels")
    n, labels = targets.shape
    if train.shape[1] != labels:
        raise InputError(
            "train_labels",
            f"{labels} labels as in targets",
            f"{train.shape[1]}",
            "pass one dataset's matrices",
        )
    order = LabelCounts(train)
    count = min(10, labels)
    ends = np.cumsum([labels // count + (number < labels % count) for number in range(count)])

    def group_of(found: np.ndarray) -> np.ndarray:
        return np.searchsorted(ends, order.place(found), "right")

    positives = np.bincount(group_of(targets.indices), minlength=count)
    right = np.zeros((len(ks), count), np.int64)
    for rows, hits, _ in _blocks(top_rows, targets, max(ks)):
        for index, places in enumerate(_between(ks)):
            right[index] += np.bincount(group_of(rows[:, places][hits[:, places]]), minlength=count)
    right = right.cumsum(0)
    table: list[dict[str, float | int]] = []
    for number, (first, end) in enumerate(zip((0, *ends), ends, strict=False)):
        line: dict[str, float | int] = {
            "decile": number + 1,
            "labels": int(end - first),
            "min_frequency": order.count_at(first),
            "max_frequency": order.count_at(end - 1),
            "positives": int(positives[number]),
            "share": 100 * float(positives[number]) / max(1, int(positives.sum())),
        }
        hit = dict(zip(ks, right[:, number].tolist(), strict=True))
        line |= {f"R@{k}": 100 * hit[k] / max(1, int(positives[number])) for k in ks}
        line |= {f"P@{k}": 100 * hit[k] / (n * k) for k in ks}
        table.append(line)
    return table


def _curves(
    top_rows: np.ndarray, targets: csr_matrix, inv_propensity: np.ndarray | None, ks: Sequence[int]
) -> dict[str, dict[int, float]]:
    """Metric → cut-off → percent."""
    targets, ks = _check(top_rows, targets, ks)
    n, deepest = targets.shape[0], max(ks)
    weight = None if inv_propensity is None else _check_propensity(inv_propensity, targets.shape[1])
    gain = 1 / np.log2(np.arange(deepest) + 2)
    # By number of positives; [0] only divides zeros.
    best_gain = np.concatenate([[1.0], np.cumsum(gain)])
    sums: dict[str, np.ndarray] = {}
    for rows, hits, part in _blocks(top_rows, targets, deepest):
        count = np.diff(part.indptr)
        norm = best_gain[np.minimum(count[:, None], np.arange(1, deepest + 1))]
        ranked = {"": hits.astype(np.float64)}
        if weight is not None:
            ranked["PS"] = np.where(hits, weight[rows], 0.0)
            ranked["best PS"] = _best_weights(part, weight, deepest)
        for kind, value in ranked.items():
            cumulative = value.cumsum(1)
            for name, total in (
                ("P", cumulative.sum(0)),
                ("nDCG", ((value * gain).cumsum(1) / norm).sum(0)),
                ("R", (cumulative / np.maximum(count, 1)[:, None]).sum(0)),
            ):
                sums[kind + name] = sums.get(kind + name, 0.0) + total
    curves = {
        "P": sums["P"] / np.arange(1, deepest + 1) / n,
        "nDCG": sums["nDCG"] / n,
        "R": sums["R"] / n,
    }
    if weight is not None:
        # 1/k is above and below the line in PSP@k and cancels.
        curves |= {
            name: _ratio(sums[name], sums[f"best {name}"]) for name in ("PSP", "PSnDCG", "PSR")
        }
    return {name: {k: 100 * float(curve[k - 1]) for k in ks} for name, curve in curves.items()}


def _blocks(
    top_rows: np.ndarray, targets: csr_matrix, deepest: int
) -> Iterator[tuple[np.ndarray, np.ndarray, csr_matrix]]:
    """Yield blocks of points: labels [n, deepest] padded by -1, hits, targets [n, L]."""
    n, labels = targets.shape
    size = max(1, _BLOCK // max(deepest, 1))
    for start in range(0, n, size):
        part = targets[start : start + size]
        rows = top_rows[start : start + size, :deepest].astype(np.int64, copy=False)
        if rows.size and (rows.min() < -1 or rows.max() >= labels):
            bad = int(np.flatnonzero(((rows < -1) | (rows >= labels)).any(1))[0])
            got = next(int(label) for label in rows[bad] if not -1 <= label < labels)
            raise InputError(
                f"top_rows, point {start + bad}",
                f"labels from 0 to {labels - 1}, or -1 for none",
                str(got),
                "check that predictions and targets number the labels alike",
            )
        ordered = np.sort(rows, axis=1)
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
        if twice.any():
            raise InputError(
                f"top_rows, point {start + int(twice.argmax())}",
                "each label once",
                "a label twice",
                "merge the predictions",
            )
        if rows.shape[1] < deepest:
            rows = np.pad(rows, ((0, 0), (0, deepest - rows.shape[1])), constant_values=-1)
        yield rows, _hits(rows, part), part


def _hits(rows: np.ndarray, targets: csr_matrix) -> np.ndarray:
    """Whether rows[i, j] is a positive of point i; bool, shape of rows; -1 is none."""
    n, labels = targets.shape
    if targets.nnz == 0 or rows.size == 0:
        return np.zeros(rows.shape, bool)
    keys = (
        np.repeat(np.arange(n, dtype=np.int64) * labels, np.diff(targets.indptr)) + targets.indices
    )
    wanted = (np.arange(n, dtype=np.int64)[:, None] * labels + rows).ravel()
    place = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.asarray((keys[place] == wanted).reshape(rows.shape) & (rows >= 0))


def _best_weights(targets: csr_matrix, weight: np.ndarray, deepest: int) -> np.ndarray:
    """Return the `deepest` largest weights among each point's positives, descending.

    0 where it has fewer; float64 [n, deepest].
    """
    count = np.diff(targets.indptr)
    point = np.repeat(np.arange(len(count)), count)
    values = weight[targets.indices]
    values = values[np.lexsort((-values, point))]
    place = np.arange(targets.nnz) - np.repeat(targets.indptr[:-1], count)
    best = np.zeros((len(count), deepest))
    kept = place < deepest
    best[point[kept], place[kept]] = values[kept]
    return best


def _between(ks: tuple[int, ...]) -> list[slice]:
    """Return the places that each cut-off adds to the one before it."""
    return [slice(start, end) for start, end in zip((0, *ks), ks, strict=False)]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return above / below, 0 where below is 0."""
    ratio: np.ndarray = np.divide(above, below, out=np.zeros(np.shape(below)), where=below != 0)
    return ratio


def _canonical(matrix: csr_matrix, where: str) -> csr_matrix:
    """CSR with sorted unique indices and no stored zeros; the caller's matrix is left as it is."""
    if not issparse(matrix) or matrix.ndim != 2:
        raise InputError(
            where,
            "a scipy sparse matrix [points, labels]",
            type(matrix).__name__,
            "convert it with csr_matrix",
        )
    csr = matrix.tocsr()
    if not csr.has_canonical_format or (csr.nnz and not csr.data.all()):
        csr = csr.copy()
        csr.eliminate_zeros()
        csr.sum_duplicates()
    return csr


def _check(
    top_rows: np.ndarray, targets: csr_matrix, ks: Sequence[int]
) -> tuple[csr_matrix, tuple[int, ...]]:
    """Targets in canonical form and the cut-offs, ascending."""
    canonical = _canonical(targets, "targets")
    if (
        not isinstance(top_rows, np.ndarray)
        or top_rows.ndim != 2
        or top_rows.dtype.kind not in "iu"
    ):
        got = (
            f"{type(top_rows).__name__} {getattr(top_rows, 'dtype', '')} "
            f"{getattr(top_rows, 'shape', '')}"
        ).strip()
        raise InputError(
            "top_rows",
            "an integer array [N, K] of label numbers",
            got,
            "pass the rows, not the values",
        )
    if top_rows.shape[0] != canonical.shape[0]:
        raise InputError(
            "top_rows",
            f"{canonical.shape[0]} points as in targets",
            str(top_rows.shape[0]),
            "predict the same split",
        )
    if 0 in canonical.shape:
        raise InputError(
            "targets",
            "at least one point and one label",
            f"shape {canonical.shape}",
            "pass a filled split",
        )
    if not ks or any(not isinstance(k, int | np.integer) or k < 1 for k in ks):
        raise InputError("ks", "whole numbers from 1", str(list(ks)), "pass for example (1, 3, 5)")
    return canonical, tuple(sorted({int(k) for k in ks}))


def _check_propensity(weight: np.ndarray, labels: int) -> np.ndarray:
    weight = np.asarray(weight, np.float64)
    if weight.shape != (labels,) or not np.isfinite(weight).all():
        raise InputError(
            "inv_propensity",
            f"{labels} finite values, one per label",
            f"shape {weight.shape}",
            "compute it from the training matrix of the same dataset",
        )
    return weight
