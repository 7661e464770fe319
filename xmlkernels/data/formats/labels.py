"""Readers and writers of every raw format, under one name.

| format | files | functions |
|---|---|---|
| texts, one a line | `trn_X.txt`, `Y.txt` | `iter_lines` `read_lines` `write_lines` |
| sparse text | `trn_X_Y.txt`, `trn_X_Xf.txt` | `read_sparse` `write_sparse` |
| old bag of words | `train.txt` | `read_bow` |
| label lines | `Y.trn.txt` | `read_label_lines` |
| any label file | the above and .npz, .json | `read_labels` |
| LF JSON lines | `trn.json.gz`, `lbl.json.gz` | `iter_lf_json` `read_lf_json` `count_lf_records` |
| AttentionXML texts and string labels | `train_raw_texts.txt`, `train_labels.txt` | `read_raw_texts` `read_label_strings` `encode_label_strings` |
| scipy sparse | `Y.trn.npz` | `read_npz` `write_npz` |
| filter pairs | `filter_labels_test.txt` | `read_filter_pairs` `write_filter_pairs` `select_pairs` |
| Renee's token maps | `trn_doc_input_ids.dat` | `open_token_map` `open_token_maps` `token_rows` |

A user's mistake is an InputError that names file and line; what was mended or left out is a
DataWarning.
"""  # noqa: E501  (a table row cannot be broken)

from __future__ import annotations

import mmap
import os
import re
from typing import Literal

from scipy.sparse import csr_matrix

from xmlkernels.data.formats.lf_json import (
    LFRecord,
    LFRecords,
    count_lf_records,
    is_lf_json,
    iter_lf_json,
    read_lf_json,
)
from xmlkernels.data.formats.matrices import (
    canonical_csr,
    check_shape,
    drop_unlabelled,
    read_filter_pairs,
    read_npz,
    select_pairs,
    write_filter_pairs,
    write_npz,
)
from xmlkernels.data.formats.sparse_text import (
    Duplicates,
    read_bow,
    read_label_lines,
    read_sparse,
    write_sparse,
)
from xmlkernels.data.formats.text_lines import (
    Divider,
    EncodedLabels,
    encode_label_strings,
    iter_lines,
    join_parts,
    label_divider,
    read_label_strings,
    read_lines,
    read_raw_texts,
    split_title,
    write_lines,
)
from xmlkernels.data.formats.token_maps import open_token_map, open_token_maps, token_rows
from xmlkernels.errors import InputError
from xmlkernels.files import DataWarning, PathLike, at_line, map_bytes, quote

__all__ = [
    "DataWarning",
    "Divider",
    "Duplicates",
    "EncodedLabels",
    "LFRecord",
    "LFRecords",
    "LabelFormat",
    "canonical_csr",
    "check_same_length",
    "count_lf_records",
    "drop_unlabelled",
    "encode_label_strings",
    "iter_lf_json",
    "iter_lines",
    "join_parts",
    "label_divider",
    "label_format",
    "open_token_map",
    "open_token_maps",
    "read_bow",
    "read_filter_pairs",
    "read_label_lines",
    "read_label_strings",
    "read_labels",
    "read_lf_json",
    "read_lines",
    "read_npz",
    "read_raw_texts",
    "read_sparse",
    "select_pairs",
    "split_title",
    "token_rows",
    "write_filter_pairs",
    "write_lines",
    "write_npz",
    "write_sparse",
]

LabelFormat = Literal["npz", "json", "sparse", "bow", "lines"]

_NUMBERS = re.compile(rb"\s*\d+([ \t]+\d+){1,2}\s*")


