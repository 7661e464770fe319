"""A model over a whole split: predictions, embeddings, loss, and what each level of a cascade
contributes.

Of several processes each takes batches of its own; all of them have the results of all.
"""

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
from xmlkernels.levels import LevelScores
from xmlkernels.models.base import Documents, Model, arrangement, tree_of
from xmlkernels.models.cascade import Cascade


def predict_split(
    model: Model, split: Split, k: int, *, batch_size: int = 256, inputs: Inputs | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k best labels of every document of a split, filter pairs left out before the cut.

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
        values[own[-1]], rows[own[-1]] = (t.cpu().numpy() for t in model.predict(batch, k, exclude))
    dist.fill_rows(own, values, rows)
    return values, rows


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a split gives.

    Attributes:
        values, labels: logits fp32 [N, k] and labels int64 [N, k], as of `predict_split`.
        loss: per document: of the end-to-end model summed over all labels, of a cascade the mean
            over candidates.
        levels: of a cascade, see `LevelScores.result`; else empty.
    """

    values: np.ndarray
    labels: np.ndarray
    loss: float
    levels: list[dict[str, Any]]


def evaluate_split(
    model: Model, split: Split, k: int, *, batch_size: int = 256, inputs: Inputs | None = None
) -> Evaluation:
    """Predictions, loss and, of a cascade, what each level contributes, for one pass of the
    encoder.

    Of several processes each evaluates whole batches of its own and has the result of all: every
    document is seen once, in the batch in which one process alone would see it, so that the result
    is the same to the bit.
    """
    own = model.heads.scheme if isinstance(model, Cascade) else ""
    return _evaluated(model, split, k, (own,), batch_size, inputs)[own]


def evaluate_schemes(
    model: Cascade, split: Split, k: int, *, batch_size: int = 256, inputs: Inputs | None = None
) -> dict[str, Evaluation]:
    """What `evaluate_split` would find under each scheme, for one pass of the encoder."""
    return _evaluated(model, split, k, model.schemes, batch_size, inputs)


def _evaluated(
    model: Model,
    split: Split,
    k: int,
    schemes: Sequence[str],
    batch_size: int,
    inputs: Inputs | None,
) -> dict[str, Evaluation]:
    """An evaluation for each scheme; the end-to-end model has one, without a name."""
    count = split.labels.shape[0]
    values = {scheme: np.empty((count, k), np.float32) for scheme in schemes}
    labels = {scheme: np.empty((count, k), np.int64) for scheme in schemes}
    scores = (
        {scheme: LevelScores(model, split.labels) for scheme in schemes}
        if isinstance(model, Cascade)
        else {}
    )
    own, losses = [], []
    for batch, exclude in evaluation_batches(model, split, batch_size, inputs):
        index = batch.index.cpu().numpy()
        own.append(index)
        if isinstance(model, Cascade):
            levels, loss = model.levels_and_loss(batch, max(k, 5), exclude, schemes)
            for scheme in schemes:
                scores[scheme].add(index, levels[scheme])
            best = {
                scheme: (levels[scheme][-1].values[:, :k], levels[scheme][-1].nodes[:, :k])
                for scheme in schemes
            }
        else:
            value, ids, loss = model.predict_and_loss(batch, k, exclude)
            best = {schemes[0]: (value, ids)}
        for scheme, (value, ids) in best.items():
            values[scheme][index], labels[scheme][index] = value.cpu().numpy(), ids.cpu().numpy()
        losses.append(float(loss) * (1 if model.sums_loss else len(batch)))
    dist.fill_rows(own, *values.values(), *labels.values())
    mean = sum(_in_turn(losses)) / max(1, count)
    return {
        s: Evaluation(values[s], labels[s], mean, scores[s].result() if scores else [])
        for s in schemes
    }


def _in_turn(own: list[float]) -> list[float]:
    """What all processes have of batches that they took in turn, in the order of the batches: a sum
    hangs on it.
    """
    number = dist.rank() + dist.size() * np.arange(len(own))
    pairs = dist.gather_ragged(torch.from_numpy(np.stack([number, np.array(own, np.float64)], 1)))
    return [value for _, value in sorted(pairs.tolist())]


def predict_and_embed_split(
    model: Model, split: Split, k: int, *, batch_size: int = 256, inputs: Inputs | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `predict_split` and `embed_split` give, for one pass of the encoder."""
    count, own = split.labels.shape[0], []
    out = [
        np.empty((count, k), np.float32),
        np.empty((count, k), np.int64),
        np.empty((count, model.width), np.float32),
    ]
    for batch, exclude in evaluation_batches(model, split, batch_size, inputs):
        own.append(batch.index.cpu().numpy())
        for whole, part in zip(out, model.predict_and_embed(batch, k, exclude), strict=True):
            whole[own[-1]] = part.cpu().numpy()
    dist.fill_rows(own, *out)
    return out[0], out[1], out[2]


def embed_split(
    model: Model, split: Split, *, batch_size: int = 256, inputs: Inputs | None = None
) -> np.ndarray:
    """fp32 [N, D]: what the label table meets of every document of a split."""
    out, own = np.empty((split.labels.shape[0], model.width), np.float32), []
    for batch, _ in evaluation_batches(model, split, batch_size, inputs):
        own.append(batch.index.cpu().numpy())
        out[own[-1]] = model.embed(batch).cpu().numpy()
    dist.fill_rows(own, out)
    return out


def evaluation_batches(
    model: Model, split: Split, batch_size: int, inputs: Inputs | None = None
) -> Iterator[tuple[Documents, Tensor | None]]:
    """Every document of a split once, on the model's device and with the model in evaluation mode
    until the end; of several processes each takes every so many-th batch.

    Yields:
        A batch with positives as the model wants them, and its filter pairs int64 [B, E] (-1 pads)
        or None.
    """
    wanted = arrangement(tree_of(model))
    made: Any = Batches(split, batch_size, shuffle=False, **wanted) if inputs is None else None
    if inputs is not None:
        made = inputs.batches(split, batch_size, shuffle=False, **wanted)
    pairs = split.filter_pairs[np.lexsort((split.filter_pairs[:, 1], split.filter_pairs[:, 0]))]
    was_training = model.training
    model.eval()
    try:
        for batch in made.epoch(0, start=min(dist.rank(), len(made)), every=dist.size()):
            exclude = _excluded(batch, pairs)
            yield batch.to(model.device), None if exclude is None else exclude.to(model.device)
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
    """Predictions as CSR [N, L] of logits; labels stand in ascending order within a row.

    A logit may be 0 or negative and is stored all the same: what is not stored was not predicted.
    """
    kept = rows >= 0
    indptr = np.concatenate([[0], np.cumsum(kept.sum(1))])
    matrix = csr_matrix((values[kept], rows[kept], indptr), shape=(len(rows), labels))
    matrix.sort_indices()
    return matrix
