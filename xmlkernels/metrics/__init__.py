"""Metrics of extreme classification, in percent.

Letters: N test points, L labels, K predictions kept per point; `top_rows` int64 [N, K] holds label
numbers in descending order of score, -1 where there is none; `targets` [N, L] is a sparse matrix
whose stored non-zeros are the positives. A place without a prediction counts as wrong, and a point
without positives stays in every mean. Splits are gone through block by block: memory is that of
the predictions, and of the labels that occur.
"""

from xmlkernels.metrics.annif import annif_metrics
from xmlkernels.metrics.by_label import decile_table, macro_metrics
from xmlkernels.metrics.cut import best_cut, cut_metrics
from xmlkernels.metrics.ranking import evaluate, inverse_propensity, propensity_scored_recall
from xmlkernels.metrics.words import sentence_of
from xmlkernels.topk import candidates_needed, drop_filtered, top_rows_from_csr

__all__ = [
    "annif_metrics",
    "best_cut",
    "candidates_needed",
    "cut_metrics",
    "decile_table",
    "drop_filtered",
    "evaluate",
    "inverse_propensity",
    "macro_metrics",
    "propensity_scored_recall",
    "sentence_of",
    "top_rows_from_csr",
]
