"""JSON lines of the LF-* sets of the Extreme Classification Repository.

Files are `trn.json.gz`, `tst.json.gz` and `lbl.json.gz`.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.data.formats.text_lines import Utf8Repairs, counted, numbered_lines
from xmlkernels.errors import InputError
from xmlkernels.file_kinds import is_json_lines
from xmlkernels.files import PathLike, at_line, quote


@dataclass(frozen=True)
class LFRecord:
    """One document or label."""

    uid: str
    title: str
    content: str  # "" where the set has none (LF-…Titles-…)
    target_ind: list[int]  # ascending, unique
    target_rel: list[float]  # relevance of each; 1.0 where the file gives none


@dataclass(frozen=True)
class LFRecords:
    """A whole file: lists of equal length, and the targets as a matrix."""

    uid: list[str]
    title: list[str]
    content: list[str]
    labels: csr_matrix  # float32 [rows, num_labels]; relevances

    def texts(self, *, content: bool = True, joiner: str = " ") -> list[str]:
        """Title and content joined (what is empty is left out), or the titles alone."""
        if not content:
            return list(self.title)
        return [
            joiner.join(filter(None, pair)) for pair in zip(self.title, self.content, strict=True)
        ]


def iter_lf_json(
    path: PathLike, *, num_labels: int | None = None, merge_duplicates: bool = False
) -> Iterator[LFRecord]:
    """Stream a file of one JSON object a line, plain or packed, in constant memory.

    Keys: `uid` (text or number) and `title` must be there; `content`, `target_ind` (label numbers
    from 0) and `target_rel` (their relevance) may be absent or null; other keys are ignored. Blank
    lines may be at the end only. Broken UTF-8 and lone surrogates are replaced by U+FFFD and
    reported once. A relevance of 0 is no target.

    Args:
        path: the file.
        num_labels: label numbers must be below it.
        merge_duplicates: whether a label twice in a record counts once, with the larger relevance,
            or is an error.

    Raises:
        InputError: names file and line.
    """
    repairs = Utf8Repairs(path)
    blank = 0
    try:
        for number, line in numbered_lines(path, repairs):
            if not line.strip():
                blank = blank or number
                continue
            if blank:
                raise InputError(
                    at_line(path, blank), "a JSON object", "a blank line", "take the line out"
                )
            yield _record(
                at_line(path, number), number, line, num_labels, merge_duplicates, repairs
            )
    finally:
        repairs.tell()


def count_lf_records(path: PathLike) -> int:
    """Count the records: of `lbl.json.gz`, the number of labels.

    Lines are counted, not parsed.
    """
    return sum(1 for _, line in numbered_lines(path, Utf8Repairs(path)) if line.strip())


def read_lf_json(
    path: PathLike, *, num_labels: int | PathLike | None = None, merge_duplicates: bool = False
) -> LFRecords:
    """Read the records of `iter_lf_json` as lists and a CSR matrix.

    Args:
        path: the file.
        num_labels: width of the matrix: a number, or the path of the `lbl.json(.gz)` whose records
            are the labels; by default the largest label number + 1.
        merge_duplicates: as `iter_lf_json`.

    Raises:
        InputError: names file and line.
    """
    if num_labels is not None and not isinstance(num_labels, int):
        num_labels = count_lf_records(num_labels)
    uid: list[str] = []
    title: list[str] = []
    content: list[str] = []
    indptr, indices, data = array("q", [0]), array("q"), array("f")
    found = iter_lf_json(path, num_labels=num_labels, merge_duplicates=merge_duplicates)
    for record in counted(path, found, "records"):
        uid.append(record.uid)
        title.append(record.title)
        content.append(record.content)
        indices.extend(record.target_ind)
        data.extend(record.target_rel)
        indptr.append(len(indices))
    columns = np.array(indices, dtype=np.int64)
    width = num_labels if num_labels is not None else int(columns.max(initial=-1)) + 1
    values, pointers = np.array(data, dtype=np.float32), np.array(indptr, dtype=np.int64)
    labels = csr_matrix((values, columns, pointers), shape=(len(uid), width))
    return LFRecords(uid, title, content, labels)


def _record(
    where: str, number: int, line: str, num_labels: int | None, merge: bool, repairs: Utf8Repairs
) -> LFRecord:
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        at = (
            f" ({error.msg}, column {error.colno})"
            if isinstance(error, json.JSONDecodeError)
            else ""
        )
        raise InputError(where, "a JSON object", f"{quote(line)}{at}", "mend the line") from None
    except ValueError:  # Python reads no whole number of more than 4300 digits
        raise InputError(
            where, "a JSON object", "a number of thousands of digits", "mend the line"
        ) from None
    if not isinstance(fields, dict):
        raise InputError(where, "a JSON object", quote(line), "write one object a line")
    uid, title, content = fields.get("uid"), fields.get("title"), fields.get("content")
    if isinstance(uid, bool) or not isinstance(uid, str | int):
        raise InputError(
            where, "a text or whole number as uid", _got(fields, "uid"), "give each record its uid"
        )
    if not isinstance(title, str):
        raise InputError(
            where, "a text as title", _got(fields, "title"), 'add it, "" if there is none'
        )
    if content is not None and not isinstance(content, str):
        raise InputError(
            where, "a text as content", _got(fields, "content"), "leave it out if there is none"
        )
    indices, values = _targets(where, fields, num_labels, merge)
    uid, title, content = (
        repairs.mend_escapes(text, number) for text in (str(uid), title, content or "")
    )
    return LFRecord(uid, title, content, indices, values)


def _got(fields: dict[str, Any], key: str) -> str:
    try:
        return quote(json.dumps(fields[key])) if key in fields else f"no {key}"
    except RecursionError:
        return "lists inside lists, too deep"


def _targets(
    where: str, fields: dict[str, Any], limit: int | None, merge: bool
) -> tuple[list[int], list[float]]:
    indices, values = fields.get("target_ind"), fields.get("target_rel")
    indices = [] if indices is None else indices
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise InputError(
            where,
            "a list of label numbers as target_ind",
            _got(fields, "target_ind"),
            "mend the list",
        )
    values = [1.0] * len(indices) if values is None else values
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise InputError(
            where, "a list of numbers as target_rel", _got(fields, "target_rel"), "mend the list"
        )
    if len(values) != len(indices):
        raise InputError(
            where,
            f"{len(indices)} numbers in target_rel as in target_ind",
            f"{len(values)}",
            "mend the list",
        )
    bound = 2**63 - 1 if limit is None else limit
    targets: dict[int, float] = {}
    for index, value in zip(indices, values, strict=True):
        if not 0 <= index < bound:
            allowed = f"from 0 to {limit - 1}" if limit is not None else "from 0"
            raise InputError(
                where,
                f"label numbers {allowed}",
                quote(str(index)),
                "check that the label file belongs here",
            )
        if not abs(value) <= float(np.finfo(np.float32).max):
            raise InputError(
                where,
                "finite float32 relevances",
                quote(str(value)),
                "mend it or leave the label out",
            )
        if index in targets and not merge:
            mend = "leave one out, or count it once with --merge-duplicates"
            raise InputError(where, "every label once", f"{index} twice", mend)
        targets[index] = max(float(value), targets.get(index, -math.inf))
    kept = sorted(index for index, value in targets.items() if np.float32(value) != 0)
    return kept, [targets[index] for index in kept]


def is_lf_json(path: PathLike) -> bool:
    """Whether the name is that of a JSON lines file (.json, .jsonl, .ndjson, also packed)."""
    return is_json_lines(path)
