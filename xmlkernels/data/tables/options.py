"""Settings of own tables: which files, which columns, how their cells are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xmlkernels.errors import InputError

Kind = Literal["csv", "tsv", "jsonl", "json", "parquet", "fasttext", "annif"]


@dataclass(frozen=True)
class Tables:
    """One's own data as a table; `data` alone is needed where the columns have usual names."""

    data: Path | None = None
    """A table of texts and labels: .csv, .tsv, .jsonl, .json, .parquet, fastText or Annif; packed
    as .gz, .zst, .bz2 or .xz too; a folder of such files, or - for standard input."""
    validation: Path | None = None
    """The same for validation."""
    test: Path | None = None
    """The same for the test."""
    text: tuple[str, ...] = ()
    """Columns of the text; several are joined. By default those of a usual name: text, or title
    with abstract, content or body."""
    labels: tuple[str, ...] = ()
    """Columns of the labels; by default the one of a usual name: labels, tags, subjects, …"""
    text_parts: bool = False
    """Keep several columns of the text apart: for a bag of words and a linear model, a word of one
    column is another feature, too, than the word itself. An encoder reads them joined."""
    text_separator: str = " "
    """What joins several columns of the text."""
    label_separator: str | None = None
    """What divides the labels of a cell; by default found in the cells; '' for one label each."""
    label_file: Path | None = None
    """What the labels are called: a table of ids and names, one name per line (line 1 is label 0),
    or SKOS (.ttl, .rdf, .nt, .jsonld), which needs rdflib."""
    language: str = "en"
    """Of the names in SKOS."""
    all_labels: bool = False
    """Keep the labels of --label-file that no document has."""
    split_column: str = ""
    """The column that says train, validation or test."""
    test_share: float = 0.0
    """Share of the texts, by a hash of each, that becomes the test split; --validation-share works
    alike with tables. Equal texts are always in one split."""
    format: Kind | None = None
    """Of the table, where neither its name nor its beginning says it."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a CSV or TSV that has no line of names."""
    separator: str = ""
    """What divides the columns of a CSV; by default the commonest of , ; | and tab in line 1."""
    quotes: bool = True
    """Whether quotation marks in CSV and TSV hold cells together; --no-quotes: they are text."""
    encoding: str = "utf-8"
    """Of text files: utf-8, cp1252, utf-16, …"""
    repair_encoding: bool = False
    """Replace what is not in --encoding by U+FFFD; otherwise it is refused."""


USUAL = Tables()


def check_tables(tables: Tables, validation_share: float) -> None:
    """Refuse settings of tables that contradict each other, before any file is read.

    Args:
        tables: the settings.
        validation_share: of the texts.

    Raises:
        InputError: the first of them.
    """
    leave = "leave it out"
    given = tables.test is not None
    rules = [
        (
            0 <= tables.test_share < 1 and tables.test_share + validation_share < 1,
            "--test-share",
            "a share from 0 that leaves some for training",
            f"{tables.test_share:g} beside --validation-share {validation_share:g}",
            "choose smaller ones",
        ),
        (not (tables.test_share and given), "--test-share", "no --test", "both", leave),
        (
            not (validation_share and tables.validation is not None),
            "--validation-share",
            "0 beside --validation",
            f"{validation_share:g}",
            leave,
        ),
        (
            not tables.split_column
            or not (given or tables.validation is not None or tables.test_share
                    or validation_share),
            "--split-column",
            "no other way to split",
            "files or shares beside it",
            "choose one",
        ),
        (
            not tables.all_labels or tables.label_file is not None,
            "--all-labels",
            "--label-file",
            "none",
            leave,
        ),
        (len(tables.separator) <= 1, "--separator", "one character", repr(tables.separator), leave),
        (_is_encoding(tables.encoding), "--encoding", "an encoding that Python knows",
         repr(tables.encoding), "utf-8, cp1252 and latin-1 are the commonest"),
    ]  # fmt: skip
    for good, where, expected, got, mend in rules:
        if not good:
            raise InputError(where, expected, got, mend)


def _is_encoding(name: str) -> bool:
    try:
        return isinstance(b"a".decode(name, "replace"), str)
    except (LookupError, UnicodeError, TypeError):
        return False
