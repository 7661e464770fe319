"""Counts of labels: as of arrays of their number, and of more labels than an array could have."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from xmlkernels import metrics
from xmlkernels.label_counts import LabelCounts
from xmlkernels.training.progress import Frequencies


def matrix(rows: list[list[int]], labels: int) -> scipy.sparse.csr_matrix:
    indptr = np.cumsum([0, *map(len, rows)])
    indices = np.array([label for row in rows for label in row], np.int64)
    return scipy.sparse.csr_matrix(
        (np.ones(len(indices)), indices, indptr), shape=(len(rows), labels)
    )


@pytest.mark.parametrize("seed", range(5))
def test_counts_and_order_are_those_of_arrays(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = [sorted(generator.permutation(23)[: generator.integers(0, 9)]) for _ in range(seed * 4)]
    counts = np.bincount([label for row in rows for label in row], minlength=23).astype(int)
    found, every = LabelCounts(matrix(rows, 23)), np.arange(23)
    assert found.of(every).tolist() == counts.tolist()
    order = np.argsort(counts, kind="stable")
    assert found.place(order).tolist() == every.tolist()
    assert [found.count_at(n) for n in every] == counts[order].tolist()
    numbers, times = found.distinct()
    assert {n: t for n, t in zip(numbers, times, strict=True) if t} == dict(
        zip(*np.unique(counts, return_counts=True), strict=True)
    )


def test_metrics_hold_nothing_as_long_as_the_labels() -> None:
    """With 10^15 labels an array of their number would be refused by any machine."""
    labels, far = 10**15, 10**15 - 1
    train = matrix([[3, far], [far], [5, 2**31 + 7]], labels)
    test = matrix([[far], [2**31 + 7, 10**14]], labels)
    top = np.array([[far, 3, -1], [10**14, 1, 2**31 + 7]])
    table = metrics.decile_table(top, test, train, ks=(1, 3))
    assert [line["labels"] for line in table] == [10**14] * 10
    assert table[0]["max_frequency"] == 0 and table[9]["max_frequency"] == 2
    # 10^14 is the first label of the second tenth but for the three rarer ones that occur.
    assert [line["positives"] for line in table] == [1] + [0] * 8 + [2]
    assert table[9]["R@3"] == 100 and table[9]["P@1"] == 50 and table[0]["P@1"] == 50
    macro = metrics.macro_metrics(top, test, ks=(1,))
    assert macro["coverage@1"] == pytest.approx(200 / 3) and macro["abandonment@1"] == 0
    assert macro["macroR@1"] == pytest.approx(100 * 2 / labels)
    assert Frequencies(train).loss() == pytest.approx(labels * np.log(4 / 3.5), rel=1e-3)
