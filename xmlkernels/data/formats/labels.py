"""Label files of any format: which format a file has, and the label files of a dataset's splits."""

from __future__ import annotations

import mmap
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from scipy.sparse import csr_matrix

from xmlkernels.data.formats.lf_json import is_lf_json, read_lf_json
from xmlkernels.data.formats.matrices import check_shape, read_npz
from xmlkernels.data.formats.sparse_text import Duplicates, read_bow, read_label_lines, read_sparse
from xmlkernels.errors import InputError
from xmlkernels.files import DataWarning, PathLike, at_line, map_bytes, quote

LabelFormat = Literal["npz", "json", "sparse", "bow", "lines"]

# Formats that say how many labels there are; the others only show the largest number used.
SELF_DESCRIBING = ("sparse", "bow", "npz")
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
        duplicates: what a label that occurs twice in a row means (.npz and JSON merge unless
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
    """Decide what two numbers on the first line are.

    `lines` lines of bare ids follow, the last `filled` of them not blank.

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
    """Raise InputError where a text file and a label file have different numbers of rows."""
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


def read_label_files(
    paths: Mapping[str, Path],
    documents: Mapping[str, Sequence[str] | range | None],
    texts: Mapping[str, Path | None],
    count: int | None,
    *,
    format: LabelFormat | None = None,
    duplicates: Duplicates = "error",
) -> tuple[dict[str, csr_matrix], bool]:
    """Read label matrices of one width.

    A self-describing file is read first: it says how many labels the others have.

    Blank lines behind the last row are none, of label lines and of `documents` alike: they are
    taken off both.

    Args:
        paths: the label file of each split.
        documents: its documents; None where nothing says how many there are.
        texts: the file of the documents, for messages.
        count: number of labels; None takes what a file says, or the largest id + 1.
        format: of every file; None looks.
        duplicates: what a label that occurs twice in a row means.

    Returns:
        CSR float32 [rows, labels] of each split, and whether `count` or a file says how many labels
        there are.

    Raises:
        InputError: names file and line.
    """
    kinds = {name: format or _format(path, documents[name]) for name, path in paths.items()}
    found = {}
    for name in sorted(paths, key=lambda name: kinds[name] not in SELF_DESCRIBING):
        matrix = read_labels(paths[name], None, count, format=kinds[name], duplicates=duplicates)
        known, text = documents[name], texts[name]
        if known is not None and text is not None:
            if kinds[name] == "lines":
                matrix = _without_blank_end(paths[name], matrix, len(known))
            if isinstance(known, list):
                cut_blank_end(text, known, matrix.shape[0])
            check_same_length(text, len(known), paths[name], matrix.shape[0])
        if count is None and kinds[name] in SELF_DESCRIBING:
            count = matrix.shape[1]
        found[name] = matrix
    if count is None:
        same_width(found)
    return {name: found[name] for name in paths}, count is not None


def _format(path: Path, documents: Sequence[str] | range | None) -> LabelFormat:
    """Find the format of a label file of these documents, which may end in blank lines."""
    if documents is None:
        return label_format(path)
    kind = label_format(path, len(documents))
    filled = len(documents) if isinstance(documents, range) else filled_lines(documents)
    if filled != len(documents) and label_format(path, filled) != kind:
        mend = (
            "take the blank lines at the end of the texts out, or give --label-format sparse or "
            "lines"
        )
        raise InputError(
            f"{os.fspath(path)}:1",
            "a clear format",
            "two numbers that may be a header or a row",
            mend,
        )
    return kind


def _without_blank_end(path: Path, matrix: csr_matrix, rows: int) -> csr_matrix:
    surplus = matrix.shape[0] - rows
    if surplus <= 0 or matrix[rows:].nnz:
        return matrix
    _tell_blank_end(path, surplus)
    return matrix[:rows]


def filled_lines(lines: Sequence[Any]) -> int:
    """How many there are without the blank ones (texts) or empty ones (rows) at the end."""
    count = len(lines)
    while count and not (
        lines[count - 1].strip() if isinstance(lines[count - 1], str) else lines[count - 1]
    ):
        count -= 1
    return count


def cut_blank_end(path: Path, lines: list[Any], least: int) -> None:
    """Take blank lines off the end, as far as more than `least` lines are left; says so."""
    surplus = len(lines) - max(least, filled_lines(lines))
    if surplus > 0:
        del lines[len(lines) - surplus :]
        _tell_blank_end(path, surplus)


def _tell_blank_end(path: Path, count: int) -> None:
    what = "1 blank line" if count == 1 else f"{count} blank lines"
    warnings.warn(f"{path}: {what} behind the last row left out", DataWarning, stacklevel=2)


def same_width(matrices: Mapping[str, csr_matrix]) -> None:
    """Widen every matrix to the widest, in place."""
    width = max(matrix.shape[1] for matrix in matrices.values())
    for matrix in matrices.values():
        matrix.resize((matrix.shape[0], width))
