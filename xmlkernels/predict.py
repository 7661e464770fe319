"""Prediction: a checkpoint and texts in, labels and scores out.

from xmlkernels.predict import Predictor
predictor = Predictor.load("runs/demo/checkpoint")
for labels in predictor.predict(["open a file and read its lines"], k=5):
    print([(label.name, round(label.probability, 3)) for label in labels])
"""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from xmlkernels import dist
from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.data.dataset import Split
from xmlkernels.data.inputs import Inputs, load_inputs
from xmlkernels.data.loader import Batches
from xmlkernels.levels import LevelScores
from xmlkernels.models.cascade import Cascade
from xmlkernels.models.common import Documents, Model, arrangement, model_config, tree_of
from xmlkernels.models.restore import restored

_AHEAD = 16  # batches of texts read ahead, so that texts of like length share a batch
_TRAINING_ONLY = ("optimizer.", "scaler.", "head.momentum", "head.second", "head.kahan")
_TRAINING_ENDS = (".momentum", ".second")  # of a cascade's tables and of a bag of words'


def _for_prediction(name: str) -> bool:
    return not name.startswith(_TRAINING_ONLY) and not name.endswith(_TRAINING_ENDS)


class CheckpointWarning(UserWarning):
    """Another checkpoint is used than one would expect."""


@dataclass(frozen=True)
class Label:
    """One predicted label: its number, its name (the number where names are unknown) and its logit."""

    id: int
    name: str
    score: float

    @property
    def probability(self) -> float:
        """σ(score): what the model was trained to give, not calibrated on held-out data."""
        return 1 / (1 + math.exp(-self.score)) if self.score > -700 else 0.0


