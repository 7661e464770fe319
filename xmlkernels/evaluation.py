"""A model over a whole split: predictions, embeddings, loss, and how the levels of a tree fare.

Of several processes each takes batches of its own or, where they share the label table, its part of
every batch; all of them have the results of all.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from xmlkernels import dist
from xmlkernels.data.batches.tokens import Batches
from xmlkernels.data.dataset import Split
from xmlkernels.data.inputs import Inputs
from xmlkernels.metrics import evaluate
from xmlkernels.models.base import Documents, Model
from xmlkernels.models.scored import LevelPrediction
from xmlkernels.ticks import Ticks
from xmlkernels.tree.label_tree import LabelTree, arrangement

log = logging.getLogger(__name__)

_DEEPEST = 5  # cut-off of the metrics of clusters


def predict_split(
    model: Model, split: Split, k: int, *, batch_size: int = 256, inputs: Inputs | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Predict the k best labels of every document of a split, without those that a filter bars.

    Args:
        inputs: how the model reads documents; the split's own tokens when not given.

    Returns:
        Logits fp32 [N, k] and labels int64 [N, k]; -inf and -1 where there are fewer than k labels.
        Of several processes each has them all, and they are those of one alone.
    """
    count = split.labels.shape[0]
    values, rows = np.empty((count, k), np.float32), np.empty((count, k), np.int64)
    own = []
    for batch, exclude in evaluation_batches(model, split, batch_size, inputs):
        own.append(batch.index.cpu().numpy())
        found = model.score(batch, k, exclude=exclude)
        values[own[-1]], rows[own[-1]] = found.values.cpu().numpy(), found.labels.cpu().numpy()
    _fill(model, own, values, rows)
    return values, rows


def _fill(model: Model, own: Sequence[np.ndarray], *arrays: np.ndarray) -> None:
    """Fill in what other processes have found; of a shared table each has found all."""
    if not model.shared:
        dist.fill_rows(own, *arrays)


class LevelScores:
    """Collects, batch by batch, how the levels of a label tree fare on a split.

    A model cannot predict a label whose cluster it dropped, so the last level's shortlist recall
    bounds its recall.

    Args:
        tree: the model's.
        labels: CSR [N, L] of the split.
        whole: this process takes in every document; otherwise the others take in the rest.
    """

    def __init__(self, tree: LabelTree, labels: csr_matrix, *, whole: bool = False) -> None:
        self.whole = whole or dist.size() == 1
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
        self.nodes = [np.full((labels.shape[0], _DEEPEST), -1, np.int64) for _ in self.sizes]
        self.kept = np.zeros(len(self.sizes), np.int64)
        self.found = np.zeros(len(self.sizes), np.int64)
        self.own: list[np.ndarray] = []

    def add(self, index: np.ndarray, levels: Sequence[LevelPrediction]) -> None:
        """Take in one batch.

        Args:
            index: int64 [B], its document numbers.
            levels: of an `Answer`; the label level is left out.
        """
        self.own.append(index)
        for r, (size, level) in enumerate(zip(self.sizes, levels[:-1], strict=True)):
            nodes = level.nodes[:, :_DEEPEST].cpu().numpy()
            self.nodes[r][index, : nodes.shape[1]] = nodes
            kept = level.kept.cpu().numpy()
            place, column = np.nonzero(kept >= 0)
            keys = np.sort(place * size + kept[place, column])
            self.kept[r] += len(keys)
            true = self.counts[r][index].tocoo()
            inside = np.isin(true.row.astype(np.int64) * size + true.col, keys, assume_unique=True)
            self.found[r] += int(true.data[inside].sum())

    def result(self) -> list[dict[str, Any]]:
        """Measure each level of clusters, coarse to fine.

        The result is that of the documents of all processes.

        Returns:
            Per level: `clusters`, `kept` (mean per document), `shortlist_recall` (percent of the
            true labels whose cluster was kept) and P, nDCG and R of the clusters at 1 to 5, in
            percent.
        """
        out, seen = [], sum(map(len, self.own))
        if not self.whole:
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


@dataclass(frozen=True)
class Evaluation:
    """The result of one pass over a split.

    Attributes:
        values, labels: logits fp32 [N, k] and labels int64 [N, k], as of `predict_split`.
        loss: per document: summed over all labels, or the mean over candidates of a model whose
            losses are means (`Model.sums_loss`).
        levels: of a model on a label tree, see `LevelScores.result`; else empty.
    """

    values: np.ndarray
    labels: np.ndarray
    loss: float
    levels: list[dict[str, Any]]


def evaluate_split(
    model: Model, split: Split, k: int, *, batch_size: int = 256, inputs: Inputs | None = None
) -> Evaluation:
    """Predictions, loss and, on a label tree, what each level contributes, in one pass.

    Every document is seen once, in the batch in which one process alone would see it. Of several
    processes with copies of the tables each evaluates whole batches of its own, and the result is
    that of one to the bit. With shared tables each encodes its part of a batch and scores it all by
    its own rows: the best labels are merged exactly, and the loss is summed in another order.
    """
    own = model.scheme
    return _evaluate(model, split, k, (own,), batch_size, inputs)[own]


def evaluate_schemes(
    model: Model, split: Split, k: int, *, batch_size: int = 256, inputs: Inputs | None = None
) -> dict[str, Evaluation]:
    """Evaluate a split under each of the model's schemes, in one pass."""
    return _evaluate(model, split, k, model.schemes, batch_size, inputs)


