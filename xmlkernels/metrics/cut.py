"""Answers cut at a score: the cut of the best micro-F1, and metrics of answers of any length.

A document has as many answers as reach the cut, so that F1 is not bound by one k for documents with
one label and documents with ten. Source of the cut: Lewis, "Evaluating and Optimizing Autonomous
Text Classification Systems" (SIGIR 1995), section 5; it is chosen where the truth is known, on a
validation split, and used on others.
"""

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.errors import InputError
from xmlkernels.metrics.points import blocks, checked, ratio


def best_cut(scores: np.ndarray, top_rows: np.ndarray, targets: csr_matrix) -> float:
    """Return the score from which answers are kept for the highest micro-F1.

    Equal scores are kept or left together. Of cuts with one F1 it is the highest. It lies midway
    between the last score that is kept and the next.

    Args:
        scores: float [N, K], any values that are higher for better answers.
        top_rows: int64 [N, K], label numbers, -1 for none.
        targets: [N, L].

    Raises:
        InputError: as of `xmlkernels.evaluate`, scores of another shape, or no right answer at all.
    """
    targets, _ = checked(top_rows, targets, (1,))
    if scores.shape != top_rows.shape:
        mend = "pass the scores of these rows"
        raise InputError("scores", f"shape {top_rows.shape}", f"shape {scores.shape}", mend)
    every = blocks(top_rows, targets, top_rows.shape[1])
    right = np.concatenate([hits for _, hits, _ in every])[top_rows >= 0]
    if not right.any():
        mend = "measure more documents, or train longer"
        raise InputError("answers", "one that is right", "none", mend)
    values = np.asarray(scores, np.float64)[top_rows >= 0]
    order = np.argsort(-values, kind="stable")
    values, kept = values[order], np.arange(1, len(order) + 1)
    f1 = 2 * np.cumsum(right[order]) / (kept + targets.nnz)
    ends = np.append(values[1:] < values[:-1], True)
    at = int(np.argmax(np.where(ends, f1, -1.0)))
    after = values[at + 1] if at + 1 < len(values) else values[at]
    middle = float(values[at] / 2 + after / 2)
    return middle if after < middle <= values[at] else float(values[at])


def cut_metrics(top_rows: np.ndarray, targets: csr_matrix) -> dict[str, float]:
    """Measure answers of any length, in percent but for the last.

    Args:
        top_rows: int64 [N, K], label numbers by falling score, -1 for none: what the cut left out.
        targets: [N, L].

    Returns:
        `microP`, `microR`, `microF1` of all pairs of document and label together; `sampleF1`, the
        mean over documents, 0 where a document has neither; `labels`, answers per document.

    Raises:
        InputError: as of `xmlkernels.evaluate`.
    """
    targets, _ = checked(top_rows, targets, (1,))
    shown = right = 0
    own = 0.0
    for rows, hits, part in blocks(top_rows, targets, top_rows.shape[1]):
        each, found = (rows >= 0).sum(1), hits.sum(1)
        shown, right = shown + int(each.sum()), right + int(found.sum())
        own += float(ratio(2 * found, each + np.diff(part.indptr)).sum())
    documents = targets.shape[0]
    return {
        "microP": 100 * right / max(1, shown),
        "microR": 100 * right / max(1, targets.nnz),
        "microF1": 200 * right / max(1, shown + targets.nnz),
        "sampleF1": 100 * own / documents,
        "labels": shown / documents,
    }