def read_labels(
    path: PathLike,
    rows: int | None = None,
    labels: int | None = None,
    *,
    format: LabelFormat | None = None,
    duplicates: Duplicates = "error",
) -> csr_matrix:
    """Read a label matrix from any of the label formats.

    Args:
        path: .npz, .json(l)(.gz), or text: sparse with header, bag of words (its labels alone), or
            label lines.
        rows, labels: the shape it must have.
        format: which one it is; by default `label_format` looks.
        duplicates: what a label that stands twice in a row means (.npz and JSON merge unless
            "error").

    Returns:
        CSR float32 [rows, labels], canonical.

    Raises:
        InputError: names file and line.
    """
    kind = label_format(path, rows) if format is None else format
    merge = duplicates != "error"
    if kind == "npz":
        return read_npz(path, rows=rows, cols=labels, merge_duplicates=merge)
    if kind == "sparse":
        return read_sparse(path, rows=rows, cols=labels, bare=True, duplicates=duplicates)
    if kind == "lines":
        return read_label_lines(path, rows=rows, labels=labels, duplicates=duplicates)
    if kind == "json":
        matrix = read_lf_json(path, num_labels=labels, merge_duplicates=merge).labels
    elif kind == "bow":
        matrix = read_bow(path, duplicates=duplicates)[1]
    else:
        raise InputError(
            "format", "npz, json, sparse, bow or lines", repr(kind), "choose one of them"
        )
    check_shape(matrix.shape, rows, labels, os.fspath(path))
    return matrix


def label_format(path: PathLike, rows: int | None = None) -> LabelFormat:
    """Which label format a file has, by its suffix, else its first lines.

    Text whose first line is two numbers is sparse with a header if a `:` follows, or if as many
    lines follow as it says (blank ones at the end may or may not count); `rows` decides where both
    readings fit. Three numbers and a `:` later are a bag of words. Label lines otherwise.

    Raises:
        InputError: no file, or the text can be read both ways.
    """
    if os.fspath(path).endswith(".npz"):
        return "npz"
    if is_lf_json(path):
        return "json"
    with map_bytes(path) as buffer:
        stop = buffer.find(b"\n")
        first = buffer[: stop if stop >= 0 else len(buffer)].removeprefix(b"\xef\xbb\xbf")
        if b":" in first:
            expected = "a header `rows labels`, or label ids without values"
            mend = "put the header back as the first line"
            raise InputError(at_line(path, 1), expected, quote(first.strip()), mend)
        if stop < 0 or not _NUMBERS.fullmatch(first):
            return "lines"
        numbers = [int(number[:19]) for number in first.split()]
        if buffer.find(b":", stop) >= 0:
            return "sparse" if len(numbers) == 2 else "bow"
        if len(numbers) == 2:
            return _header_or_row(path, numbers, *_count_rows(buffer, stop + 1), rows)
    return "lines"


def _header_or_row(
    path: PathLike, numbers: list[int], filled: int, lines: int, rows: int | None
) -> LabelFormat:
    """What two numbers on the first line are, where `lines` lines of bare ids follow, the last
    `filled` of them not blank.

    A header that names one row more than there are may have a blank last row without a line end, or
    a row that was cut off; read as a row of ids it would shift every row behind it.
    """
    says, cut = numbers[0], numbers[0] == lines + 1
    header = filled <= says <= lines
    if (rows is None and ((header and filled) or cut)) or (rows == says and cut):
        got = f"`{says} {numbers[1]}`, which may be a header or a row, and {lines} rows below"
        mend = "give --label-format sparse if it is a header, --label-format lines if it is a row"
        if cut:
            mend += (
                "; the file of a header is cut short by one row, or its last row is blank and "
                "lacks its line end"
            )
        raise InputError(at_line(path, 1), "a clear format", got, mend)
    if rows is None:
        return "sparse" if header else "lines"
    return "sparse" if rows == says or (header and not filled < rows <= lines + 1) else "lines"


def _count_rows(buffer: bytes | mmap.mmap, start: int) -> tuple[int, int]:
    """Lines to the last one that is not blank, and all lines."""
    text = buffer[start:]
    filled = text.rstrip()
    return filled.count(b"\n") + (len(filled) > 0), text.count(b"\n") + (
        not text.endswith(b"\n") and len(text) > 0
    )


def check_same_length(text_path: PathLike, n_texts: int, label_path: PathLike, n_rows: int) -> None:
    """Raises InputError where a text file and a label file have different numbers of rows."""
    if n_texts != n_rows:
        short, long = (text_path, label_path) if n_texts < n_rows else (label_path, text_path)
        mend = (
            f"rows must agree one to one: either {os.fspath(short)} is cut short or the files "
            "belong to different sets"
        )
        where = at_line(long, min(n_texts, n_rows) + 1)
        expected = (
            f"{n_texts} texts in {os.fspath(text_path)} and as many label rows in "
            f"{os.fspath(label_path)}"
        )
        raise InputError(where, expected, f"{n_rows} label rows", mend)
