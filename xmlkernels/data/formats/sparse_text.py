r"""Sparse matrices as text: labels, features, bags of words, label lines; read in parallel.

Common to all of them: one row a line; `\n` or `\r\n`; tokens divided by white space; `#` starts
a comment that runs to the end of the line (a line that holds nothing else is an empty row); 0-based
indices in any order; plain or packed; blank lines behind the last row are ignored. Values are
float32 and finite. Zeros are not stored, since CSR users count stored entries. What occurs twice in
a row is an error unless `duplicates` says otherwise: "sum" adds the values, "max" keeps the
largest, "first" the first. Matrices are canonical: sorted, unique indices.

Source: the formats of the Extreme Classification Repository and of pyxclib's data_utils.
"""

from __future__ import annotations

import itertools
import mmap
import os
import re
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.data.formats import sparse_python
from xmlkernels.data.formats.matrices import canonical_csr
from xmlkernels.errors import InputError
from xmlkernels.files import DataWarning, PathLike, at_line, map_bytes, quote, replacing

Duplicates = Literal["error", "sum", "max", "first"]
Parser = Callable[
    ..., tuple[tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...], tuple[str, int, bytes] | None]
]

_HEADER = re.compile(rb"\s*\d{1,18}(\s+\d{1,18})*\s*(#.*)?")
_UTF8_MARK = b"\xef\xbb\xbf"


@lru_cache(maxsize=1)
def _parser() -> Parser:
    try:
        from xmlkernels._host import parse_sparse
    except ImportError as error:
        if os.environ.get("XMLKERNELS_REQUIRE_NATIVE") == "1":
            raise
        warnings.warn(
            f"the native parser of sparse text is not built ({error}); the Python one reads the "
            "same, much more slowly",
            DataWarning,
            stacklevel=4,
        )
        return sparse_python.parse_sparse
    native: Parser = parse_sparse
    return native


def available_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_sparse(
    path: PathLike,
    *,
    header: bool = True,
    rows: int | None = None,
    cols: int | None = None,
    bare: bool = False,
    duplicates: Duplicates = "error",
    threads: int | None = None,
) -> csr_matrix:
    """Read `trn_X_Xf.txt` and its like: a header `rows cols`, then rows of `index:value`.

    Such files are `trn_X_Xf.txt`, `trn_X_Y.txt` and `lbl_X_Xf.txt`.

    A blank line is an empty row. A row may start with `qid:NUMBER`, which is skipped.

    Args:
        path: plain or packed.
        header: False for a file without one; `rows` and `cols` then give the shape, or the text
            does (every line a row, the largest index + 1 columns).
        rows: number of rows the file must have.
        cols: number of columns the file must have; indices are below it.
        bare: whether `index` alone means `index:1`, as label files have it.
        duplicates: what an index that occurs twice in a row means (module docstring).
        threads: of the native parser; the CPUs of the process by default.

    Returns:
        CSR float32 [rows, cols].

    Raises:
        InputError: names file and line.
    """
    with map_bytes(path) as buffer:
        start, counts = (
            _header(path, buffer, ("rows", "cols")) if header else (_after_mark(buffer), [])
        )
        for name, given, at in (("rows", rows, 0), ("cols", cols, 1)):
            if counts and given is not None and given != counts[at]:
                raise InputError(
                    at_line(path, 1),
                    f"{given} {name}",
                    f"{counts[at]}",
                    "name the file that belongs here",
                )
        shape = counts or [-1 if rows is None else rows, -1 if cols is None else cols]
        (matrix,) = _parse(path, buffer, start, shape, -1, header, duplicates, threads, bare=bare)
    return matrix


