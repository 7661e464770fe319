"""Texts, one per line, and AttentionXML's string labels."""

from __future__ import annotations

import io
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.errors import InputError
from xmlkernels.file_kinds import HEAD, check_documents
from xmlkernels.files import (
    DataWarning,
    PathLike,
    at_line,
    empty_file,
    open_bytes,
    quote,
    replacing,
    share_read,
)
from xmlkernels.ticks import Ticks

log = logging.getLogger(__name__)

LONGEST_LINE = 1 << 24
"""Characters of a line at most: of a file without line ends one line would be all of it."""
SEPARATOR = "/SEP/"
Divider = Literal["tab", "comma", "space"]
DIVIDERS: dict[Divider, str] = {"tab": "\t", "comma": ",", "space": " "}
T = TypeVar("T")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Utf8Repairs:
    """Replace what is not Unicode text by U+FFFD; count the lines and warn once per file."""

    def __init__(self, path: PathLike) -> None:
        self.path, self.lines, self.first, self._last = os.fspath(path), 0, 0, 0

    def mend(self, text: str, line: int) -> str:
        """Clean text decoded with surrogateescape: one U+FFFD for each broken sequence."""
        if text.isascii() or not _SURROGATE.search(text):
            return text
        self._count(line)
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def mend_escapes(self, text: str, line: int) -> str:
        r"""Clean text from JSON, where an escape such as \ud800 may have made half a character."""
        if text.isascii() or not _SURROGATE.search(text):
            return text
        self._count(line)
        return _SURROGATE.sub("\ufffd", text)

    def _count(self, line: int) -> None:
        self.lines += line != self._last
        self.first, self._last = self.first or line, line

    def tell(self) -> None:
        """Warn of the lines that were changed, if any."""
        if self.lines:
            warnings.warn(
                f"{at_line(self.path, self.first)}: not UTF-8; broken characters replaced by "
                f"U+FFFD in {self.lines} "
                f"line{'s' if self.lines > 1 else ''} of this file (the first is line "
                f"{self.first})",
                DataWarning,
                stacklevel=3,
            )


def line_too_long(where: str) -> InputError:
    """Make the error for a line beyond `LONGEST_LINE`."""
    got = "a longer one"
    return InputError(
        where,
        f"a line of at most {LONGEST_LINE:,} characters",
        got,
        "write one text a line, or cut it",
    )


def numbered_lines(
    path: PathLike, repairs: Utf8Repairs, *, documents: bool = False
) -> Iterator[tuple[int, str]]:
    r"""Stream (line number from 1, text without line end); plain, .gz, .bz2 or .xz.

    Lines end with \n, \r\n or \r and nothing else: U+2028, \x0b, \x0c, \x85 stay inside a
    text, where Python's splitlines would break it in two and shift every row behind it.
    """
    with open_bytes(path) as file:
        if documents:
            check_documents(path, file.peek(HEAD))
        with io.TextIOWrapper(
            file, encoding="utf-8-sig", errors="surrogateescape", newline=None
        ) as lines:
            number = 0
            for number, read in enumerate(iter(lambda: lines.readline(LONGEST_LINE + 1), ""), 1):
                line = read.removesuffix("\n")
                if len(line) > LONGEST_LINE:
                    raise line_too_long(at_line(path, number))
                yield number, repairs.mend(line, number)
            if number == 0:
                raise empty_file(path)


def iter_lines(path: PathLike, *, documents: bool = False) -> Iterator[str]:
    r"""Stream a file of one text per line (`trn_X.txt`), plain or packed, in constant memory.

    Packed files are .gz, .bz2 or .xz.

    UTF-8, with or without a byte order mark. Lines end with \n, \r\n or \r only. An empty line
    is an empty text: row numbers always agree with the label file. Broken UTF-8 is replaced by
    U+FFFD and reported once, by a DataWarning that names the first line and the number of lines.

    Args:
        documents: whether the lines are documents or label texts: a table, JSON or a matrix is then
            refused, whose labels would be read as words.

    Raises:
        InputError: missing or empty file, no text (`kinds.check_text`), an archive cut short or
            damaged.
    """
    repairs = Utf8Repairs(path)
    try:
        for _, line in numbered_lines(path, repairs, documents=documents):
            yield line
    finally:
        repairs.tell()


def read_lines(path: PathLike, *, documents: bool = False) -> list[str]:
    """Read the texts of `iter_lines` as a list, and tell how far it is now and then."""
    return list(counted(path, iter_lines(path, documents=documents)))


def counted(path: PathLike, rows: Iterable[T], unit: str = "lines") -> Iterator[T]:
    """Yield what is read of a file, and tell now and then how much of it was read."""
    name = os.path.basename(path)
    return Ticks(log, name, None, unit, share=lambda: share_read(path)).over(rows)


def write_lines(path: PathLike, texts: Sequence[str]) -> None:
    """Write one text a line (label names, a label mapping); the file appears whole or not at all.

    Raises:
        InputError: a text holds a line break (the rows behind it would shift), or the folder cannot
            be written.
    """
    for row, text in enumerate(texts):
        if "\n" in text or "\r" in text:
            raise InputError(
                f"text {row} for {os.fspath(path)}",
                "one line",
                quote(text),
                "replace its line breaks",
            )
    with replacing(path) as file:
        file.writelines((text + "\n").encode("utf-8") for text in texts)


def split_title(text: str) -> tuple[str, str]:
    """Split an AttentionXML raw text `title /SEP/ body`; without a separator all is body."""
    title, separator, body = text.partition(SEPARATOR)
    return (title.strip(), body.strip()) if separator else ("", text.strip())


