"""How far metrics would move with other documents: bootstrap intervals and paired tests.

Documents are drawn with replacement (Efron 1979), or the answers of two models are exchanged
document by document (approximate randomisation; Noreen 1989). Beyond GROUPS documents, random
groups of equal size take the place of single ones: sums over groups vary as those over documents
do, so that time and memory are bounded whatever the split holds.
"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.metrics.points import blocks, checked, checked_weights
from xmlkernels.metrics.ranking import Term, terms, value_of

SEED, RESAMPLES, EXCHANGES, GROUPS = 0, 1_000, 10_000, 4_096
_AT_ONCE = 250  # resamples computed together


@dataclass(frozen=True)
class Sums:
    """The terms of every metric, summed over groups of documents.

    Attributes:
        points: documents of each group, float64 [G].
        terms: metric → above the line and, of a ratio, below it, float64 [G, deepest].
    """

    points: np.ndarray
    terms: dict[str, Term]

    def metrics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Compute every metric with groups counted as often as `weights` [R, G] says.

        Returns:
            Metric → percent, float64 [R, deepest].
        """
        points = (weights @ self.points)[:, None]
        return {
            name: 100
            * value_of(name, weights @ above, None if below is None else weights @ below, points)
            for name, (above, below) in self.terms.items()
        }


def grouped_sums(
    top_rows: np.ndarray,
    targets: csr_matrix,
    inv_propensity: np.ndarray | None,
    *,
    deepest: int = 5,
    seed: int = SEED,
) -> Sums:
    """Sum the terms of all metrics over random groups of documents, the same for equal N and seed.

    Args:
        top_rows, targets, inv_propensity: as for `evaluate`.
        deepest: the last cut-off.
        seed: of the groups.

    Raises:
        InputError: as for `evaluate`.
    """
    targets, _ = checked(top_rows, targets, (deepest,))
    n = targets.shape[0]
    weight = None
    if inv_propensity is not None:
        weight = checked_weights(inv_propensity, targets.shape[1])
    groups = min(n, GROUPS)
    group = np.random.default_rng(seed).permutation(n) % groups
    found: dict[str, Term] = {}
    start = 0
    for rows, hits, part in blocks(top_rows, targets, deepest):
        own = group[start : start + len(rows)]
        start += len(rows)
        to_groups = csr_matrix(
            (np.ones(len(own)), (own, np.arange(len(own)))), shape=(groups, len(own))
        )
        for name, (above, below) in terms(rows, hits, part, weight).items():
            sums = to_groups @ above, None if below is None else to_groups @ below
            if name in found:
                before = found[name]
                sums = (
                    before[0] + sums[0],
                    None if sums[1] is None or before[1] is None else before[1] + sums[1],
                )
            found[name] = sums
    return Sums(np.bincount(group, minlength=groups).astype(np.float64), found)


def intervals(
    sums: Sums, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, tuple[float, float]]:
    """Compute percentile bootstrap intervals over documents.

    Returns:
        `P@1` and so on → lower and upper end, percent.
    """
    drawn = _drawn(sums, resamples, seed)
    tail = 50 * (1 - level)
    out = {}
    for name, values in drawn.items():
        low, high = np.percentile(values, (tail, 100 - tail), axis=0)
        for k in range(values.shape[1]):
            out[f"{name}@{k + 1}"] = float(low[k]), float(high[k])
    return out


@dataclass(frozen=True)
class Difference:
    """A metric of a second model less that of a first one, on the same documents; percent points.

    Attributes:
        difference: of the two.
        low, high: its 95% bootstrap interval.
        p: two-sided, of approximate randomisation: how often a difference as large comes out where
            the answers of each document are exchanged by a coin.
    """

    difference: float
    low: float
    high: float
    p: float


def differences(
    first: Sums,
    second: Sums,
    *,
    resamples: int = RESAMPLES,
    exchanges: int = EXCHANGES,
    seed: int = SEED,
) -> dict[str, Difference]:
    """Compare two models on the same documents, grouped alike.

    Returns:
        `P@1` and so on → the difference, its interval and its p.
    """
    one, two = _drawn(first, resamples, seed), _drawn(second, resamples, seed)
    everyone = np.ones((1, len(first.points)))
    now, then = second.metrics(everyone), first.metrics(everyone)
    gap = {name: now[name][0] - then[name][0] for name in now}
    as_far = {name: np.zeros(len(value), np.int64) for name, value in gap.items()}
    rng = np.random.default_rng(seed)
    for begun in range(0, exchanges, _AT_ONCE):
        count = min(_AT_ONCE, exchanges - begun)
        coins = rng.integers(0, 2, (count, len(first.points))).astype(np.float64)
        # Where the coin shows 1, the two change places.
        kept = _mixed(first, second, coins)
        changed = _mixed(second, first, coins)
        for name, value in gap.items():
            moved = np.abs(changed[name] - kept[name])
            as_far[name] += (moved >= np.abs(value) - 1e-9).sum(0)
    out = {}
    for name, value in gap.items():
        low, high = np.percentile(two[name] - one[name], (2.5, 97.5), axis=0)
        for k in range(len(value)):
            out[f"{name}@{k + 1}"] = Difference(
                float(value[k]),
                float(low[k]),
                float(high[k]),
                float((as_far[name][k] + 1) / (exchanges + 1)),
            )
    return out


def _mixed(first: Sums, second: Sums, coins: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the metrics of the first, with the second's terms where the coin shows 1."""
    out = {}
    for name, (above, below) in first.terms.items():
        other, under = second.terms[name]
        total = above.sum(0) + coins @ (other - above)
        down = None
        if below is not None and under is not None:
            down = below.sum(0) + coins @ (under - below)
        out[name] = 100 * value_of(name, total, down, float(first.points.sum()))
    return out


def _drawn(sums: Sums, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Compute all metrics of resamples of the groups, [R, deepest]; the same draws for equal G."""
    rng, groups = np.random.default_rng(seed), len(sums.points)
    parts: list[dict[str, np.ndarray]] = []
    for begun in range(0, resamples, _AT_ONCE):
        count = min(_AT_ONCE, resamples - begun)
        weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=count)
        parts.append(sums.metrics(weights.astype(np.float64)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