def read_bow(
    path: PathLike, *, duplicates: Duplicates = "error", threads: int | None = None
) -> tuple[csr_matrix, csr_matrix]:
    """Read the old bag of words (`train.txt`): a header `rows features labels`, `l1,l2 f:v f:v`.

    A row that starts with white space, or with `f:v`, has no labels. `qid:NUMBER` may come before
    the features.

    Args:
        path: plain or packed.
        duplicates: what a feature or label that occurs twice in a row means (module docstring).
        threads: of the native parser; the CPUs of the process by default.

    Returns:
        features CSR float32 [rows, features], labels CSR float32 [rows, labels] of ones.

    Raises:
        InputError: names file and line.
    """
    with map_bytes(path) as buffer:
        start, counts = _header(path, buffer, ("rows", "features", "labels"))
        matrices = _parse(
            path, buffer, start, counts[:2], counts[2], True, duplicates, threads, bow=True
        )
    return matrices[0], matrices[1]


def read_label_lines(
    path: PathLike,
    *,
    rows: int | None = None,
    labels: int | None = None,
    duplicates: Duplicates = "error",
    threads: int | None = None,
) -> csr_matrix:
    """Read `Y.trn.txt`: label ids divided by commas or white space, no header.

    A blank line has no labels.

    Args:
        path: plain or packed.
        rows: number of rows the file must have; by default every line is one.
        labels: number of labels; by default the largest id + 1.
        duplicates: what a label that occurs twice in a row means (module docstring).
        threads: of the native parser; the CPUs of the process by default.

    Returns:
        CSR float32 [rows, labels] of ones.

    Raises:
        InputError: names file and line.
    """
    with map_bytes(path) as buffer:
        hole = buffer.find(b",,")
        if hole >= 0:
            line = buffer[:hole].count(b"\n") + 1
            raise InputError(
                at_line(path, line), "a label id between two commas", "nothing", "mend the line"
            )
        shape = [-1 if rows is None else rows, -1 if labels is None else labels]
        start = _after_mark(buffer)
        (matrix,) = _parse(
            path, buffer, start, shape, -1, False, duplicates, threads, bare=True, comma=True
        )
    return matrix


def write_sparse(path: PathLike, matrix: Any) -> None:
    """Write `rows cols`, then `index:value` rows.

    `read_sparse` gives the same matrix bit for bit.

    The file appears whole or not at all; a name that ends in .gz is compressed.

    Args:
        path: where to; an older file is replaced.
        matrix: any scipy sparse matrix [rows, cols] of finite numbers; stored as float32, zeros
            left out.

    Raises:
        InputError: a value is not finite, an entry occurs twice, or the folder cannot be written.
    """
    matrix = canonical_csr(matrix, f"the matrix for {os.fspath(path)}")
    with replacing(path) as file:
        file.write(b"%d %d\n" % matrix.shape)
        block = 4096
        for first in range(0, matrix.shape[0], block):
            pointers = matrix.indptr[first : first + block + 1]
            values, at = np.unique(matrix.data[pointers[0] : pointers[-1]], return_inverse=True)
            texts = [_shortest(value) for value in values]
            indices = matrix.indices[pointers[0] : pointers[-1]].tolist()
            entries = [f"{index}:{texts[i]}" for index, i in zip(indices, at.tolist(), strict=True)]
            ends = (pointers - pointers[0]).tolist()
            lines = [" ".join(entries[a:b]) + "\n" for a, b in itertools.pairwise(ends)]
            file.write("".join(lines).encode("ascii"))


def _shortest(value: np.float32) -> str:
    """Return the shortest decimal that reads as the same float32 by way of a double.

    That is how both parsers read.
    """
    small_or_large = not 1e-4 <= abs(value) < 1e9
    form = np.format_float_scientific if small_or_large else np.format_float_positional
    text = form(value, trim="-")
    return text if np.float32(float(text)) == value else repr(float(value))


def _after_mark(buffer: bytes | mmap.mmap) -> int:
    return len(_UTF8_MARK) if buffer[: len(_UTF8_MARK)] == _UTF8_MARK else 0