class Predictor:
    """A trained model with the way it reads texts and its label names.

    Attributes:
        model: the model, in evaluation mode.
        inputs: texts to batches, as in training.
        label_names: L names, or None.
    """

    def __init__(self, model: Model, inputs: Inputs, label_names: list[str] | None = None) -> None:
        self.model, self.inputs, self.label_names = model, inputs, label_names
        model.eval()

    @classmethod
    def load(cls, folder: str | Path, *, which: str | None = None, device: str | torch.device = "cpu") -> "Predictor":
        """From the `checkpoint` folder of a run.

        Args:
            folder: a run's `checkpoint` folder, or the run's output folder.
            which: "best" or "last". When not given it is the best one or, while a run has none yet, the last one, with a
                CheckpointWarning.

        Raises:
            InputError: no such checkpoint, or one that is damaged.
        """
        path = Path(folder)
        path = path / "checkpoint" if (path / "checkpoint").is_dir() else path
        checkpoints = CheckpointFolder(path)
        if which is None:
            which = "best" if checkpoints.exists("best") or not checkpoints.exists("last") else "last"
            if which == "last":
                warnings.warn(f"{path} holds no best checkpoint yet; the last one is used", CheckpointWarning, stacklevel=2)
        tensors, state = checkpoints.load(which, keep=_for_prediction)
        model = restored(model_config(state), tensors)
        model.load_tensors(tensors)
        names = path / "label_names.txt"
        label_names = names.read_text("utf-8").split("\n")[:-1] if names.exists() else None
        return cls(model.to(torch.device(device)), load_inputs(path, state), label_names)

    def predict(
        self, texts: Iterable[str], k: int = 10, *, batch_size: int = 64, window: int = _AHEAD, prefetch: int = 2
    ) -> Iterator[list[Label]]:
        """The k best labels of each text, best first, in the order of the texts; `texts` is read as it is used.

        Args:
            window: batches of texts read before the first answer, so that texts of like length share a batch; with 1 and
                `batch_size` 1 each text is answered before the next one is read.
            prefetch: batches tokenised ahead by a background thread; 0 does without the thread.
        """
        for values, rows in self._in_order(texts, k, batch_size, window, prefetch):
            yield [
                Label(row, self.label_names[row] if self.label_names else str(row), value)
                for value, row in zip(values.tolist(), rows.tolist(), strict=True)
                if row >= 0
            ]

    def predict_arrays(self, texts: Iterable[str], k: int = 10, *, batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
        """Logits fp32 [N, k] and labels int64 [N, k] of N texts; -inf and -1 where there are fewer than k labels."""
        pairs = list(self._in_order(texts, k, batch_size, _AHEAD, 2))
        if not pairs:
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
        return np.stack([v for v, _ in pairs]), np.stack([r for _, r in pairs])

    def _in_order(
        self, texts: Iterable[str], k: int, batch_size: int, window: int, prefetch: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        device = self.model.device
        waiting: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        following = 0
        for batch in self.inputs.text_batches(texts, batch_size, window=window, prefetch=prefetch):
            values, rows = (t.cpu().numpy() for t in self.model.predict(batch.to(device), k))
            waiting.update(zip(batch.index.tolist(), zip(values, rows, strict=True), strict=True))
            while following in waiting:
                yield waiting.pop(following)
                following += 1


def predict_split(
    model: Model, split: Split, k: int, *, batch_size: int = 256, inputs: Inputs | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k best labels of every document of a split, filter pairs left out before the cut.

    Args:
        inputs: how the model reads documents; the split's own tokens when not given.

    Returns:
        Logits fp32 [N, k] and labels int64 [N, k]; -inf and -1 where there are fewer than k labels. Of several processes each
        has them all, and they are those of one alone.
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
        loss: per document: of the end-to-end model summed over all labels, of a cascade the mean over candidates.
        levels: of a cascade, see `LevelScores.result`; else empty.
    """

    values: np.ndarray
    labels: np.ndarray
    loss: float
    levels: list[dict[str, Any]]


def evaluate_split(model: Model, split: Split, k: int, *, batch_size: int = 256, inputs: Inputs | None = None) -> Evaluation:
    """Predictions, loss and, of a cascade, what each level contributes, for one pass of the encoder.

    Of several processes each evaluates whole batches of its own and has the result of all: every document is seen once, in the
    batch in which one process alone would see it, so that the result is the same to the bit.
    """
    count = split.labels.shape[0]
    values, labels = np.empty((count, k), np.float32), np.empty((count, k), np.int64)
    scores = LevelScores(model, split.labels) if isinstance(model, Cascade) else None
    own, losses = [], []
    for batch, exclude in evaluation_batches(model, split, batch_size, inputs):
        index = batch.index.cpu().numpy()
        own.append(index)
        if isinstance(model, Cascade) and scores is not None:
            levels, loss = model.levels_and_loss(batch, max(k, 5), exclude)
            scores.add(index, levels)
            best, ids = levels[-1].values[:, :k], levels[-1].nodes[:, :k]
        else:
            best, ids, loss = model.predict_and_loss(batch, k, exclude)
        values[index], labels[index] = best.cpu().numpy(), ids.cpu().numpy()
        losses.append(float(loss) * (1 if model.sums_loss else len(batch)))
    dist.fill_rows(own, values, labels)
    total = sum(_in_turn(losses))
    return Evaluation(values, labels, total / max(1, count), scores.result() if scores is not None else [])


def _in_turn(own: list[float]) -> list[float]:
    """What all processes have of batches that they took in turn, in the order of the batches: a sum hangs on it."""
    number = dist.rank() + dist.size() * np.arange(len(own))
    pairs = dist.gather_ragged(torch.from_numpy(np.stack([number, np.array(own, np.float64)], 1)))
    return [value for _, value in sorted(pairs.tolist())]


def predict_and_loss(
    model: Model, split: Split, k: int, *, batch_size: int = 256, inputs: Inputs | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """What `predict_split` and `mean_loss` give, for one pass of the encoder."""
    found = evaluate_split(model, split, k, batch_size=batch_size, inputs=inputs)
    return found.values, found.labels, found.loss


def mean_loss(model: Model, split: Split, *, batch_size: int = 256, inputs: Inputs | None = None) -> float:
    """The loss of a split averaged over documents; see `Evaluation`."""
    return evaluate_split(model, split, 1, batch_size=batch_size, inputs=inputs).loss


def embed_split(model: Model, split: Split, *, batch_size: int = 256, inputs: Inputs | None = None) -> np.ndarray:
    """fp32 [N, D]: what the label table meets of every document of a split."""
    out, own = np.empty((split.labels.shape[0], 0), np.float32), []
    for batch, _ in evaluation_batches(model, split, batch_size, inputs):
        own.append(batch.index.cpu().numpy())
        found = model.embed(batch).cpu().numpy()
        if out.shape[1] != found.shape[1]:
            out = np.empty((len(out), found.shape[1]), np.float32)
        out[own[-1]] = found
    width = int(dist.max_(torch.tensor([out.shape[1]])))
    if out.shape[1] != width:  # this process had no batch
        out = np.empty((len(out), width), np.float32)
    dist.fill_rows(own, out)
    return out


def evaluation_batches(
    model: Model, split: Split, batch_size: int, inputs: Inputs | None = None
) -> Iterator[tuple[Documents, Tensor | None]]:
    """Every document of a split once, on the model's device and with the model in evaluation mode until the end; of several
    processes each takes every so many-th batch.

    Yields:
        A batch with positives as the model wants them, and its filter pairs int64 [B, E] (-1 pads) or None.
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
