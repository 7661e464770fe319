"""How a cascade fares level by level: metrics of clusters, and the share of true labels that each
shortlist kept.

A cascade cannot predict a label whose cluster it dropped, so the last level's shortlist recall
bounds its recall.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from xmlkernels import dist
from xmlkernels.metrics import evaluate
from xmlkernels.models.cascade import Cascade
from xmlkernels.models.descent import LevelPrediction

K = 5  # cut-off of the metrics of clusters


class LevelScores:
    """Collects what `Cascade.predict_levels` says of a split, batch by batch.

    Args:
        model: the cascade.
        labels: CSR [N, L] of the split.
    """

    def __init__(self, model: Cascade, labels: csr_matrix) -> None:
        tree = model.tree
        self.sizes = tree.sizes[:-1]
        documents = np.repeat(np.arange(labels.shape[0]), np.diff(labels.indptr))
        place = tree.place[labels.indices]
        # True labels of each cluster, [N, n_r]: a cluster with two of a document's labels counts
        # twice in recall.
        self.counts = [
            csr_matrix(
                (np.ones(len(place), np.int64), (documents, tree.ancestors(r)[place])),
                shape=(labels.shape[0], n),
            )
            for r, n in enumerate(self.sizes)
        ]
        self.nodes = [np.full((labels.shape[0], K), -1, np.int64) for _ in self.sizes]
        self.kept = np.zeros(len(self.sizes), np.int64)
        self.found = np.zeros(len(self.sizes), np.int64)
        self.own: list[np.ndarray] = []

    def add(self, index: np.ndarray, levels: Sequence[LevelPrediction]) -> None:
        """Takes in one batch.

        Args:
            index: int64 [B], its document numbers.
            levels: of `predict_levels`; the label level is left out.
        """
        self.own.append(index)
        for r, (size, level) in enumerate(zip(self.sizes, levels[:-1], strict=True)):
            nodes = level.nodes[:, :K].cpu().numpy()
            self.nodes[r][index, : nodes.shape[1]] = nodes
            kept = level.kept.cpu().numpy()
            place, column = np.nonzero(kept >= 0)
            keys = np.sort(place * size + kept[place, column])
            self.kept[r] += len(keys)
            true = self.counts[r][index].tocoo()
            inside = np.isin(true.row.astype(np.int64) * size + true.col, keys, assume_unique=True)
            self.found[r] += int(true.data[inside].sum())

    def result(self) -> list[dict[str, Any]]:
        """For each level of clusters, coarse to fine: `clusters`, `kept` (mean per document),
        `shortlist_recall` (percent of the true labels whose cluster was kept) and P, nDCG and R of
        the clusters at 1 to 5, in percent. Of several processes each has taken in documents of its
        own; the result is that of all."""
        out, seen = [], sum(map(len, self.own))
        if dist.size() > 1:
            dist.fill_rows(self.own, *self.nodes)
            sums = dist.sum_(torch.tensor([*self.kept, *self.found, seen])).numpy()
            (self.kept, self.found), seen = sums[:-1].reshape(2, -1), int(sums[-1])
        for r, size in enumerate(self.sizes):
            labels = int(self.counts[r].sum())
            line = {
                "level": r,
                "clusters": size,
                "kept": self.kept[r] / max(1, seen),
                "shortlist_recall": 100 * self.found[r] / max(1, labels),
            }
            out.append({k: v.item() if isinstance(v, np.generic) else v for k, v in line.items()})
            out[-1] |= evaluate(self.nodes[r], (self.counts[r] > 0).astype(np.int64).tocsr())
        return out
