"""What the terminal shows while a model trains: a line every few seconds.

It tells how much time is left, and the loss beside the one that it is compared with.
"""

import logging
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels import InputError
from xmlkernels.label_counts import LabelCounts
from xmlkernels.records import parse_record
from xmlkernels.ticks import LIVE, duration, interval, memory_held

log = logging.getLogger(__name__)

# Seconds between lines: where the log gets one anyway, and elsewhere, so that slow steps are not
# silent ones.
_LOGGED, _SLOW = 10.0, 30.0


class Progress:
    """The lines of one part of a run, from its start or from where it was resumed.

    Args:
        total: steps of the whole run. step: where this part begins.
        reference: what the loss is read against, in words: `frequencies alone: 31.0`; "": the first
            loss told here, or the first of the log.
    """

    def __init__(
        self, total: int, step: int, *, reference: str = "", log: Path | None = None
    ) -> None:
        self.total, self.first, self.reference = total, step, reference
        self._began, self._told = time.monotonic(), -math.inf
        self._shown = self._began
        if not reference and log is not None and log.exists():
            self._refer(_first_loss(log))

    def due(self, *, logged: bool = False) -> bool:
        """Tell whether it is time for a line.

        The first comes with the first of the log, or after ten seconds.
        """
        lively, level = interval(log)
        if level == LIVE:
            return time.monotonic() - self._shown >= lively
        if self._told == -math.inf:
            return logged or time.monotonic() - self._began >= _LOGGED
        return time.monotonic() - self._told >= (_LOGGED if logged else _SLOW)

    def tell(
        self,
        step: int,
        epoch: float,
        loss: float | None,
        speed: float,
        *,
        a_sum: bool,
        rate: float | None = None,
    ) -> None:
        """One line; where lines replace one another, a lasting one now and then.

        Args:
            loss: per document where it is `a_sum` over the labels, else a mean over candidates;
                None: not known.
            speed: documents per second.
            rate: of the encoder in the last step; None leaves rate and memory out.
        """
        now, level = time.monotonic(), logging.INFO
        if interval(log)[1] == LIVE and now - self._told < _SLOW:
            level = LIVE
        else:
            self._told = now
        self._shown = now
        share = 100 * step / max(self.total, 1)
        told = (
            ""
            if loss is None
            else f"  loss {loss:.1f} per document"
            if a_sum
            else f"  loss {loss:.3g}"
        )
        if loss is not None:
            told += f" ({self.reference})" if self.reference else ""
            self._refer(loss)
        where = f"step {step:,} of {self.total:,} ({share:.0f}%)  epoch {epoch:.2f}"
        more = "" if rate is None else f"  lr {rate:.2g}{memory_held()}"
        log.log(level, f"{where}{told}{more}  {speed:.0f} documents/s{self._left(step)}")

    def _refer(self, loss: float | None) -> None:
        if not self.reference and loss is not None:
            self.reference = f"at first: {loss:.3g}"

    def _left(self, step: int) -> str:
        """Time to the end as this part has gone, evaluations and checkpoints with it."""
        if step <= self.first or step >= self.total:
            return ""
        seconds = (time.monotonic() - self._began) / (step - self.first) * (self.total - step)
        return f"  about {duration(seconds)} left"


class LogLine(TypedDict):
    """A line of log.jsonl, as far as it is read again."""

    loss: NotRequired[float | None]


def _first_loss(log: Path) -> float | None:
    """Find the first loss of a run's log; lines that a kill cut short are passed over."""
    with log.open("rb") as lines:
        for line in lines:
            with suppress(InputError):
                value = parse_record(line, LogLine, where=str(log), mend="it is only told")
                if "split" not in value and value.get("loss") is not None:
                    return value["loss"]
    return None


class Frequencies:
    """The loss of predicting every label at its frequency in training, whatever the text.

    Other losses are compared with it.

    Args:
        labels: CSR [N, L] of the training documents.
        label_texts: whether each label's own text is trained on as a document of that label, too.
    """

    def __init__(self, labels: csr_matrix, *, label_texts: bool = False) -> None:
        documents, count = labels.shape
        self.documents = documents + count * label_texts
        self._counts = LabelCounts(labels)
        self._more = int(label_texts)

    def loss(self, labels: csr_matrix | None = None) -> float:
        """Compute the binary cross-entropy per document, summed over the labels, in nats.

        It is that of the documents that were counted, or of others.
        """
        # Every label as if no document had it: each number of documents once.
        numbers, times = self._counts.distinct()
        total = -float((times * np.log1p(-self._chance(numbers))).sum())
        if labels is None:
            shares = (numbers + self._more) / max(self.documents, 1)
            own, weight = self._chance(numbers), shares * times
        else:
            found, counts = np.unique(labels.indices, return_counts=True)
            own, weight = self._chance(self._counts.of(found)), counts / max(labels.shape[0], 1)
        return total + float((weight * (np.log1p(-own) - np.log(own))).sum())

    def _chance(self, counts: np.ndarray) -> np.ndarray:
        # Without the half an unseen label would cost infinity.
        return np.asarray((counts + self._more + 0.5) / (self.documents + 1))

    def told(self, labels: csr_matrix | None = None) -> str:
        """Say the same in words, to be shown after a loss."""
        return f"frequencies alone: {self.loss(labels):.1f}"
