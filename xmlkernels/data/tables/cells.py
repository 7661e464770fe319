"""What stands in a cell: a text, or labels as strings, ids, lists, or lists in a string."""

from __future__ import annotations

import ast
import csv
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from xmlkernels.data.tables.corpora import URI, subjects_of
from xmlkernels.errors import InputError
from xmlkernels.files import quote

_IDS = re.compile(r"\d+( +\d+)*")
_URIS = re.compile(r"(<[^<>\s]+>\s*)+")
_HALF = re.compile("[\ud800-\udfff]")
# Of cells: the share that must hold a divider before it is taken for one.
_SHARE = 0.05


def text_of(value: Any, where: str, column: str) -> str:
    """Return the text of a cell; a list of strings is joined by spaces, nothing is an empty text.

    Raises:
        InputError: it holds something else.
    """
    if isinstance(value, str):
        return _whole(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return _whole(" ".join(value))
    got = f"{_kind(value)}: {quote(str(value))}"
    mend = "write it as a text, or name the columns of the text with --text"
    raise InputError(where, f"a text in column {column!r}", got, mend)


def labels_of(value: Any, divider: str | None, where: str, column: str) -> list[str]:
    """Return the labels of a cell.

    Args:
        value: a string, a number, a list of them, objects with a uri or label, or nothing.
        divider: what divides the labels of a string; None or "": it is one label, unless it is a
            list in JSON or Python, or URIs in angle brackets.
        where: of the cell, for messages.
        column: its name.

    Raises:
        InputError: it holds something else.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, str):
        return _of_string(_whole(value).strip(), divider, where, column)
    if isinstance(value, bool | int):
        return [str(value)]
    if isinstance(value, float) and value.is_integer():
        return [str(int(value))]  # whole numbers beside empty cells, as pandas writes them
    if isinstance(value, dict):
        return [_whole(subjects_of(value, where))]
    if isinstance(value, list | tuple):
        # A list says itself where a label ends.
        return [label for one in value for label in labels_of(one, "", where, column)]
    got = f"{_kind(value)}: {quote(str(value))}"
    mend = "write it as a text, or name the columns of the labels with --labels"
    raise InputError(where, f"labels in column {column!r}", got, mend)


def _whole(text: str) -> str:
    """Return a text with U+FFFD for half a character, which an escape of JSON may have made."""
    if text.isascii() or not _HALF.search(text):
        return text
    return _HALF.sub("\ufffd", text)


def _of_string(cell: str, divider: str | None, where: str, column: str) -> list[str]:
    if not cell:
        return []
    if cell[0] == "[" and cell[-1] == "]" and (found := _listed(cell)) is not None:
        return labels_of(found, "", where, column)
    if cell[0] == "<" and _URIS.fullmatch(cell):
        return URI.findall(cell)
    if divider:
        return [plain for part in _divided(cell, divider) if (plain := part.strip())]
    return [cell]


def _divided(cell: str, divider: str) -> list[str]:
    """Divide a cell; quotation marks around a label, as in CSV, hold its dividers together."""
    if divider == " ":
        return cell.split()
    if '"' not in cell or cell.count('"') % 2 or len(divider) > 1:
        return cell.split(divider)
    return next(csv.reader([cell], delimiter=divider, skipinitialspace=True), [])


def _listed(cell: str) -> list[Any] | None:
    """Parse a list in JSON, or as Python prints one (pandas writes such cells)."""
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    return found if isinstance(found, list) else None


def find_divider(values: Iterable[Any]) -> str | None:
    """Find what divides the labels of string cells; None where each seems to be one label.

    Names hardly hold ; and |. A comma divides where its parts come again as labels do: there are no
    more different parts than different cells. Those in "Doe, John" make more.
    """
    cells = [value.strip() for value in values if isinstance(value, str) and value.strip()]
    cells = [cell for cell in cells if cell[0] not in "[<"]
    if not cells:
        return None
    if any(" " in cell for cell in cells) and all(map(_IDS.fullmatch, cells)):
        return " "
    for divider in (";", "|", "\t", ","):
        if sum(divider in cell for cell in cells) < max(1, _SHARE * len(cells)):
            continue
        parts = {part.strip() for cell in cells for part in _divided(cell, divider)}
        if divider != "," or len(parts) <= len(set(cells)):
            return divider
    return None


def _kind(value: Any) -> str:
    names = {
        "int": "a number", "float": "a number", "bool": "true or false", "dict": "an object",
        "list": "a list", "bytes": "bytes", "datetime": "a time", "date": "a date",
    }  # fmt: skip
    return names.get(type(value).__name__, type(value).__name__)
