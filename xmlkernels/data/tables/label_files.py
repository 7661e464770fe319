"""Names and texts of labels from a second file: a table, one name per line, or SKOS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xmlkernels.data.tables.columns import TEXTS, TITLES
from xmlkernels.data.tables.corpora import URI
from xmlkernels.data.tables.options import Tables
from xmlkernels.data.tables.readers import BY_SUFFIX, open_one
from xmlkernels.data.tables.streams import beginning, lines_of, located, suffix_of
from xmlkernels.errors import InputError

# Suffix → rdflib's name of the format.
SKOS = {
    ".ttl": "turtle", ".rdf": "xml", ".xml": "xml", ".owl": "xml", ".nt": "nt", ".n3": "n3",
    ".jsonld": "json-ld",
}  # fmt: skip
_KEYS = ("id", "uri", "uid", "key", "code", "notation", "label_id", "concept", "label")
_NAMES = ("name", "label", "preflabel", "pref_label", "prefLabel", *TITLES, *TEXTS, "label_en")


@dataclass(frozen=True)
class Labels:
    """What labels are called.

    Attributes:
        names: label as the documents have it → its name.
        texts: the same → all that is known of it, its name first.
    """

    names: Mapping[str, str]
    texts: Mapping[str, str]


def read_label_file(tables: Tables) -> Labels:
    """Read --label-file.

    Raises:
        InputError: it cannot be read, or no column of it is known.
    """
    assert tables.label_file is not None
    path = located(tables.label_file)
    if suffix_of(path) in SKOS:
        return _skos(path, tables.language)
    if suffix_of(path) in BY_SUFFIX and not _plain_tsv(path, tables):
        return _table(path, tables)
    names: dict[str, str] = {}
    rows = lines_of(path, tables.encoding, repair=tables.repair_encoding)
    for number, line in rows:
        key, tab, name = line.partition("\t")
        uri = URI.fullmatch(key.strip())
        if tab and name.strip():
            # As Annif's vocabularies: <uri>⇥label, and what stands behind a second tab is left.
            names[uri[1] if uri else key.strip()] = name.partition("\t")[0].strip()
        else:
            names[str(number - 1)] = line.strip()
    return Labels(names, names)


def _plain_tsv(path: Path, tables: Tables) -> bool:
    """Return whether a .tsv is a vocabulary of Annif, without a line of column names."""
    first = beginning(path, tables.encoding).partition("\n")[0]
    return URI.fullmatch(first.partition("\t")[0].strip()) is not None


def _table(path: Path, tables: Tables) -> Labels:
    from dataclasses import replace

    table = open_one(path, replace(tables, format=None, columns=(), separator=""))
    by_name = {name.strip().lower(): name for name in reversed(table.columns)}
    key = next((by_name[name] for name in _KEYS if name in by_name), None)
    name = next((by_name[n.lower()] for n in _NAMES if by_name.get(n.lower(), key) != key), None)
    if name is None:
        shown = ", ".join(map(repr, table.columns[:12]))
        mend = "call them id and name"
        raise InputError(str(path), "columns of ids and of names", f"the columns {shown}", mend)
    numbered = key is None or (key == by_name.get("uid") and table.kind in ("json", "jsonl"))
    names: dict[str, str] = {}
    wanted = [name] if key is None else [key, name]
    for place, (row, values) in enumerate(table.rows(wanted)):
        if not isinstance(values[-1], str):
            expected = f"a name in column {name!r}"
            raise InputError(table.place(row), expected, repr(values[-1]), "write it as a text")
        # Documents of the LF-* sets name a label by its place in this file, others by its id.
        names.setdefault(str(place), values[-1]) if numbered else None
        if key is not None:
            names[_key(values[0], table.place(row))] = values[-1]
    return Labels(names, names)


def _key(value: Any, where: str) -> str:
    if isinstance(value, str | int) and not isinstance(value, bool):
        uri = URI.fullmatch(str(value).strip())
        return uri[1] if uri else str(value).strip()
    raise InputError(where, "the id of a label", repr(value), "write a text or a whole number")


def _skos(path: Path, language: str) -> Labels:
    """Read the concepts of a SKOS vocabulary: the name is prefLabel in the language.

    Where a concept has none in that language, any other is taken. altLabel in the language is part
    of the text.
    """
    try:
        import rdflib
        from rdflib.namespace import SKOS as NAMES
    except ImportError as error:
        mend = 'pip install "xmlkernels[skos]", or give a table of ids and names'
        raise InputError("--label-file", "the package rdflib", str(error), mend) from None
    graph = rdflib.Graph()
    try:
        graph.parse(str(path), format=SKOS[suffix_of(path)])
    except Exception as error:  # its parsers raise whatever they meet
        got = " ".join(str(error).split())[:160]
        raise InputError(str(path), "SKOS", got or type(error).__name__, "mend the file") from None
    names: dict[str, str] = {}
    for subject, label in sorted(graph.subject_objects(NAMES.prefLabel), key=_by_text):
        if str(subject) not in names or _of(label, language):
            names[str(subject)] = str(label)
    if not names:
        expected = "concepts with skos:prefLabel"
        raise InputError(str(path), expected, "none", "give a table of ids and names instead")
    texts = {key: [name] for key, name in names.items()}
    for subject, label in sorted(graph.subject_objects(NAMES.altLabel), key=_by_text):
        if str(subject) in texts and _of(label, language):
            texts[str(subject)].append(str(label))
    return Labels(names, {key: "; ".join(parts) for key, parts in texts.items()})


def _by_text(pair: tuple[Any, Any]) -> tuple[str, str]:
    return str(pair[0]), str(pair[1])


def _of(label: Any, language: str) -> bool:
    """Return whether a name is of a language: en of en and en-GB."""
    own = (getattr(label, "language", None) or "").lower()
    return own == language.lower() or own.startswith(f"{language.lower()}-")
