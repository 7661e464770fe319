"""Read one table: its columns at once, its rows as they are asked for.

A row is its number (the line in a file of text) and the values of the wanted columns.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from xmlkernels.data.formats.text_lines import LONGEST_LINE, line_too_long
from xmlkernels.data.tables.corpora import LABEL_PREFIX, annif_rows, fasttext_rows, is_annif
from xmlkernels.data.tables.options import Kind, Tables
from xmlkernels.data.tables.streams import beginning, lines_of, open_text, suffix_of
from xmlkernels.errors import InputError
from xmlkernels.files import at_line, quote

Rows = Iterator[tuple[int, list[Any]]]
BY_SUFFIX: dict[str, Kind] = {
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".json": "json", ".parquet": "parquet", ".pq": "parquet", ".ft": "fasttext",
}  # fmt: skip
_LOOKED_AT = 100  # records whose keys are the columns of JSON lines
_BATCH = 4096  # rows of Parquet in memory


@dataclass(frozen=True)
class Table:
    """One file.

    Attributes:
        path: of it.
        kind: how it is read.
        columns: their names.
        rows: gives the rows of some columns, from the beginning.
        total: their number, where the file says it.
    """

    path: Path
    kind: Kind
    columns: tuple[str, ...]
    rows: Callable[[Sequence[str]], Rows]
    total: int | None = None

    def place(self, row: int) -> str:
        """Say where a row is."""
        return f"{self.path}, row {row}" if self.kind == "parquet" else at_line(self.path, row)


def kind_of(path: Path, tables: Tables) -> Kind:
    """Find how a file is read: as --format says, by its name, or by its beginning.

    Raises:
        InputError: neither says it.
    """
    if tables.format is not None:
        return tables.format
    head = beginning(path, tables.encoding)
    first = head.lstrip().partition("\n")[0]
    if head.startswith("PAR1"):
        return "parquet"
    if LABEL_PREFIX in first and suffix_of(path) not in (".csv", ".jsonl", ".json"):
        return "fasttext"
    if (kind := BY_SUFFIX.get(suffix_of(path))) in ("csv", "parquet"):
        return kind
    if is_annif(first):
        return "annif"
    if kind == "tsv":
        return kind
    # JSON lines are often called .json, and a JSON list now and then .jsonl
    if first.startswith(("{", "[")):
        return "json" if first.startswith("[") else "jsonl"
    if kind is None and max(map(first.count, ",;\t|")) > 0 and suffix_of(path) in ("", ".txt"):
        return "tsv" if "\t" in first else "csv"
    if kind is not None:
        return kind
    expected = "a table whose name or beginning says what it is"
    mend = f"say --format {'|'.join(get_args(Kind))}"
    raise InputError(str(path), expected, quote(first), mend)


def open_one(path: Path, tables: Tables) -> Table:
    """Open one table.

    Raises:
        InputError: it cannot be read as what it seems to be.
    """
    kind = kind_of(path, tables)
    openers: dict[Kind, Callable[[Path, Tables], Table]] = {
        "csv": _csv, "tsv": _csv, "jsonl": _json_lines, "json": _json_list, "parquet": _parquet,
        "fasttext": _fasttext, "annif": _annif,
    }  # fmt: skip
    return openers[kind](path, tables)


# ---- CSV and TSV ----


def _csv(path: Path, tables: Tables) -> Table:
    kind = kind_of(path, tables)
    first = beginning(path, tables.encoding).lstrip("\r\n").partition("\n")[0]
    divider = tables.separator or ("\t" if kind == "tsv" else max(",;\t|", key=first.count))
    lines = _csv_rows(path, tables, divider)
    names = list(tables.columns)
    if not names:
        _, names = next(lines, (0, []))
        names = [name.strip() for name in names]
    if not names:
        raise InputError(str(path), "a line of column names", "none", "name another file")
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        mend = "rename one of them"
        raise InputError(at_line(path, 1), "each column once", f"{twice[0]!r} twice", mend)

    def rows(wanted: Sequence[str]) -> Rows:
        places = [names.index(name) for name in wanted]
        found = _csv_rows(path, tables, divider)
        if not tables.columns:
            next(found)
        for line, cells in found:
            if len(cells) != len(names):
                mend = "quote cells that hold the separator, or name it with --separator"
                expected = f"{len(names)} cells, one for each column"
                raise InputError(at_line(path, line), expected, str(len(cells)), mend)
            yield line, [cells[place] for place in places]

    return Table(path, kind, tuple(names), rows)


def _csv_rows(path: Path, tables: Tables, divider: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line that a row begins in, and its cells; blank lines are left out."""
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if tables.quotes else csv.QUOTE_NONE
    before = csv.field_size_limit(LONGEST_LINE)
    line = 1
    try:
        with open_text(path, tables.encoding, repair=tables.repair_encoding, newline="") as text:
            reader = csv.reader(text, delimiter=divider, quoting=quoting, strict=True)
            for cells in reader:
                if cells:
                    yield line, cells
                line = reader.line_num + 1
    except csv.Error as error:
        if "field larger" in str(error):
            raise line_too_long(at_line(path, line)) from None
        mend = "double the quotation marks inside a quoted cell, or say --no-quotes"
        expected = "cells whose quotation marks open and close"
        raise InputError(at_line(path, line), expected, str(error), mend) from None
    finally:
        csv.field_size_limit(before)


# ---- JSON ----


