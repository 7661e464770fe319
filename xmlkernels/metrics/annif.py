"""The 22 metrics of `annif eval`, under its names and by its definitions, as fractions.

Annif (https://annif.org, version 1.4) counts what it is given: a document's suggestions are its
first LIMIT, a place without one is none, and nDCG of a document without subjects is 1. Averages
over subjects are over all L, 0 where a subject has neither suggestions nor documents.
"""

from functools import partial

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.metrics.points import blocks, checked, count_in, known_labels, ratio

LIMIT = 10  # suggestions per document, as `annif eval` takes where it is not told otherwise
_CUTS = (1, 3, 5, 10)


def annif_metrics(
    top_rows: np.ndarray, targets: csr_matrix, *, limit: int = LIMIT
) -> dict[str, float]:
    """Compute the 22 metrics of `annif eval --limit LIMIT`, as fractions of 1 or counts.

    Args:
        top_rows: int64 [N, K], label numbers by falling score, -1 for none.
        targets: [N, L].
        limit: suggestions per document that count.

    Returns:
        Annif's names, in its order.

    Raises:
        InputError: as `xmlkernels.evaluate`.
    """
    targets, _ = checked(top_rows, targets, (limit,))
    n, labels = targets.shape
    known = known_labels(top_rows, targets, limit)
    count = partial(count_in, known)
    true = count(targets.indices)
    suggested, right = np.zeros((2, len(known)), np.int64)
    sums = dict.fromkeys(("P", "R", "F1", "F1@5", "NDCG"), 0.0)
    sums |= {f"P@{k}": 0.0 for k in _CUTS} | {f"NDCG@{k}": 0.0 for k in _CUTS}
    most = int(np.diff(targets.indptr).max(initial=0))
    gain = 1 / np.log2(np.arange(max(limit, most, 1)) + 2)
    best = np.concatenate([[0.0], np.cumsum(gain)])
    for rows, hits, part in blocks(top_rows, targets, limit):
        suggested += count(rows[rows >= 0])
        right += count(rows[hits])
        own = np.diff(part.indptr)
        shown, found = (rows >= 0).cumsum(1), hits.cumsum(1)
        gained = (hits * gain[:limit]).cumsum(1)
        sums["P"] += ratio(found[:, -1], shown[:, -1]).sum()
        sums["R"] += ratio(found[:, -1], own).sum()
        sums["F1"] += ratio(2 * found[:, -1], shown[:, -1] + own).sum()
        sums["NDCG"] += _ndcg(gained[:, -1], best[own]).sum()
        for k in _CUTS:
            at = min(k, limit) - 1
            sums[f"P@{k}"] += ratio(found[:, at], shown[:, at]).sum()
            sums[f"NDCG@{k}"] += _ndcg(gained[:, at], best[np.minimum(own, k)]).sum()
        at = min(5, limit) - 1
        sums["F1@5"] += ratio(2 * found[:, at], shown[:, at] + own).sum()
    mean = {name: float(value / n) for name, value in sums.items()}
    each = {
        "Precision": ratio(right, suggested),
        "Recall": ratio(right, true),
        "F1 score": ratio(2 * right, suggested + true),
    }
    all_right, all_suggested, all_true = int(right.sum()), int(suggested.sum()), int(true.sum())
    return {
        "Precision (doc avg)": mean["P"],
        "Recall (doc avg)": mean["R"],
        "F1 score (doc avg)": mean["F1"],
        **{f"{name} (subj avg)": float(value.sum() / labels) for name, value in each.items()},
        **{
            f"{name} (weighted subj avg)": float((value * true).sum() / max(1, all_true))
            for name, value in each.items()
        },
        "Precision (microavg)": all_right / max(1, all_suggested),
        "Recall (microavg)": all_right / max(1, all_true),
        "F1 score (microavg)": 2 * all_right / max(1, all_suggested + all_true),
        "F1@5": mean["F1@5"],
        "NDCG": mean["NDCG"],
        "NDCG@5": mean["NDCG@5"],
        "NDCG@10": mean["NDCG@10"],
        "Precision@1": mean["P@1"],
        "Precision@3": mean["P@3"],
        "Precision@5": mean["P@5"],
        "True positives": all_right,
        "False positives": all_suggested - all_right,
        "False negatives": all_true - all_right,
    }


def _ndcg(gained: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Return gained / best per document; 1 where nothing could be gained."""
    return np.where(best > 0, ratio(gained, best), 1.0)