def _header(
    path: PathLike, buffer: bytes | mmap.mmap, names: tuple[str, ...]
) -> tuple[int, list[int]]:
    """Where the rows start, and the header's numbers."""
    start = _after_mark(buffer)
    stop = buffer.find(b"\n", start)
    stop = len(buffer) if stop < 0 else stop
    line = buffer[start : min(stop, start + 4096)]
    counts = line.partition(b"#")[0].split() if _HEADER.fullmatch(line) else []
    if len(counts) != len(names):
        mend = {
            2: "this looks like a matrix: its labels are named beside it (--train-labels)",
            3: "this looks like a bag-of-words file: give --source bow, or of labels "
            "--label-format bow",
        }.get(len(counts), "put the header back as the first line")
        if not counts and len(names) == 2:
            mend += ", or give --label-format lines for ids without values"
        expected = f"a header of {len(names)} numbers `{' '.join(names)}`"
        raise InputError(at_line(path, 1), expected, quote(line.strip()), mend)
    return min(stop + 1, len(buffer)), [int(count) for count in counts]


def _parse(
    path: PathLike,
    buffer: bytes | mmap.mmap,
    start: int,
    shape: list[int],
    labels: int,
    header: bool,
    duplicates: Duplicates,
    threads: int | None,
    *,
    bow: bool = False,
    bare: bool = False,
    comma: bool = False,
) -> list[csr_matrix]:
    if duplicates not in ("error", "sum", "max", "first"):
        raise InputError(
            "duplicates", "error, sum, max or first", repr(duplicates), "choose one of them"
        )
    workers = available_cpus() if threads is None else threads
    if workers < 1:
        raise InputError("threads", "at least 1", str(workers), "leave it out to use every CPU")
    rows, cols = shape
    arrays, problem = _parser()(
        buffer, start, rows, cols, labels, bow, bare, comma, duplicates, workers
    )
    if problem is not None:
        fault, row, token = problem
        raise _explain(path, fault, row, token, rows, cols, labels, header, lines=comma)
    matrices = []
    for (indptr, indices, data), given in zip(arrays, (cols, labels), strict=False):
        width = given if given >= 0 else int(indices.max(initial=-1)) + 1
        matrix = csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, width), copy=False)
        matrix.has_canonical_format = True
        matrices.append(matrix)
    return matrices


def _explain(
    path: PathLike,
    fault: str,
    row: int,
    token: bytes,
    rows: int,
    cols: int,
    labels: int,
    header: bool,
    *,
    lines: bool,
) -> InputError:
    """Make the error for what a parser found, in label lines or in one of the other formats."""
    first = 2 if header else 1
    if fault == "rows":
        expected = f"{rows} rows" + (", as the header says" if header else "")
        if row > rows:
            mend = (
                "mend the header's number of rows" if header else "name the file that belongs here"
            )
            return InputError(at_line(path, rows + first), expected, f"{row}", mend)
        mend = "the file is cut short, or its last row is blank and lacks its line end: add one"
        return InputError(at_line(path, row + first - 1), expected, f"{row}", mend)
    what, bound = (
        ("label id", labels)
        if fault.startswith("label")
        else ("label id" if lines else "index", cols)
    )
    if fault.endswith("duplicate"):
        mend = "leave one out, or count it once with --merge-duplicates"
        return InputError(
            at_line(path, row + first), f"every {what} once in a row", f"{quote(token)} twice", mend
        )
    if fault.endswith("range"):
        allowed = (
            "not negative"
            if bound < 0
            else f"from 0 to {bound - 1}"
            if bound
            else "(the header allows none)"
        )
        mend = "ids count from 0: mend the id or the number of columns"
        return InputError(at_line(path, row + first), f"{what} {allowed}", quote(token), mend)
    if lines and fault == "index":
        mend = "mend the line; label names in place of ids are read with --source attentionxml"
        return InputError(
            at_line(path, row + first), "label ids, divided by spaces or commas", quote(token), mend
        )
    expected, mend = {
        "index": ("`index:value` with a whole number as index", "mend the token"),
        "missing_value": ("`index:value`", "add the value"),
        "value": (
            "`index:value` with a finite float32 number as value",
            "mend the value or leave the entry out",
        ),
        "label": (
            "label ids divided by commas",
            "mend the labels, or start a row without labels with a space",
        ),
    }[fault]
    return InputError(at_line(path, row + first), expected, quote(token), mend)
