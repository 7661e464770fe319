"""The corpora of fastText and of Annif: a document per line, or a document per file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xmlkernels.data.tables.streams import lines_of, open_text
from xmlkernels.errors import InputError
from xmlkernels.files import at_line, quote

Lines = Iterator[tuple[int, str]]
LABEL_PREFIX = "__label__"
URI = re.compile(r"<([^<>\s]+)>")
_URIS = re.compile(r"\s*(<[^<>\s]+>\s*)+")
_SUBJECTS = (".key", ".tsv")


def fasttext_rows(lines: Lines, wanted: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
    """Read lines `__label__a __label__b the text`; labels may be anywhere in a line."""
    for number, line in lines:
        words = line.split()
        marked = [word.removeprefix(LABEL_PREFIX) for word in words if _marked(word)]
        text = " ".join(word for word in words if not _marked(word))
        found = {"text": text, "labels": [label for label in marked if label]}
        yield number, [found[name] for name in wanted]


def _marked(word: str) -> bool:
    return word.startswith(LABEL_PREFIX)


def is_annif(line: str) -> bool:
    """Return whether a line is a text, a tab, and URIs in angle brackets."""
    _, tab, uris = line.rstrip("\r\n").rpartition("\t")
    return bool(tab) and _URIS.fullmatch(uris) is not None


def annif_rows(path: Path, lines: Lines, wanted: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
    """Read lines `text⇥<uri> <uri>`; tabs before the last are part of the text.

    Raises:
        InputError: a line without a tab, or with something else than URIs behind it.
    """
    for number, line in lines:
        text, tab, uris = line.rpartition("\t")
        if not tab or (uris.strip() and not _URIS.fullmatch(uris)):
            mend = "write the URIs in angle brackets behind a tab, or say --format tsv"
            expected = "a text, a tab and <uri> <uri> …"
            raise InputError(at_line(path, number), expected, quote(line), mend)
        found = {"text": text, "subjects": URI.findall(uris)}
        yield number, [found[name] for name in wanted]


def is_annif_folder(folder: Path) -> bool:
    """Return whether a folder holds a .txt per document and a .key or .tsv of subjects beside."""
    texts = {path.stem for path in folder.glob("*.txt")}
    keys = {path.stem for path in folder.iterdir() if path.suffix in _SUBJECTS}
    return bool(texts & keys)


def annif_documents(
    folder: Path, encoding: str, *, repair: bool
) -> Iterator[tuple[str, str, list[str]]]:
    """Read a folder of .txt files: the file, its text, its subjects.

    `.tsv` holds `<uri>⇥label` per line, `.key` a label per line. A text without either file has no
    subject.

    Raises:
        InputError: names the file that cannot be read.
    """
    for path in sorted(folder.glob("*.txt")):
        with open_text(path, encoding, repair=repair) as file:
            text = " ".join(file.read().split())
        subjects: list[str] = []
        for beside in (path.with_suffix(suffix) for suffix in reversed(_SUBJECTS)):
            if beside.is_file() and beside.stat().st_size:
                rows = lines_of(beside, encoding, repair=repair)
                subjects = [_subject(line) for _, line in rows if line.strip()]
                break
        yield str(path), text, subjects


def _subject(line: str) -> str:
    first = line.partition("\t")[0].strip()
    uri = URI.fullmatch(first)
    return uri[1] if uri else first


def subjects_of(value: dict[str, Any], where: str) -> str:
    """Return what stands for a subject that is an object: its URI, or else its label.

    Raises:
        InputError: the object has none of the usual keys.
    """
    for key in ("uri", "id", "label", "name", "notation", "text"):
        if isinstance(found := value.get(key), str | int):
            return str(found)
    expected = "an object with uri, id, label or name for each label"
    raise InputError(where, expected, quote(json.dumps(value, default=str)), "name it so")
