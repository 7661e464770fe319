"""Words and phrases of a text, in any script: the columns of TF-IDF.

Letters with their marks are one word, as vowel signs of Devanagari or an accent that stands alone.
Scripts that write no spaces have no words to split at: of their runs, groups of neighbouring
characters are taken, one and two of Chinese and Japanese, two and three of the alphabets of Thai,
Lao, Khmer and Burmese (as the analysers of search engines do; McNamee and Mayfield, "Character
N-Gram Tokenization for European Language Text Retrieval", 2004).
"""

import re
import unicodedata
from collections.abc import Iterator
from itertools import chain, groupby

VERSION = 2  # of what a text becomes
# Written without spaces: from, to; ideographs and kana first.
_IDEOGRAPHS = (
    (0x3005, 0x3007), (0x3041, 0x309F), (0x30A1, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF),
)  # fmt: skip
_ALPHABETS = (
    (0x0E01, 0x0E3A), (0x0E40, 0x0E4E), (0x0E81, 0x0ECE), (0x0EDC, 0x0EDF), (0x1000, 0x103F),
    (0x1050, 0x108F), (0x1780, 0x17D3), (0xA9E0, 0xA9EF), (0xA9FA, 0xA9FE), (0xAA60, 0xAA7F),
)  # fmt: skip


def _inside(ranges: tuple[tuple[int, int], ...]) -> str:
    """Return the inside of a regular expression's brackets."""
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


def _marks() -> tuple[tuple[int, int], ...]:
    """Return the ranges of the characters that belong to the letter before them."""
    every = range(0x300, 0x1F000)  # the marks beyond choose a picture of a character
    found = [code for code in every if unicodedata.category(chr(code))[0] == "M"]
    runs = groupby(enumerate(found), lambda pair: pair[1] - pair[0])
    together = [[code for _, code in run] for _, run in runs]
    return tuple((run[0], run[-1]) for run in together)


_MARK = _inside(_marks())
_PLAIN = re.compile(r"\w+")  # of ASCII: quicker
_WORD = re.compile(rf"[\w{_MARK}]+")
_UNSPACED = re.compile(f"[{_inside(_IDEOGRAPHS + _ALPHABETS)}]")
_RUN = re.compile(
    f"(?P<ideographs>[{_inside(_IDEOGRAPHS)}]+)|(?P<alphabet>[{_inside(_ALPHABETS)}]+)"
)
_LETTER = re.compile(rf".[{_MARK}]*", re.DOTALL)
_GROUPS = {"ideographs": (1, 2), "alphabet": (2, 3)}  # characters of the shortest and longest group

PART = "\x1f"  # the unit separator of ASCII, between parts of a text that are kept apart


class Terms:
    """What a text is counted by.

    Where PART divides a text, each term of a part before the last is one more term, of that part
    alone: a word of the title and the same word of the abstract differ, and have one in common.

    Case and forms of one character (NFKC: full-width letters, ligatures, composed accents) make no
    difference.

    Args:
        longest: words of the longest phrase; groups of characters grow as much.
        underscores: `snake_case` is one word; False makes it two.
    """

    def __init__(self, longest: int = 1, *, underscores: bool = True) -> None:
        self.longest, self.underscores = longest, underscores

    def __call__(self, text: str) -> list[str]:
        """Return the terms of a text, as often as they occur."""
        if PART in text:
            *parts, last = (self(part) for part in text.split(PART))
            own = [f"{n}{PART}{term}" for n, part in enumerate(parts) for term in part]
            return [*chain(*parts), *last, *own]
        text = text.lower()
        if not self.underscores:
            text = text.replace("_", " ")
        if text.isascii():
            return self._phrases(_PLAIN.findall(text))
        if not unicodedata.is_normalized("NFKC", text):
            text = unicodedata.normalize("NFKC", text)
        if _UNSPACED.search(text) is None:
            return self._phrases(_WORD.findall(text))
        found: list[str] = []
        words: list[str] = []
        for part, kind in _parts(text):
            if kind is None:
                words.append(part)
                continue
            found += self._phrases(words)  # none across a run
            words = []
            shortest, longest = _GROUPS[kind]
            letters = _LETTER.findall(part)
            longest += self.longest - 1
            for size in range(min(shortest, len(letters)), min(longest, len(letters)) + 1):
                found += _joined(letters, size, "")
        return found + self._phrases(words)

    def _phrases(self, words: list[str]) -> list[str]:
        found = words
        for size in range(2, self.longest + 1):
            found = found + _joined(words, size, " ")
        return found


def count_words(text: str) -> int:
    """Count the words of a text: between spaces, and each character of scripts without them."""
    count = len(text.split())
    if text.isascii():
        return count
    return sum(
        1 if kind is None else len(_LETTER.findall(part))
        for word in text.split()
        for part, kind in (_parts(word) if _UNSPACED.search(word) else [(word, None)])
    )


def has_spaces(text: str) -> bool:
    """Return whether a text is in a script that writes words apart."""
    return text.isascii() or _UNSPACED.search(text) is None


def _parts(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield words, with None, and runs of scripts without spaces, with the kind of their script."""
    at = 0
    for run in _RUN.finditer(text):
        yield from ((word, None) for word in _WORD.findall(text[at : run.start()]))
        yield run.group(), run.lastgroup
        at = run.end()
    yield from ((word, None) for word in _WORD.findall(text[at:]))


def _joined(parts: list[str], size: int, between: str) -> list[str]:
    """Join every `size` neighbours."""
    return list(map(between.join, zip(*(parts[at:] for at in range(size)))))  # noqa: B905
