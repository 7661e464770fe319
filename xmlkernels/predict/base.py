"""What every predictor of texts has in common: the labels that it answers with, and their names."""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from xmlkernels.data.text_parts import TextParts
from xmlkernels.errors import InputError
from xmlkernels.predict.limits import Given, LabelNumbers, Limits

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
        self,
        texts: Iterable[Text],
        k: int,
        batch_size: int,
        window: int,
        prefetch: int,
        limits: Limits,
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """Scores fp32 [k] and labels int64 [k] of each text, in the order of the texts."""

    @abstractmethod
    def embed(self, texts: Iterable[Text], *, batch_size: int = 64) -> np.ndarray:
        """Embed N texts: fp32 [N, D], what the model's label table meets of each.

        Raises:
            InputError: a ranker without a model, which has no embedding.
        """

    @cached_property
    def numbers(self) -> LabelNumbers:
        """The numbers of the labels, by name."""
        return LabelNumbers(self.labels, self.label_names)

    def predict(
        self,
        texts: Iterable[Text],
        k: int = 10,
        *,
        batch_size: int = 64,
        window: int = AHEAD,
        prefetch: int = 2,
        allow: Given = None,
        exclude: Given = None,
    ) -> Iterator[list[Label]]:
        """Predict the k best labels of each text, best first, in the order of the texts.

        `texts` is read as it is used. Several threads may ask one predictor at once.

        A text with an allow-list gets the best k of the list, whose labels are all scored: those,
        too, whose cluster a label tree's beam would have dropped. Exclusions are left out before
        the cut to k. Where they leave fewer than k on a shortlist, all other labels are scored.

        Args:
            texts: strings or, where `takes_pairs`, pairs of them.
            k: labels per text, or fewer where a text has fewer.
            batch_size: texts per pass.
            window: batches of texts read before the first answer, so that texts of like length
                share a batch; with 1 and `batch_size` 1 each text is answered before the next one
                is read.
            prefetch: batches that a background thread tokenises ahead; 0 does without the thread,
                as a ranker always does.
            allow: labels that may be given, by number (int) or name (str): one list for all texts,
                or an iterable with a list or None (all labels) for each.
            exclude: labels that are never given, likewise.

        Raises:
            InputError: a label that the model does not have, an allow-list without any, not one
                list per text, or texts that the model cannot read.
        """
        check_k(k)
        limits = Limits(self.numbers, allow, exclude)
        return self._labelled(self._in_order(texts, k, batch_size, window, prefetch, limits))

    def _labelled(self, answers: Iterator[tuple[np.ndarray, ...]]) -> Iterator[list[Label]]:
        for values, rows in answers:
            pairs = zip(values.tolist(), rows.tolist(), strict=True)
            yield [Label(row, self._name(row), value) for value, row in pairs if row >= 0]

    def _name(self, label: int) -> str:
        return self.label_names[label] if self.label_names else str(label)

    def predict_batches(
        self, batches: Iterable[Sequence[Text]], k: int = 10, **options: Any
    ) -> Iterator[list[list[Label]]]:
        """Predict batches of texts of any sizes: per batch the answers to its texts, in order.

        For streams that do not fit in memory: `batches` is read as it is used. At most `window`
        times `batch_size` texts are read ahead (and, by the thread, `prefetch` times
        `batch_size` more), also beyond the ends of batches, so that small ones share a pass.

        Args:
            batches: lists of texts, as of `predict`.
            k: labels per text.
            options: of `predict`. `allow` and `exclude` are one list for all texts, or an iterable
                with one for each text of all batches.

        Raises:
            InputError: as of `predict`, or a batch that is a string.
        """
        sizes: deque[int] = deque()
        return _regrouped(self.predict(_flattened(batches, sizes), k, **options), sizes)

    def predict_arrays(
        self,
        texts: Iterable[Text],
        k: int = 10,
        *,
        batch_size: int = 64,
        allow: Given = None,
        exclude: Given = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predict N texts: scores (log-odds) fp32 [N, k] and labels int64 [N, k].

        -inf and -1 where there are fewer than k labels. `allow` and `exclude` are those of
        `predict`.
        """
        check_k(k)
        limits = Limits(self.numbers, allow, exclude)
        pairs = list(self._in_order(texts, k, batch_size, AHEAD, 2, limits))
        if not pairs:
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
        values, rows = zip(*pairs, strict=True)
        return np.stack(values), np.stack(rows)


def check_k(k: int) -> None:
    """Raise InputError unless k is a whole number from 1."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise InputError("k", "a whole number from 1", repr(k), "ask for at least one label")


def _flattened(batches: Iterable[Sequence[Text]], sizes: deque[int]) -> Iterator[Text]:
    """Yield the texts of batches, and note the size of each batch before its first text."""
    for number, batch in enumerate(batches):
        if isinstance(batch, str):
            got, mend = repr(batch[:40]), "give lists of texts, or call predict"
            raise InputError(f"batch {number}", "a list of texts", got, mend)
        whole = list(batch)
        sizes.append(len(whole))
        yield from whole


def _regrouped(answers: Iterator[list[Label]], sizes: deque[int]) -> Iterator[list[list[Label]]]:
    found: list[list[Label]] = []
    for labels in answers:
        while sizes[0] == 0:
            sizes.popleft()
            yield []
        found.append(labels)
        if len(found) == sizes[0]:
            sizes.popleft()
            yield found
            found = []
    yield from ([] for _ in sizes)


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
