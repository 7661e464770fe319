"""What every predictor of texts has in common: the labels that it answers with, and their names."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xmlkernels.data.manifest import IDS
from xmlkernels.data.text_parts import TextParts
from xmlkernels.errors import InputError
from xmlkernels.predict.calibration import CHOSEN, Calibration, Chosen, sigmoid
from xmlkernels.predict.limits import Given, LabelNumbers, Limits

NAMES = "label_names.txt"  # in the folder of checkpoints or of a ranker, one name per line
HUB_NAMES = "labels.txt"  # the same, where a folder was made to be shared
RANKER = "ranker.safetensors"  # in the folder of a ranker
RANKED_ANEW = 10  # best labels by score among which calibrated probability ranks
FOREST = "forest.json"  # in the folder of a forest: how many trees it has when it is whole
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
        log_odds: the same on the scale of held-out data, where the model is calibrated; else None.
    """

    id: int
    name: str
    score: float
    log_odds: float | None = None

    @property
    def probability(self) -> float:
        """σ(log_odds) of a calibrated model; else σ(score), what the model was trained to give."""
        odds = self.score if self.log_odds is None else self.log_odds
        return 1 / (1 + math.exp(-odds)) if odds > -700 else 0.0


class TextPredictor(ABC):
    """Texts in, the best labels of each out.

    Attributes:
        labels: L.
        label_names: L names, or None.
        label_ids: L ids, such as URIs, where the dataset's labels have some beside their names.
        parts: how title and body of a text become what the model reads.
        takes_pairs: whether each text is a pair (what the model reads, what TF-IDF is made of).
        folder: of the checkpoint or the ranker that it was loaded from; else None.
        calibration: what its scores mean on held-out data; None where it is not calibrated.
    """

    labels: int
    label_names: list[str] | None
    label_ids: list[str] | None = None
    parts: TextParts
    takes_pairs: bool = False
    folder: Path | None = None
    calibration: Calibration | None = None

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
        texts: Iterable[Text | Mapping[str, str]],
        k: int = 10,
        *,
        batch_size: int = 64,
        window: int = AHEAD,
        prefetch: int = 2,
        allow: Given = None,
        exclude: Given = None,
        threshold: Chosen | float | None = None,
        order: Literal["score", "probability"] = "score",
        propensity: float = 0.0,
    ) -> Iterator[list[Label]]:
        """Predict the k best labels of each text, best first, in the order of the texts.

        `texts` is read as it is used. Several threads may ask one predictor at once.

        A text with an allow-list gets the best k of the list, whose labels are all scored: those,
        too, whose cluster a label tree's beam would have dropped. Exclusions are left out before
        the cut to k. Where they leave fewer than k on a shortlist, all other labels are scored.

        Args:
            texts: strings or, where `takes_pairs`, pairs of them; or objects that have the columns
                of the training table as keys, where their texts were kept apart.
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
            threshold: labels below it are left out: a probability; "calibrated", the score of each
                band of labels that the calibration stored for its precision; or "f1", the
                probability that had the highest micro-F1 on validation.
            order: "probability" ranks the 10 best by score, or k where that is more, by calibrated
                probability, in which rare and frequent labels have one scale.
            propensity: above 0 rare labels rise: the 20 best, or 2k where that is more, are ranked
                by probability times inverse propensity to this power, which lifts PSP@k.

        Raises:
            InputError: a label that the model does not have, an allow-list without any, not one
                list per text, or texts that the model cannot read; "calibrated", "f1" or
                "probability" of a model that is not calibrated.
        """
        check_texts(texts)
        check_k(k)
        self.check_scale(threshold, order, propensity)
        limits = Limits(self.numbers, allow, exclude)
        most = k if order == "score" else max(k, RANKED_ANEW)
        most = max(2 * k, 2 * RANKED_ANEW) if propensity else most
        found = self._in_order(self._read(texts), most, batch_size, window, prefetch, limits)
        return (
            self._labels(values, rows, k, threshold, order, propensity) for values, rows in found
        )

    def _read(self, texts: Iterable[Text | Mapping[str, str]]) -> Iterable[Text]:
        """Make texts of objects, as they are read."""
        return (
            self.parts.of_record(text, f"text {number}") if isinstance(text, Mapping) else text
            for number, text in enumerate(texts)
        )

    def check_scale(self, threshold: object, order: str, propensity: float) -> None:
        """Raise InputError where `predict` cannot take this threshold, order or propensity."""
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not (threshold in (None, *CHOSEN) or (number and 0 <= float(threshold) <= 1)):  # type: ignore[arg-type]
            expected = 'a probability from 0 to 1, "calibrated" or "f1"'
            raise InputError("threshold", expected, repr(threshold), "correct it")
        if order not in ("score", "probability"):
            raise InputError("order", "score or probability", repr(order), "choose one of them")
        if not 0 <= propensity < math.inf:
            raise InputError("propensity", "a finite number from 0", repr(propensity), "correct it")
        needed = threshold in CHOSEN or order == "probability" or propensity > 0
        if self.calibration is None and needed:
            mend = "calibrate it with xmlkernels calibrate"
            raise InputError("predictor", "a calibrated model", "one without", mend)

    def _labels(
        self,
        values: np.ndarray,
        rows: np.ndarray,
        k: int,
        threshold: Chosen | float | None,
        order: str,
        propensity: float,
    ) -> list[Label]:
        """Return the labels of a text: calibrated, ranked, cut at `threshold` and at k."""
        odds = None if self.calibration is None else self.calibration.log_odds(values, rows)
        kept = rows >= 0
        if isinstance(threshold, str):
            assert self.calibration is not None
            kept &= self.calibration.good_enough(values, rows, threshold)
        found = [
            Label(row, self._name(row), value, None if odds is None else float(odds[at]))
            for at, (value, row) in enumerate(zip(values.tolist(), rows.tolist(), strict=True))
            if kept[at]
        ]
        if isinstance(threshold, int | float):
            found = [label for label in found if label.probability >= threshold]
        if propensity and self.calibration is not None:
            scale = values.astype(np.float64) if odds is None or order == "score" else odds
            rank = self.calibration.towards_rare(scale, rows, propensity)
            by_label = dict(zip(rows.tolist(), rank.tolist(), strict=True))
            found.sort(key=lambda label: -by_label[label.id])
        elif order == "probability":
            found.sort(key=lambda label: -(label.log_odds or 0.0))
        return found[:k]

    def probabilities(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return what `Label.probability` is, fp64, for the arrays of `predict_arrays`; 0 at -1."""
        odds = scores if self.calibration is None else self.calibration.log_odds(scores, labels)
        return np.where(labels >= 0, sigmoid(odds), 0.0)

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
        texts: Iterable[Text | Mapping[str, str]],
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
        check_texts(texts)
        check_k(k)
        limits = Limits(self.numbers, allow, exclude)
        pairs = list(self._in_order(self._read(texts), k, batch_size, AHEAD, 2, limits))
        if not pairs:
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
        values, rows = zip(*pairs, strict=True)
        return np.stack(values), np.stack(rows)


def check_texts(texts: object) -> None:
    """Raise InputError for a single string, which would be labelled letter by letter."""
    if isinstance(texts, str | bytes):
        got = repr(texts[:40])
        raise InputError("texts", "a list of texts", got, "write [text] for a single one")


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


def names_file(folder: Path) -> Path:
    """Return the file of the labels' names: `label_names.txt`, or a shared folder's own."""
    shared = folder / HUB_NAMES
    return shared if shared.is_file() and not (folder / NAMES).is_file() else folder / NAMES


def read_names(folder: Path, labels: int) -> list[str] | None:
    """Read the names of the labels that a folder holds; None where it holds none.

    Raises:
        InputError: not one name per label, or no UTF-8.
    """
    return _per_label(names_file(folder), labels)


def read_ids(folder: Path, labels: int) -> list[str] | None:
    """Read the ids of the labels that a folder holds; None where it holds none.

    Raises:
        InputError: not one id per label, or no UTF-8.
    """
    return _per_label(folder / IDS, labels)


def _per_label(path: Path, labels: int) -> list[str] | None:
    mend = "copy it from the dataset that the model was trained on"
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
