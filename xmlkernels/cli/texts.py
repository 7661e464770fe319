"""Read the texts to label, one by one: from a flag, a file or standard input."""

import io
import json
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import IO, Any

from xmlkernels import InputError
from xmlkernels.data.formats import iter_lines
from xmlkernels.data.formats.text_lines import LONGEST_LINE, line_too_long
from xmlkernels.data.text_parts import TextParts
from xmlkernels.file_kinds import check_documents, check_text, is_json_lines, unpacked
from xmlkernels.files import DataWarning

# Keys of a document's own name in a JSON object; the first one found counts.
_IDS = ("id", "uid", "_id")
Id = str | int | None


@dataclass
class Texts:
    """The text of --text, or those of --input.

    Attributes:
        text: the text of --text; None where there is a file.
        path: the file; "-" is standard input.
        parts: how title and body were joined for the model.
        ids: the names, in order, of texts that were read and not yet answered; None for a text
            without a name.
    """

    text: str | None
    path: str | None
    parts: TextParts
    ids: deque[Id] = field(default_factory=deque)

    def __iter__(self) -> Iterator[str]:
        for text, own in self._read():
            self.ids.append(own)
            yield text

    def _read(self) -> Iterator[tuple[str, Id]]:
        if self.text is None and is_json_lines(str(self.path)):
            yield from json_texts(str(self.path), self.parts)
            return
        lines = iter([self.text]) if self.text is not None else _lines(str(self.path))
        for line in lines:
            yield self.parts.of_line(line), None


def _lines(path: str) -> Iterator[str]:
    return lines_of(sys.stdin.buffer) if path == "-" else iter_lines(path, documents=True)


def paired(texts: Texts, words: Texts) -> Iterator[tuple[str, str]]:
    """Yield both together; InputError where one has more than the other."""
    for number, (text, word) in enumerate(zip_longest(texts, words)):
        if text is None or word is None:
            got = "fewer" if word is None else "more"
            mend = "name the same documents' texts"
            raise InputError(
                str(words.path), "as many texts as --input has", f"{got} (text {number})", mend
            )
        yield text, word


def json_texts(path: str, parts: TextParts) -> Iterator[tuple[str, Id]]:
    """Yield text and id of each line of a JSON lines file; blank lines may end it."""
    blank = 0
    for number, line in enumerate(iter_lines(path), 1):
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            raise InputError(
                f"{path}:{blank}", "a JSON string or object", "a blank line", "take the line out"
            )
        yield text_of(line, f"{path}:{number}", parts)


def text_of(line: str, where: str, parts: TextParts) -> tuple[str, Id]:
    """Return text and id of a JSON string, or of an object with "text" or "title" and "content".

    Where the texts of the training table were kept apart, its columns are keys, too.

    Raises:
        InputError: no JSON, or none of these keys.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        got = f"{line[:40]!r} ({getattr(error, 'msg', type(error).__name__)})"
        mend = "write one JSON value per line (from one list: `jq -c '.[]' FILE`)"
        raise InputError(where, "a JSON string or object", got, mend) from None
    if isinstance(value, str):
        return value, None
    known = value if isinstance(value, dict) else {}
    own = {key: known[key] for key in parts.columns if isinstance(known.get(key), str)}
    if own:  # the columns of the training table
        return parts.of_record(own, where), _id_of(known)
    found = {
        key: known[key] for key in ("text", "title", "content") if isinstance(known.get(key), str)
    }
    if not found:
        empty = next((key for key in ("text", "title", "content") if key in known), None)
        if empty is not None:
            got = f"{json.dumps(known[empty])[:40]}"
            mend = 'write "" for an empty text, or leave the line out'
            raise InputError(where, f'a text in "{empty}"', got, mend)
        expected = 'a string, or an object with "text" or "title"'
        raise InputError(where, expected, line[:40], "rename the key of the text")
    joined = parts.join(found.get("title", ""), found.get("content", ""))
    text = " ".join(found.values()) if "text" in found else joined
    return text, _id_of(known)


def _id_of(record: dict[str, Any]) -> Id:
    """Return the name of a record, with lone surrogates replaced: UTF-8 cannot hold them."""
    for key in _IDS:
        if isinstance(own := record.get(key), str):
            return own.encode("utf-8", "replace").decode()
        if isinstance(own, int) and not isinstance(own, bool):
            return own
    return None


def lines_of(stream: IO[bytes]) -> Iterator[str]:
    """Yield lines as soon as they arrive.

    Broken UTF-8 becomes U+FFFD; one warning at the end says in how many lines.

    Raises:
        InputError: the stream does not begin as a text does.
    """
    broken = first = 0
    if isinstance(stream, io.BufferedReader):
        check_stream(stream)
    try:
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE + 2), b""), 1):
            if len(line.rstrip(b"\r\n")) > LONGEST_LINE:
                raise line_too_long(f"standard input:{number}")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                text = line.decode("utf-8", errors="replace")
                broken, first = broken + 1, first or number
            yield text.rstrip("\r\n")
    finally:
        if broken:
            lines = "1 line" if broken == 1 else f"{broken} lines"
            told = f"standard input: broken UTF-8 replaced in {lines} (first: line {first})"
            warnings.warn(told, DataWarning, 2)


def check_stream(stream: io.BufferedReader) -> None:
    """Refuse standard input that is packed, binary, or more than one text per line."""
    head = stream.peek(1)
    if unpacked(stream) is not stream:
        mend = "unpack it on the way: `zcat FILE | …`, bzcat or xzcat"
        raise InputError("standard input", "one text per line", "a packed file", mend)
    check_text("standard input", head)
    check_documents("standard input", head)
