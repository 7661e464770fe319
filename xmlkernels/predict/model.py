"""Prediction: a checkpoint and texts in, labels and scores out.

from xmlkernels.predict.model import Predictor
predictor = Predictor.load("runs/demo/checkpoint")
for labels in predictor.predict(["open a file and read its lines"], k=5):
    print([(label.name, round(label.probability, 3)) for label in labels])
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.checksums import Files, check_files
from xmlkernels.data.inputs import Inputs, TextParts, load_inputs
from xmlkernels.errors import InputError
from xmlkernels.models.base import Model
from xmlkernels.models.restore import DIVERGED, check_finite, restored
from xmlkernels.models.saved import model_config, needed_for_prediction
from xmlkernels.records import check_record
from xmlkernels.threads import check_threads, torch_threads

NAMES = "label_names.txt"  # beside a checkpoint or a ranker, one a line
BESIDE = (
    NAMES,
    "tokenizer",
    "vocabulary",
)  # beside the checkpoints of a run: what predictions need of it
_AHEAD = 16  # batches of texts read ahead, so that texts of like length share a batch


class CheckpointWarning(UserWarning):
    """Another checkpoint is used than one would expect."""


@dataclass(frozen=True)
class Label:
    """One predicted label.

    Attributes:
        id: its number.
        name: its name, the number where names are unknown.
        score: log-odds, ln p / (1 - p), whoever gives them: one model, a ranker (whose own margin
            is taken for log-odds where it has the whole say) or a forest. Not bounded: where p
            rounds to 0 or 1, log-odds still tell labels apart.
    """

    id: int
    name: str
    score: float

    @property
    def probability(self) -> float:
        """σ(score): what the model was trained to give, not calibrated on held-out data."""
        return 1 / (1 + math.exp(-self.score)) if self.score > -700 else 0.0


def named(values: np.ndarray, rows: np.ndarray, names: Sequence[str] | None) -> list[Label]:
    """One text's answer: logits [k] and labels [k], -1 where there are fewer; without names the
    numbers stand for them.
    """
    pairs = zip(values.tolist(), rows.tolist(), strict=True)
    return [
        Label(row, names[row] if names else str(row), value) for value, row in pairs if row >= 0
    ]


def read_names(folder: Path, labels: int) -> list[str] | None:
    """The names of the labels kept in a folder, or None where there are none.

    Raises:
        InputError: not one name for each label, or no UTF-8.
    """
    path, mend = folder / NAMES, "copy it from the dataset that the model was trained on"
    if not path.exists():
        return None
    try:
        names = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), "names in UTF-8, one a line", str(error), mend) from None
    if names.pop() or len(names) != labels:
        raise InputError(
            str(path), f"{labels:,} lines, a name for each label", f"{len(names):,}", mend
        )
    return names


class Predictor:
    """A trained model with the way it reads texts and its label names.

    Attributes:
        model: the model, in evaluation mode.
        inputs: texts to batches, as in training.
        label_names: L names, or None.
        identity: `checkpoint_identity` of where it came from.
        threads: CPU threads that its model computes on; 0 leaves torch's choice.
    """

    def __init__(
        self,
        model: Model,
        inputs: Inputs,
        label_names: list[str] | None = None,
        identity: str = "",
        *,
        threads: int = 0,
    ) -> None:
        self.model, self.inputs, self.label_names, self.identity = (
            model,
            inputs,
            label_names,
            identity,
        )
        self.threads = check_threads(threads)
        model.eval()

    @property
    def labels(self) -> int:
        """L."""
        return self.model.labels

    @property
    def parts(self) -> TextParts:
        """How title and body of a text become what the model reads."""
        return self.inputs.parts

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        which: str | None = None,
        device: str | torch.device = "cpu",
        threads: int = 0,
    ) -> "Predictor":
        """From the `checkpoint` folder of a run.

        A process that has loaded a model and not yet asked it can still fork, and its children
        answer: on the CPU, loading starts no threads that a child would wait for. After the first
        prediction that is over, as with torch itself.

        Args:
            folder: a run's `checkpoint` folder, or the run's output folder.
            which: "best" or "last". When not given it is the best one. While a run has none yet, or
                where it is damaged, it is the last one or, where that is damaged too, the newest of
                those before it, with a CheckpointWarning.
            threads: CPU threads that this predictor's model computes on, whatever the rest of the
                process uses; 0 leaves torch's choice. Tokenisers have threads of their own
                (TOKENIZERS_PARALLELISM=false does without).

        Raises:
            InputError: no such checkpoint, one that is damaged, damaged files beside it, or one
                whose training has diverged.
        """
        check_threads(threads)
        checkpoints, order = _located(folder, which)
        tensors, state, found = _first(checkpoints, order, needed_for_prediction)
        path = checkpoints.folder
        check_files(
            path, files_beside(state, str(path / found)), "copy the whole checkpoint folder again"
        )
        # Not slower: new memory is filled at the speed at which the system hands it out, on one
        # thread or on several.
        with torch_threads(1):
            model = restored(model_config(state), tensors)
            model.load_tensors(tensors)
            check_finite(model, str(path / found))
            model = model.to(torch.device(device))
        names = read_names(path, model.labels)
        return cls(model, load_inputs(path, state), names, _identity(state), threads=threads)

    def predict(
        self,
        texts: Iterable[str],
        k: int = 10,
        *,
        batch_size: int = 64,
        window: int = _AHEAD,
        prefetch: int = 2,
    ) -> Iterator[list[Label]]:
        """The k best labels of each text, best first, in the order of the texts; `texts` is read as
        it is used.

        Args:
            window: batches of texts read before the first answer, so that texts of like length
                share a batch; with 1 and `batch_size` 1 each text is answered before the next one
                is read.
            prefetch: batches tokenised ahead by a background thread; 0 does without the thread.
        """
        for values, rows in self._in_order(texts, k, batch_size, window, prefetch):
            yield named(values, rows, self.label_names)

    def predict_arrays(
        self, texts: Iterable[str], k: int = 10, *, batch_size: int = 64
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores (log-odds) fp32 [N, k] and labels int64 [N, k] of N texts; -inf and -1 where there
        are fewer than k labels.
        """
        pairs = list(self._in_order(texts, k, batch_size, _AHEAD, 2))
        if not pairs:
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
        return np.stack([v for v, _ in pairs]), np.stack([r for _, r in pairs])

    def predict_and_embed(
        self, texts: Sequence[str], k: int, *, batch_size: int = 64
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `predict_arrays` gives of one text or more, and fp32 [N, D]: what the label table
        meets of each.
        """
        values, rows, embedding = zip(
            *self._in_order(texts, k, batch_size, _AHEAD, 0, embed=True), strict=True
        )
        return np.stack(values), np.stack(rows), np.stack(embedding)

    def _in_order(
        self,
        texts: Iterable[str],
        k: int,
        batch_size: int,
        window: int,
        prefetch: int,
        *,
        embed: bool = False,
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """Logits [k], labels [k] and, if asked, the embedding [D] of each text."""
        waiting: dict[int, tuple[np.ndarray, ...]] = {}
        following = 0
        for batch in self.inputs.text_batches(texts, batch_size, window=window, prefetch=prefetch):
            with torch_threads(
                self.threads
            ):  # never across a yield: the caller's own work is not ours to slow down
                there = batch.to(self.model.device)
                found = self.model.score(there, k, embedding=embed)
            _check_answers(found.values, found.labels)
            parts = [t for t in (found.values, found.labels, found.embedding) if t is not None]
            rows_of = zip(*(t.cpu().numpy() for t in parts), strict=True)
            waiting.update(zip(batch.index.tolist(), rows_of, strict=True))
            while following in waiting:
                yield waiting.pop(following)
                following += 1


def _check_answers(values: torch.Tensor, rows: torch.Tensor) -> None:
    """Refuses scores that overflowed though the weights have not: every text has one label or more,
    with a finite score.
    """
    if rows.shape[1] and not bool(torch.isfinite(values[:, 0]).all() & (rows[:, 0] >= 0).all()):
        got = "NaN or infinity for a text"
        raise InputError("model", "scores that are finite numbers", got, DIVERGED)


def checkpoint_identity(folder: str | Path, which: str | None = None) -> str:
    """Tells one checkpoint from every other, also from later ones of its run; a copy has the same.
    Arguments as of `load`.
    """
    return _identity(_first(*_located(folder, which), keep=lambda name: False)[1])


def files_beside(state: Mapping[str, Any], where: str) -> Files:
    """Sizes and checksums of the files beside a checkpoint or a ranker, as it has them; none where
    it is older than they.
    """
    return check_record(
        state.get("beside", {}), Files, where=f"{where}, $.beside", mend="use another one"
    )


def _identity(state: Mapping[str, Any]) -> str:
    # The state holds the seconds spent and the random generators: no two saves share it.
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _located(folder: str | Path, which: str | None) -> tuple[CheckpointFolder, tuple[str, ...]]:
    """The checkpoints in a run's output folder or in the folder itself, and in which order they are
    tried.
    """
    path = Path(folder)
    checkpoints = CheckpointFolder(path / "checkpoint" if (path / "checkpoint").is_dir() else path)
    if which is not None:
        return checkpoints, (which,)
    order: tuple[str, ...] = ("best", "last", "earlier")
    if not checkpoints.exists("best") and checkpoints.resumable():
        told = f"{checkpoints.folder} holds no best checkpoint yet; the last one is used"
        warnings.warn(told, CheckpointWarning, stacklevel=3)
        order = order[1:]
    return checkpoints, order


def _first(
    checkpoints: CheckpointFolder, order: tuple[str, ...], keep: Callable[[str], bool]
) -> tuple[dict[str, torch.Tensor], dict[str, Any], str]:
    """The first that is whole and its name, with a warning where an earlier one of the order is
    not.
    """
    tensors, state, found, reason = checkpoints.load_first(order, keep)
    if reason is not None:
        told = f"{reason.where}: {reason.got}; {checkpoints.folder / found} is used in its place"
        warnings.warn(told, CheckpointWarning, stacklevel=3)
    return tensors, state, found
