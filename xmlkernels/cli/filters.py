"""What xmlkernels predict must not predict: pairs of --filter, labels of --allow and --exclude."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xmlkernels import InputError
from xmlkernels.data.formats import iter_lines, read_filter_pairs
from xmlkernels.predict.base import Label, TextPredictor
from xmlkernels.topk import candidates_needed, drop_filtered


def read_labels(path: str, predictor: TextPredictor) -> list[int]:
    """Read a file of one label per line, by name or number.

    A line that is a label's name means that label; any other is a number, from 0. Empty lines are
    left out.

    Raises:
        InputError: a line that is neither, or a file without a label.
    """
    found: list[int] = []
    for number, line in enumerate(iter_lines(path), 1):
        word = line.strip()
        if not word:
            continue
        named = predictor.numbers.find(line) or predictor.numbers.find(word)
        if not named and word.isascii() and word.isdecimal() and int(word) < predictor.labels:
            named = [int(word)]
        if not named:
            expected = f"a label's name, or a number from 0 to {predictor.labels - 1}"
            mend = "write one label of this model per line"
            raise InputError(f"{path}:{number}", expected, repr(word[:40]), mend)
        found += named
    if not found:
        raise InputError(path, "one label per line", "no label", "leave the flag out")
    return found


@dataclass
class Barred:
    """The pairs of a file.

    Attributes:
        name: the file.
        pairs: int64 [n, 2] of (text, label), sorted.
        labels: L of the model.
    """

    name: str
    pairs: np.ndarray
    labels: int

    @classmethod
    def read(cls, path: str, labels: int) -> "Barred":
        """Read a file; without one there are no pairs.

        Raises:
            InputError: a line holds no pair, or a label that the model does not have.
        """
        if not path:
            return cls(path, np.zeros((0, 2), np.int64), labels)
        return cls(path, np.unique(read_filter_pairs(path, labels=labels), axis=0), labels)

    def needed(self, k: int) -> int:
        """Return how many labels per text leave k when its pairs are removed."""
        return candidates_needed(k, self.pairs, self.labels)

    def _of(self, text: int) -> set[int]:
        first, last = np.searchsorted(self.pairs[:, 0], [text, text + 1])
        return set(self.pairs[first:last, 1].tolist())

    def _check(self, texts: int) -> None:
        """Check that no pair names a text beyond the last: the file would be of other texts."""
        if len(self.pairs) and self.pairs[-1, 0] >= texts:
            got, mend = str(self.pairs[-1, 0]), "name the file that belongs to these texts"
            raise InputError(
                self.name, f"texts from 0 to {texts - 1}, as there are {texts}", got, mend
            )

    def kept(self, answers: Iterator[Sequence[Label]], k: int) -> Iterator[list[Label]]:
        """Yield the k best labels of each text that no pair bars."""
        count = 0
        for count, labels in enumerate(answers, 1):
            barred = self._of(count - 1)
            yield [label for label in labels if label.id not in barred][:k]
        self._check(count)

    def kept_arrays(
        self, values: np.ndarray, rows: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Do the same with logits [N, K] and labels [N, K]; -inf and -1 where fewer are left."""
        self._check(len(rows))
        rows, values = drop_filtered(rows, values, self.pairs, k, num_labels=self.labels)
        return values, rows