def _evaluate(
    model: Model,
    split: Split,
    k: int,
    schemes: Sequence[str],
    batch_size: int,
    inputs: Inputs | None,
) -> dict[str, Evaluation]:
    """Evaluate each scheme."""
    count, tree = split.labels.shape[0], model.tree
    values = {scheme: np.empty((count, k), np.float32) for scheme in schemes}
    labels = {scheme: np.empty((count, k), np.int64) for scheme in schemes}
    scores = (
        {}
        if tree is None
        else {s: LevelScores(tree, split.labels, whole=model.shared) for s in schemes}
    )
    # Of a tree, answers go as deep as the metrics of its clusters.
    deepest = k if tree is None else max(k, _DEEPEST)
    own, losses = [], []
    for batch, exclude in evaluation_batches(model, split, batch_size, inputs):
        index = batch.index.cpu().numpy()
        own.append(index)
        found = model.score(batch, deepest, exclude=exclude, loss=True, schemes=schemes)
        for scheme, answer in found.by_scheme.items():
            values[scheme][index] = answer.values[:, :k].cpu().numpy()
            labels[scheme][index] = answer.labels[:, :k].cpu().numpy()
            if scheme in scores:
                scores[scheme].add(index, answer.levels)
        assert found.loss is not None
        losses.append(float(found.loss) * (1 if model.sums_loss else len(batch)))
    _fill(model, own, *values.values(), *labels.values())
    mean = sum(losses if model.shared else _in_turn(losses)) / max(1, count)
    return {
        s: Evaluation(values[s], labels[s], mean, scores[s].result() if s in scores else [])
        for s in schemes
    }


def _in_turn(own: list[float]) -> list[float]:
    """Gather a number per batch from all processes, in the order of the batches.

    They took the batches in turn; the sum of the numbers depends on their order.
    """
    number = dist.rank() + dist.size() * np.arange(len(own))
    pairs = dist.gather_ragged(torch.from_numpy(np.stack([number, np.array(own, np.float64)], 1)))
    return [value for _, value in sorted(pairs.tolist())]


def predict_and_embed_split(
    model: Model, split: Split, k: int, *, batch_size: int = 256, inputs: Inputs | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what `predict_split` and `embed_split` return, in one pass."""
    count, own = split.labels.shape[0], []
    out = [
        np.empty((count, k), np.float32),
        np.empty((count, k), np.int64),
        np.empty((count, model.width), np.float32),
    ]
    for batch, exclude in evaluation_batches(model, split, batch_size, inputs):
        own.append(batch.index.cpu().numpy())
        found = model.score(batch, k, exclude=exclude, embedding=True)
        assert found.embedding is not None
        for whole, part in zip(out, (found.values, found.labels, found.embedding), strict=True):
            whole[own[-1]] = part.cpu().numpy()
    _fill(model, own, *out)
    return out[0], out[1], out[2]


def embed_split(
    model: Model, split: Split, *, batch_size: int = 256, inputs: Inputs | None = None
) -> np.ndarray:
    """fp32 [N, D]: what the label table meets of every document of a split."""
    out, own = np.empty((split.labels.shape[0], model.width), np.float32), []
    for batch, _ in evaluation_batches(model, split, batch_size, inputs):
        own.append(batch.index.cpu().numpy())
        out[own[-1]] = model.embed(batch).cpu().numpy()
    _fill(model, own, out)
    return out


def evaluation_batches(
    model: Model, split: Split, batch_size: int, inputs: Inputs | None = None
) -> Iterator[tuple[Documents, Tensor | None]]:
    """Iterate over every document of a split once, with the model in evaluation mode meanwhile.

    Of several processes each takes every so many-th batch, or its part of every one where they
    share the model's tables.

    Yields:
        A batch on the model's device, with positives as the model wants them, and its filter pairs
        int64 [B, E] (-1 pads) or None.
    """
    wanted = arrangement(model.tree)
    made: Any = Batches(split, batch_size, shuffle=False, **wanted) if inputs is None else None
    if inputs is not None:
        made = inputs.batches(split, batch_size, shuffle=False, **wanted)
    if model.shared:
        made.shared(dist.part)
    pairs = split.filter_pairs[np.lexsort((split.filter_pairs[:, 1], split.filter_pairs[:, 0]))]
    was_training = model.training
    model.eval()
    try:
        first, every = (0, 1) if model.shared else (min(dist.rank(), len(made)), dist.size())
        told = {"val": "validation"}.get(split.name, split.name)
        ticks = Ticks(log, told, -(-len(split) // every), "documents")
        for batch in made.epoch(0, start=first, every=every):
            exclude = _excluded(batch, pairs)
            yield batch.to(model.device), None if exclude is None else exclude.to(model.device)
            ticks.add(len(batch))
    finally:
        model.train(was_training)


def _excluded(batch: Documents, pairs: np.ndarray) -> Tensor | None:
    """Filter pairs of a batch's documents as int64 [B, E], -1 pads; None when there are none."""
    index = batch.index.numpy()
    first, last = np.searchsorted(pairs[:, 0], index), np.searchsorted(pairs[:, 0], index, "right")
    widest = int((last - first).max(initial=0))
    if widest == 0:
        return None
    place = first[:, None] + np.arange(widest)
    inside = place < last[:, None]
    return torch.from_numpy(np.where(inside, pairs[np.where(inside, place, 0), 1], -1))


def score_matrix(values: np.ndarray, rows: np.ndarray, labels: int) -> csr_matrix:
    """Turn predictions into CSR [N, L] of logits, labels in ascending order within a row.

    A logit of 0 is stored, too: what is not stored was not predicted.
    """
    kept = rows >= 0
    indptr = np.concatenate([[0], np.cumsum(kept.sum(1))])
    matrix = csr_matrix((values[kept], rows[kept], indptr), shape=(len(rows), labels))
    matrix.sort_indices()
    return matrix