def join_parts(text: str, joiner: str) -> str:
    """Put `joiner` in place of every `/SEP/` of a raw text; none next to an empty part."""
    return joiner.join(filter(None, map(str.strip, text.split(SEPARATOR))))


def without_separator(text: str, separator: str) -> str:
    """Return a text as people and bags of words read it: without a tokenizer's separator."""
    return text.replace(separator, " ") if separator.strip() else text


def read_raw_texts(
    path: PathLike, *, part: Literal["all", "title", "body"] = "all", joiner: str = " "
) -> list[str]:
    """Read `train_raw_texts.txt` of AttentionXML, one text per line.

    `/SEP/` is between title and body.

    Args:
        path: plain or packed; as `iter_lines`.
        part: what to keep. "title" of a text without separator is empty.
        joiner: what replaces the separator in "all", such as " " or the tokenizer's separator
            token.

    Raises:
        InputError: as `iter_lines`.
    """
    if part not in ("all", "title", "body"):
        raise InputError("part", "all, title or body", repr(part), "choose one of them")
    if part != "all":
        return [split_title(text)[part == "body"] for text in read_lines(path, documents=True)]
    texts = counted(path, iter_lines(path, documents=True))
    return [join_parts(text, joiner) for text in texts]


def label_divider(paths: Sequence[PathLike]) -> Divider:
    """Find what divides the label names of a line, in all files of one dataset's splits.

    A tab anywhere means tabs. Otherwise commas divide where at least half of the lines of several
    words hold one, as in "1,101" and "State aid, EU law"; else white space does, and a comma is
    part of a name.

    Raises:
        InputError: as `iter_lines`.
    """
    several = commas = 0
    for path in paths:
        for line in iter_lines(path):
            if "\t" in line.strip():
                return "tab"
            comma = "," in line.strip(" ,")
            commas += comma
            several += comma or " " in line.strip(" ")
    return "comma" if 2 * commas >= several > 0 else "space"


def read_label_strings(
    path: PathLike,
    *,
    duplicates: Literal["error", "merge"] = "error",
    divider: Divider | None = None,
) -> list[list[str]]:
    """Read `train_labels.txt` of AttentionXML: label names divided by tabs, commas or spaces.

    One document per line.

    Args:
        path: plain or packed; as `iter_lines`. A blank line has no labels.
        duplicates: whether a label that occurs twice in a row is an error or counts once.
        divider: what divides names; by default what `label_divider` sees in this file alone.

    Returns:
        the names of each row, in the order of the file, without the spaces around them.

    Raises:
        InputError: names file and line.
    """
    if duplicates not in ("error", "merge"):
        raise InputError("duplicates", "error or merge", repr(duplicates), "choose one of them")
    divider = label_divider([path]) if divider is None else divider
    if divider not in DIVIDERS:
        raise InputError("divider", "tab, comma or space", repr(divider), "choose one of them")
    rows = []
    for number, line in enumerate(iter_lines(path), 1):
        pieces = (
            line.replace("\t", " ").split(" ")
            if divider == "space"
            else line.split(DIVIDERS[divider])
        )
        names = [name for piece in pieces if (name := piece.strip(" \t"))]
        unique = list(dict.fromkeys(names))
        if len(unique) != len(names) and duplicates == "error":
            twice = next(name for name in unique if names.count(name) > 1)
            mend = "leave one out, or count it once with --merge-duplicates"
            raise InputError(
                at_line(path, number), "every label once in a row", f"{quote(twice)} twice", mend
            )
        rows.append(unique)
    return rows


@dataclass(frozen=True)
class EncodedLabels:
    """String labels as matrices over one mapping: label id = position in `names`."""

    # Sorted by code point: the same labels give the same ids everywhere; store with write_lines.
    names: list[str]
    # CSR float32 [rows, len(names)] of ones: train first, then the others as given.
    splits: list[csr_matrix]
    unseen: int  # distinct labels that train lacks


def encode_label_strings(
    train: Sequence[Sequence[str]],
    *others: Sequence[Sequence[str]],
    unseen: Literal["keep", "drop"] = "keep",
) -> EncodedLabels:
    """Give the string labels of train, test, … numbers by one mapping.

    Args:
        train: label names of each training row.
        others: the same for further splits.
        unseen: labels that train lacks. "keep": they have ids, so that recall and nDCG count what
            no model can find (as the published AttentionXML sets do); "drop": they go from the
            other splits. Either way a DataWarning says how many there are.

    Returns:
        mapping and matrices; names twice in a row count once.

    Raises:
        InputError: `unseen` is neither.
    """
    if unseen not in ("keep", "drop"):
        raise InputError("unseen", "keep or drop", repr(unseen), "choose one of them")
    known = {name for row in train for name in row}
    new = {name for rows in others for row in rows for name in row} - known
    if new:
        count = sum(name in new for rows in others for row in rows for name in row)
        what = "kept, though no training document has them" if unseen == "keep" else "dropped"
        warnings.warn(
            f"{len(new)} labels (in {count} places) do not occur in the training rows, the first "
            f"{quote(min(new))}; {what}",
            DataWarning,
            stacklevel=2,
        )
    names = sorted(known | new if unseen == "keep" else known)
    ids = {name: number for number, name in enumerate(names)}
    return EncodedLabels(names, [_encode(rows, ids) for rows in (train, *others)], len(new))


def _encode(rows: Sequence[Sequence[str]], ids: dict[str, int]) -> csr_matrix:
    encoded = [sorted({ids[name] for name in row if name in ids}) for row in rows]
    indptr = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in encoded], out=indptr[1:])
    indices = np.array([label for row in encoded for label in row], dtype=np.int64)
    return csr_matrix(
        (np.ones(len(indices), dtype=np.float32), indices, indptr), shape=(len(rows), len(ids))
    )
