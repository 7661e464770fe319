"""Intervals and paired tests: against what is known of means, exchanges and equal models."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from xmlkernels.metrics import evaluate, resampling
from xmlkernels.metrics.resampling import differences, grouped_sums, intervals

N, L = 400, 30


def case(seed: int, chance: float = 0.5) -> tuple[np.ndarray, csr_matrix]:
    """One label per document; the first of five predictions is right with a chance."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, L, N)
    rows = np.stack([rng.permutation(L)[:5] for _ in range(N)])
    right = rng.random(N) < chance
    for n in range(N):
        row = [label for label in rows[n] if label != true[n]] + [L - 1 - true[n]]
        rows[n] = ([true[n], *row] if right[n] else [*row, true[n]])[:5]
        rows[n] = list(dict.fromkeys(rows[n].tolist()))[:5] + [-1] * (5 - len(set(rows[n])))
    return rows, csr_matrix((np.ones(N), (np.arange(N), true)), shape=(N, L))


WEIGHT = np.linspace(1, 5, L)


@pytest.mark.parametrize("groups", [4096, 50])
def test_sums_are_those_of_the_metrics(groups, monkeypatch):
    monkeypatch.setattr(resampling, "GROUPS", groups)
    monkeypatch.setattr("xmlkernels.metrics.points.BLOCK", 333)
    rows, true = case(0)
    sums = grouped_sums(rows, true, WEIGHT)
    assert len(sums.points) == min(N, groups) and sums.points.sum() == N
    got = sums.metrics(np.ones((1, len(sums.points))))
    for name, value in evaluate(rows, true, WEIGHT).items():
        kind, _, k = name.partition("@")
        assert got[kind][0, int(k) - 1] == pytest.approx(value), name


@pytest.mark.parametrize("groups", [4096, 100])
def test_intervals_are_as_wide_as_a_mean_s(groups, monkeypatch):
    monkeypatch.setattr(resampling, "GROUPS", groups)
    rows, true = case(1)
    sums = grouped_sums(rows, true, None)
    p = evaluate(rows, true)["P@1"]
    low, high = intervals(sums)["P@1"]
    width = 2 * 1.96 * np.sqrt(p * (100 - p) / N)
    assert low < p < high and high - low == pytest.approx(width, rel=0.2)
    assert intervals(sums) == intervals(grouped_sums(rows, true, None))
    assert intervals(sums, seed=1)["P@1"] != (low, high)


def test_differences():
    rows, true = case(2, 0.5)
    better, _ = case(2, 0.75)
    one, two = (grouped_sums(x, true, WEIGHT) for x in (rows, better))
    same = differences(one, one, exchanges=50)
    assert all(x.difference == x.low == x.high == 0 and x.p == 1 for x in same.values())
    found = differences(one, two, exchanges=999)
    for name in ("P@1", "nDCG@5", "PSP@1", "microF1@1"):
        gap = evaluate(better, true, WEIGHT)[name] - evaluate(rows, true, WEIGHT)[name]
        assert found[name].difference == pytest.approx(gap)
        assert 0 < found[name].low < gap < found[name].high and found[name].p < 0.01
    back = differences(two, one, exchanges=999)["P@1"]
    assert back.difference == -found["P@1"].difference and back.p < 0.01


def test_p_is_that_of_all_exchanges():
    """Three documents differ, all for the better: 2 of 8 exchanges are as far from 0."""
    true = csr_matrix(np.eye(6))
    first, second = np.full((6, 1), -1), np.full((6, 1), -1)
    second[:3, 0] = np.arange(3)
    sums = [grouped_sums(x, true, None, deepest=1) for x in (first, second)]
    assert differences(*sums, exchanges=4000)["P@1"].p == pytest.approx(0.25, abs=0.03)
