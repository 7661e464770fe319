"""The label files of a dataset's splits: one width, and no more rows than there are documents."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.sparse import csr_matrix

from xmlkernels.data.formats.labels import (
    DataWarning,
    Duplicates,
    LabelFormat,
    check_same_length,
    label_format,
    read_labels,
)
from xmlkernels.errors import InputError

# Formats that say how many labels there are; the others only show the largest number used.
SELF_DESCRIBING = ("sparse", "bow", "npz")


def read_label_files(
    paths: Mapping[str, Path],
    documents: Mapping[str, Sequence[str] | range | None],
    texts: Mapping[str, Path | None],
    count: int | None,
    *,
    format: LabelFormat | None = None,
    duplicates: Duplicates = "error",
) -> tuple[dict[str, csr_matrix], bool]:
    """Label matrices of one width. A self-describing file is read first: it tells the others how
    many labels exist.

    Blank lines behind the last row are none, of label lines and of `documents` alike: they are
    taken off both.

    Args:
        paths: the label file of each split.
        documents: its documents; None where nothing says how many there are.
        texts: the file of the documents, for messages.
        count: number of labels; None takes what a file says, or the largest id + 1.
        format: of every file; None looks.
        duplicates: what a label that stands twice in a row means.

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
    """The format of a label file beside these documents, which may have blank lines at their
    end.
    """
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
