"""What every predictor of texts has in common: the labels that it answers with, and their names."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xmlkernels.data.text_parts import TextParts
from xmlkernels.errors import InputError

NAMES = "label_names.txt"  # in the folder of checkpoints or of a ranker, one name per line
RANKER = "ranker.safetensors"  # in the folder of a ranker
AHEAD = 16  # batches of texts read ahead, so that texts of like length share a batch

Text = str | tuple[str, str]


@dataclass(frozen=True)
class Label:
    """One predicted label.

    Attributes:
        id: its number.
        name: its name, or its number where names are unknown.
        score: log-odds, ln p / (1 - p), of one model, of a ranker (whose margin is taken for
            log-odds where the ranker alone decides) or of a forest. Not bounded: where p rounds to
            0 or 1, log-odds still tell labels apart.
    """

    id: int
    name: str
    score: float

    @property
    def probability(self) -> float:
        """σ(score): what the model was trained to give, not calibrated on held-out data."""
        return 1 / (1 + math.exp(-self.score)) if self.score > -700 else 0.0


class TextPredictor(ABC):
    """Texts in, the best labels of each out.

    Attributes:
        labels: L.
        label_names: L names, or None.
        parts: how title and body of a text become what the model reads.
        takes_pairs: whether each text is a pair (what the model reads, what TF-IDF is made of).
    """

    labels: int
    label_names: list[str] | None
    parts: TextParts
    takes_pairs: bool = False

    @abstractmethod
    def _in_order(
        self, texts: Iterable[Text], k: int, batch_size: int, window: int, prefetch: int
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """Scores fp32 [k] and labels int64 [k] of each text, in the order of the texts."""

    def predict(
        self,
        texts: Iterable[Text],
        k: int = 10,
        *,
        batch_size: int = 64,
        window: int = AHEAD,
        prefetch: int = 2,
    ) -> Iterator[list[Label]]:
        """Predict the k best labels of each text, best first, in the order of the texts.

        `texts` is read as it is used.

        Args:
            texts: strings or, where `takes_pairs`, pairs of them.
            k: labels per text, or fewer where a text has fewer.
            batch_size: texts per pass.
            window: batches of texts read before the first answer, so that texts of like length
                share a batch; with 1 and `batch_size` 1 each text is answered before the next one
                is read.
            prefetch: batches that a background thread tokenises ahead; 0 does without the thread,
                as a ranker always does.
        """
        for values, rows in self._in_order(texts, k, batch_size, window, prefetch):
            pairs = zip(values.tolist(), rows.tolist(), strict=True)
            yield [Label(row, self._name(row), value) for value, row in pairs if row >= 0]

    def _name(self, label: int) -> str:
        return self.label_names[label] if self.label_names else str(label)

    def predict_arrays(
        self, texts: Iterable[Text], k: int = 10, *, batch_size: int = 64
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predict N texts: scores (log-odds) fp32 [N, k] and labels int64 [N, k].

        -inf and -1 where there are fewer than k labels.
        """
        pairs = list(self._in_order(texts, k, batch_size, AHEAD, 2))
        if not pairs:
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
        values, rows = zip(*pairs, strict=True)
        return np.stack(values), np.stack(rows)


def read_names(folder: Path, labels: int) -> list[str] | None:
    """Read the names of the labels that a folder holds; None where it holds none.

    Raises:
        InputError: not one name per label, or no UTF-8.
    """
    path, mend = folder / NAMES, "copy it from the dataset that the model was trained on"
    if not path.exists():
        return None
    try:
        names: Sequence[str] = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), "names in UTF-8, one per line", str(error), mend) from None
    *names, last = names
    if last or len(names) != labels:
        expected = f"{labels:,} lines, a name for each label"
        raise InputError(str(path), expected, f"{len(names):,}", mend)
    return list(names)
