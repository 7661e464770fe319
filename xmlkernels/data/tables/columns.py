"""Choose the columns of the text and of the labels: those given, or those of a usual name."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from xmlkernels.data.tables.options import Tables
from xmlkernels.errors import InputError

# In the order in which they are preferred.
TITLES = ("title", "headline", "titles")
TEXTS = (
    "text", "texts", "content", "contents", "body", "abstract", "document", "doc", "description",
    "full_text", "fulltext", "sentence", "summary", "article", "message", "question", "query",
    "utterance", "name",
)  # fmt: skip
LABELS = (
    "labels", "label", "tags", "tag", "subjects", "subject", "subject_uris", "subject_uri",
    "categories", "category", "topics", "topic", "classes", "class", "targets", "target",
    "target_ind", "keywords", "concepts", "descriptors", "codes", "genres", "genre", "intent", "y",
)  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """Columns by what they hold.

    Attributes:
        text: joined in this order.
        labels: whose labels are put together.
        split: that names the split; "" for none.
        found: whether a name was looked for rather than given.
    """

    text: tuple[str, ...]
    labels: tuple[str, ...]
    split: str
    found: bool

    @property
    def all(self) -> tuple[str, ...]:
        """Every column that is read."""
        split = (self.split,) if self.split else ()
        return (*self.text, *self.labels, *split)


def choose(columns: Sequence[str], tables: Tables, where: str) -> Chosen:
    """Choose among the columns of a table.

    Args:
        columns: their names.
        tables: the settings, with the names that are given.
        where: the file, for messages.

    Raises:
        InputError: a name that is given is none of them, or none has a usual name.
    """
    for option, names in (
        ("--text", tables.text),
        ("--labels", tables.labels),
        ("--split-column", (tables.split_column,) if tables.split_column else ()),
    ):
        for name in names:
            _check_given(option, name, columns, where)
    labels = tables.labels or _labels(columns, tables.text)
    if not labels:
        raise _none_of("labels", columns, LABELS, where)
    text = tables.text or _text([name for name in columns if name not in labels])
    if not text:
        raise _none_of("text", columns, TEXTS, where)
    return Chosen(text, labels, tables.split_column, not (tables.text and tables.labels))


def _check_given(option: str, name: str, columns: Sequence[str], where: str) -> None:
    if name in columns:
        return
    raise InputError(
        f"{option} {name}",
        f"a column of {where} ({_listed(columns)})",
        "none of that name",
        _nearest(name, columns),
    )


def _nearest(name: str, columns: Sequence[str]) -> str:
    lower = {column.lower(): column for column in columns}
    near = difflib.get_close_matches(name.lower(), lower, 1, 0.5)
    return f"did you mean {_typed(lower[near[0]])}?" if near else "name one of these"


def _typed(name: str) -> str:
    """Return a column as a shell takes it."""
    return shlex.quote(name)


def _plain(name: str) -> str:
    return "_".join(re.findall(r"\w+", re.sub(r"\((s|es)\)", r"\1", name.lower())))


def _first(columns: Sequence[str], usual: Sequence[str]) -> str | None:
    by_name = {_plain(column): column for column in reversed(columns)}
    return next((by_name[name] for name in usual if name in by_name), None)


def _text(columns: Sequence[str]) -> tuple[str, ...]:
    body, title = _first(columns, TEXTS), _first(columns, TITLES)
    if title is None or (body is not None and _plain(body) in ("text", "texts")):
        return () if body is None else (body,)
    return (title,) if body is None or _plain(body) == "name" else (title, body)


def _labels(columns: Sequence[str], text: Sequence[str]) -> tuple[str, ...]:
    found = _first([name for name in columns if name not in text], LABELS)
    return () if found is None else (found,)


def _none_of(what: str, columns: Sequence[str], usual: Sequence[str], where: str) -> InputError:
    flag = f"--{what}"
    likeness = [
        max(difflib.SequenceMatcher(None, _plain(column), name).ratio() for name in usual)
        for column in columns
    ]
    near = max(likeness, default=0) >= 0.8
    nearest = _typed(columns[likeness.index(max(likeness))]) if near else "COLUMN"
    mend = f"name it with {flag} {nearest}"
    if not near:
        mend += ", or the columns of a file without a line of names with --columns"
    expected = f"a column of {'the text' if what == 'text' else 'labels'}"
    expected += f" with a usual name ({', '.join(usual[:5])}, …)"
    return InputError(where, expected, f"the columns {_listed(columns)}", mend)


def _listed(columns: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in columns[:12])
    return shown + (f" and {len(columns) - 12} more" if len(columns) > 12 else "")
