"""Which labels a text may be given: an allow-list, exclusions, or both, of all texts or of each.

Letters: L labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain
from typing import Any

import numpy as np

from xmlkernels.errors import InputError

# One list for all texts, or a list or None for each; a label is its number or its name.
Labels = Iterable[int | str]
Given = Labels | Iterable[Labels | None] | None

_NONE = np.zeros(0, np.int64)
_KEPT = 256  # lists that were seen last, so that texts with equal ones are scored together
_LISTED = 20_000  # names that are looked through for one like a name that is not there


@dataclass(frozen=True, eq=False)
class Limit:
    """The labels that one text may have.

    Attributes:
        allow: int64, ascending: these alone, and each is scored; None: all but `exclude`.
        exclude: int64, ascending; empty where there is an allow-list.
    """

    allow: np.ndarray | None = None
    exclude: np.ndarray = field(default_factory=lambda: _NONE)

    def allowed(self, labels: int) -> np.ndarray:
        """List the labels of `labels` that it allows, int64, ascending."""
        if self.allow is not None:
            return self.allow
        return np.setdiff1d(np.arange(labels), self.exclude, assume_unique=True)

    def count(self, labels: int) -> int:
        """Count what `allowed` lists."""
        return labels - len(self.exclude) if self.allow is None else len(self.allow)

    def spelled_out(self, labels: int) -> Limit:
        """Return the same as an allow-list, of which every label is scored."""
        return self if self.allow is not None else Limit(self.allowed(labels))


FREE = Limit()


class LabelNumbers:
    """The numbers of labels that a caller names.

    Args:
        labels: L.
        names: L names, or None.
    """

    def __init__(self, labels: int, names: Sequence[str] | None) -> None:
        self.labels, self.names = labels, names
        self._numbers: dict[str, int | list[int]] | None = None

    def of(self, given: Labels, where: str) -> np.ndarray:
        """Return the numbers of a list: int64, ascending, each once.

        A name that several labels have means all of them.

        Raises:
            InputError: no list, or a label that the model does not have.
        """
        if isinstance(given, str | bytes) or not isinstance(given, Iterable):
            mend = f"write [{given!r}]"
            raise InputError(where, "a list of labels", repr(given), mend)
        if isinstance(given, np.ndarray) and given.ndim == 1 and given.dtype.kind in "iu":
            return self._checked(np.unique(given.astype(np.int64)), where)
        found: list[int] = []
        for label in given:
            if isinstance(label, str):
                found += self._named(label, where)
            elif isinstance(label, int | np.integer) and not isinstance(label, bool):
                found.append(int(label))
            else:
                mend = "give numbers (int) or names (str)"
                raise InputError(where, "a label's number or name", repr(label), mend)
        if found and not -1 < min(found) <= max(found) < self.labels:
            found = [x for x in found if not 0 <= x < self.labels][:1]
            raise self._beyond(found[0], where)
        return np.unique(np.array(found, np.int64))

    def _checked(self, numbers: np.ndarray, where: str) -> np.ndarray:
        if len(numbers) and not 0 <= numbers[0] <= numbers[-1] < self.labels:
            raise self._beyond(int(numbers[0] if numbers[0] < 0 else numbers[-1]), where)
        return numbers

    def _beyond(self, number: int, where: str) -> InputError:
        expected = f"labels from 0 to {self.labels - 1}"
        return InputError(where, expected, str(number), "take the label out of the list")

    def _named(self, name: str, where: str) -> list[int]:
        if self.names is None:
            mend = "give the labels' numbers"
            raise InputError(where, "numbers, as this model has no names", repr(name), mend)
        found = self.find(name)
        if not found:
            near = get_close_matches(name, self.names[:_LISTED], 1)
            mend = f"did you mean {near[0]!r}?" if near else "take it out of the list"
            raise InputError(where, "names that the model has", repr(name), mend)
        return found

    def find(self, name: str) -> list[int]:
        """Return the numbers of the labels that have this name."""
        if self._numbers is None:
            # Whole before it is seen: several threads may ask at once.
            numbers: dict[str, int | list[int]] = {}
            for number, own in enumerate(self.names or ()):
                if own not in numbers:
                    numbers[own] = number
                else:
                    before = numbers[own]
                    numbers[own] = [*([before] if isinstance(before, int) else before), number]
            self._numbers = numbers
        found = self._numbers.get(name, [])
        return [found] if isinstance(found, int) else found


class Limits:
    """The limits of texts, one after the other.

    Args:
        numbers: of the model's labels.
        allow: labels that may be given, one list for all texts or one (or None) for each.
        exclude: labels that are never given; likewise.

    Raises:
        InputError: no such labels, or an allow-list without any.

    Attributes:
        same: the limit of every text; None where each has its own.
    """

    def __init__(self, numbers: LabelNumbers, allow: Given, exclude: Given) -> None:
        self._numbers = numbers
        self._allow, self._exclude = _each(allow, "allow"), _each(exclude, "exclude")
        self._seen: dict[tuple[bytes, ...], Limit] = {}
        self._texts = 0
        self.same: Limit | None = None
        whole: Any = allow, exclude
        if self._allow is None and self._exclude is None:
            self.same = self._limit(whole[0], whole[1], "")
        self._common = whole

    def following(self) -> Limit:
        """Return the limit of the next text.

        Raises:
            InputError: there are fewer lists than texts, or a list cannot be used.
        """
        if self.same is not None:
            return self.same
        number = self._texts
        self._texts += 1
        allow = self._of(self._allow, self._common[0], number, "allow")
        exclude = self._of(self._exclude, self._common[1], number, "exclude")
        return self._limit(allow, exclude, f", text {number}")

    def _of(self, each: Iterator[Any] | None, common: Any, number: int, name: str) -> Any:
        if each is None:
            return common
        try:
            return next(each)
        except StopIteration:
            mend = "give a list, or None, for each text"
            got = f"{number} lists and more texts"
            raise InputError(name, "one list per text", got, mend) from None

    def taking(self, texts: Iterable[Any], into: dict[int, Limit]) -> Iterator[Any]:
        """Yield texts, and note the limit of each under its number.

        Raises:
            InputError: there are more lists than texts.
        """
        for number, text in enumerate(texts):
            into[number] = self.following()
            yield text
        for name, each in (("allow", self._allow), ("exclude", self._exclude)):
            if each is not None and next(each, self) is not self:
                mend = "give a list, or None, for each text"
                got = f"more than the {self._texts} texts"
                raise InputError(name, "one list per text", got, mend)

    def _limit(self, allow: Labels | None, exclude: Labels | None, where: str) -> Limit:
        barred = _NONE if exclude is None else self._numbers.of(exclude, f"exclude{where}")
        if allow is None:
            key: tuple[bytes, ...] = (barred.tobytes(),)
            made = Limit(None, barred) if len(barred) else FREE
        else:
            only = self._numbers.of(allow, f"allow{where}")
            if not len(only):
                mend = "leave it out where every label is allowed"
                raise InputError(f"allow{where}", "at least one label", "none", mend)
            only = np.setdiff1d(only, barred, assume_unique=True)
            made, key = Limit(only), (b"", only.tobytes())
        if len(self._seen) > _KEPT:
            self._seen.clear()
        return self._seen.setdefault(key, made)


def _each(given: Given, name: str) -> Iterator[Any] | None:
    """Return the lists, where there is one for each text; None where there is one for all."""
    if given is None or isinstance(given, set | frozenset | str | bytes | int):
        return None
    if isinstance(given, np.ndarray):
        return None if given.ndim == 1 and given.dtype != object else iter(given)
    if isinstance(given, Iterator):
        return given  # endless ones of lists; a list of labels is a list
    try:
        first = next(iter(given), None)
    except TypeError:
        mend = "give numbers or names"
        raise InputError(name, "a list of labels", repr(given), mend) from None
    if first is None and not any(True for _ in given):
        return None
    return None if isinstance(first, int | str | np.integer) else chain(given)
