"""Metrics of each label over the documents, averaged over labels or by their frequency."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.errors import InputError
from xmlkernels.label_counts import LabelCounts
from xmlkernels.metrics.points import (
    between,
    blocks,
    canonical,
    checked,
    count_in,
    known_labels,
    ratio,
)


def macro_metrics(
    top_rows: np.ndarray, targets: csr_matrix, ks: Sequence[int] = (1, 2, 3, 4, 5)
) -> dict[str, float]:
    """Return `macroP@k macroR@k macroF1@k coverage@k abandonment@k`, percent.

    Precision, recall and F1 are taken per label over the test points and averaged over all L
    labels, 0 where undefined. coverage@k: of the labels with a test positive, the share predicted
    rightly at least once. abandonment@k: the share of points without a single right prediction
    among k.

    Args and errors: as for `evaluate`.
    """
    targets, ks = checked(top_rows, targets, ks)
    n, labels = targets.shape
    known = known_labels(top_rows, targets, max(ks))
    count = partial(count_in, known)
    positives = count(targets.indices)
    predicted, right = np.zeros((2, len(ks), len(known)), np.int64)
    abandoned = np.zeros(max(ks), np.int64)
    for rows, hits, _ in blocks(top_rows, targets, max(ks)):
        for number, places in enumerate(between(ks)):
            shown, hit = rows[:, places], hits[:, places]
            predicted[number] += count(shown[shown >= 0])
            right[number] += count(shown[hit])
        abandoned += (~np.logical_or.accumulate(hits, axis=1)).sum(0)
    result: dict[str, dict[int, float]] = {
        name: {} for name in ("macroP", "macroR", "macroF1", "coverage", "abandonment")
    }
    for k, hit, shown in zip(ks, right.cumsum(0), predicted.cumsum(0), strict=True):
        result["macroP"][k] = float(ratio(hit, shown).sum() / labels)
        result["macroR"][k] = float(ratio(hit, positives).sum() / labels)
        result["macroF1"][k] = float(ratio(2 * hit, shown + positives).sum() / labels)
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
    targets, ks = checked(top_rows, targets, ks)
    train = canonical(train_labels, "train_labels")
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
    for rows, hits, _ in blocks(top_rows, targets, max(ks)):
        for index, places in enumerate(between(ks)):
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