def _json_lines(path: Path, tables: Tables) -> Table:
    def records() -> Iterator[tuple[int, Any]]:
        for number, line in lines_of(path, tables.encoding, repair=tables.repair_encoding):
            if line.strip():
                yield number, _parsed(line, at_line(path, number))

    return _of_records(path, "jsonl", records)


def _json_list(path: Path, tables: Tables) -> Table:
    if beginning(path, tables.encoding).lstrip()[:1] != "[":
        return _json_lines(path, tables)
    return _of_records(path, "json", lambda: _json_items(path, tables))


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        got = f"{quote(line)} ({error.msg}, column {error.colno})"
        raise InputError(where, "a JSON object", got, "mend the line") from None
    except (RecursionError, ValueError):
        got = "lists or digits without an end"
        raise InputError(where, "a JSON object", got, "mend the line") from None


def _json_items(path: Path, tables: Tables) -> Iterator[tuple[int, Any]]:
    """Yield the line and the value of each item of a list, of which a part is in memory."""
    decoder, buffer, line, more = json.JSONDecoder(), "", 1, True
    with open_text(path, tables.encoding, repair=tables.repair_encoding) as text:
        started = False
        while True:
            plain = buffer.lstrip(" \t\r\n," if started else " \t\r\n")
            line += buffer.count("\n", 0, len(buffer) - len(plain))
            buffer = plain
            if not started and buffer:
                started, buffer = True, buffer[1:]
                continue
            if buffer.startswith("]"):
                return
            try:
                value, end = decoder.raw_decode(buffer)
                if more and end == len(buffer):
                    raise json.JSONDecodeError("a number may go on", buffer, end)
            except (json.JSONDecodeError, RecursionError) as error:
                if more and len(buffer) <= LONGEST_LINE:
                    added = text.read(max(1 << 16, len(buffer)))
                    more, buffer = bool(added), buffer + added
                    continue
                got = f"{quote(buffer)}, which ends or breaks off ({error})"
                mend = "close the list, or write one object per line"
                raise InputError(at_line(path, line), "an object of a list", got, mend) from None
            yield line, value
            line += buffer.count("\n", 0, end)
            buffer = buffer[end:]


def _of_records(path: Path, kind: Kind, records: Callable[[], Iterator[tuple[int, Any]]]) -> Table:
    """Make a table of JSON objects; its columns are the keys of the first hundred."""
    names: dict[str, None] = {}
    for count, (number, record) in enumerate(records()):
        if not isinstance(record, dict):
            mend = 'write objects, as {"text": "…", "labels": ["…"]}'
            got = quote(json.dumps(record))
            raise InputError(at_line(path, number), "a JSON object", got, mend)
        names |= dict.fromkeys(record)
        if count + 1 == _LOOKED_AT:
            break

    def rows(wanted: Sequence[str]) -> Rows:
        for number, record in records():
            if not isinstance(record, dict):
                got = quote(json.dumps(record))
                raise InputError(at_line(path, number), "a JSON object", got, "mend it")
            yield number, [record.get(name) for name in wanted]

    return Table(path, kind, tuple(names), rows)


# ---- Parquet ----


def _parquet(path: Path, tables: Tables) -> Table:
    import pyarrow.parquet

    def opened() -> Any:
        try:
            return pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise damaged(path, str(error)) from None

    with opened() as file:
        names, total = tuple(file.schema_arrow.names), int(file.metadata.num_rows)

    def rows(wanted: Sequence[str]) -> Rows:
        number = 0
        with opened() as found:
            classes = _class_names(found.schema_arrow)
            names = list(dict.fromkeys(wanted))
            batches = found.iter_batches(_BATCH, columns=names, use_threads=False)
            while True:
                try:
                    batch = next(batches, None)
                    if batch is None:
                        return
                    values = [batch.column(name).to_pylist() for name in wanted]
                except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                    raise damaged(path, f"{error}, behind row {number}") from None
                for name, column in zip(wanted, values, strict=True):
                    if name in classes:
                        column[:] = [_named(value, classes[name]) for value in column]
                for row in zip(*values, strict=True):
                    number += 1
                    yield number, list(row)

    return Table(path, "parquet", names, rows, total)


def damaged(path: Path, got: str) -> InputError:
    """Make the error for a Parquet file that cannot be read."""
    got = " ".join(got.split())[:160]
    return InputError(str(path), "a whole Parquet file", got, "copy or write the file again")


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Return the names of numbered classes by column, as the Hub's datasets keep them."""
    told = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(told)["info"]["features"] if told else {}
    except (ValueError, KeyError, TypeError):
        return {}
    found = {}
    for name, feature in features.items() if isinstance(features, dict) else ():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        names = inner.get("names") if isinstance(inner, dict) else None
        if isinstance(names, list) and all(isinstance(one, str) for one in names):
            found[name] = names
    return found


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(inner, names) for inner in value]
    known = isinstance(value, int) and 0 <= value < len(names)
    return names[value] if known else value


# ---- fastText and Annif ----


def _fasttext(path: Path, tables: Tables) -> Table:
    def rows(wanted: Sequence[str]) -> Rows:
        lines = lines_of(path, tables.encoding, repair=tables.repair_encoding)
        return fasttext_rows(lines, wanted)

    return Table(path, "fasttext", ("text", "labels"), rows)


def _annif(path: Path, tables: Tables) -> Table:
    def rows(wanted: Sequence[str]) -> Rows:
        lines = lines_of(path, tables.encoding, repair=tables.repair_encoding)
        return annif_rows(path, lines, wanted)

    return Table(path, "annif", ("text", "subjects"), rows)
