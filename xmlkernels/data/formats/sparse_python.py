"""Parse sparse text in plain Python, where the native parser (csrc/host) was not built.

Same arguments, same arrays, same problems found in the same order as
`xmlkernels._host.parse_sparse`; much slower. Kept simple rather than fast: it is also what the
native parser is tested against.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
Problem = tuple[str, int, bytes]

TOKEN_LIMIT = 200
_FLOAT = struct.Struct("<f")
_MOST = 2**63 - 1
_NEGATIVE = re.compile(rb"-\d+(:.*)?", re.DOTALL)
_QID = re.compile(rb"qid:\d+")
_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class _Fault(Exception):
    def __init__(self, fault: str, token: bytes) -> None:
        self.fault, self.token = fault, token[:TOKEN_LIMIT]


def _lines(buffer: bytes | mmap.mmap, start: int) -> Iterator[bytes]:
    while start < len(buffer):
        stop = buffer.find(b"\n", start)
        stop = len(buffer) if stop < 0 else stop
        yield buffer[start:stop]
        start = stop + 1


def _count_rows(buffer: bytes | mmap.mmap, start: int, rows: int) -> int:
    """Lines, where blank ones at the end count only as far as `rows` needs them."""
    lines = filled = 0
    for line in _lines(buffer, start):
        lines += 1
        filled = lines if line.strip() else filled
    return lines if rows < 0 or lines <= rows else max(filled, rows)


def _index(digits: bytes) -> int:
    digits = digits.lstrip(b"0")
    return int(digits or b"0") if len(digits) < 20 else _MOST


def _value(text: bytes) -> float | None:
    if not _NUMBER.fullmatch(text):
        return None
    return _float32(float(text))


def _float32(value: float) -> float | None:
    if math.isinf(value):  # which struct would pack without complaint
        return None
    try:
        return float(_FLOAT.unpack(_FLOAT.pack(value))[0])
    except OverflowError:
        return None


def _mend(entries: list[tuple[int, float]], duplicates: str, fault: str) -> list[tuple[int, float]]:
    """Sorted by index, duplicates merged, zeros dropped."""
    merged: dict[int, float] = {}
    repeated = set()
    for index, value in entries:
        if index not in merged:
            merged[index] = value
            continue
        repeated.add(index)
        if duplicates == "sum":
            merged[index] += value
        elif duplicates == "max":
            merged[index] = max(merged[index], value)
    if repeated and duplicates == "error":
        raise _Fault(fault, b"%d" % min(repeated))
    row = []
    for index, value in sorted(merged.items()):
        rounded = _float32(value)
        if rounded is None:
            raise _Fault("value", b"%d" % index)
        if rounded != 0.0:
            row.append((index, rounded))
    return row


def _parse_labels(text: bytes, limit: int, duplicates: str) -> list[tuple[int, float]]:
    entries = []
    for piece in text.split(b","):
        if not piece.isdigit():
            raise _Fault("label_range" if _NEGATIVE.fullmatch(piece) else "label", piece)
        label = _index(piece)
        if label >= limit:
            raise _Fault("label_range", piece)
        entries.append((label, 1.0))
    return _mend(entries, duplicates, "label_duplicate")


def _parse_token(token: bytes, limit: int, bare: bool) -> tuple[int, float]:
    digits, colon, text = token.partition(b":")
    if not digits.isdigit():
        raise _Fault("index_range" if _NEGATIVE.fullmatch(token) else "index", token)
    index = _index(digits)
    if index >= limit:
        raise _Fault("index_range", token)
    if not colon:
        if not bare:
            raise _Fault("missing_value", token)
        return index, 1.0
    value = _value(text)
    if value is None:
        raise _Fault("value", token)
    return index, value


def _parse_features(
    tokens: list[bytes], limit: int, bare: bool, duplicates: str
) -> list[tuple[int, float]]:
    if tokens and tokens[0].startswith(b"qid:"):
        if not _QID.fullmatch(tokens[0]):
            raise _Fault("index", tokens[0])
        tokens = tokens[1:]
    return _mend([_parse_token(token, limit, bare) for token in tokens], duplicates, "duplicate")


def _csr(entries: list[list[tuple[int, float]]], narrow: bool) -> Arrays:
    indptr = np.zeros(len(entries) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in entries], out=indptr[1:])
    indices = np.array(
        [index for row in entries for index, _ in row], dtype=np.int32 if narrow else np.int64
    )
    return (
        indptr,
        indices,
        np.array([value for row in entries for _, value in row], dtype=np.float32),
    )


def parse_sparse(
    buffer: bytes | mmap.mmap,
    start: int,
    rows: int,
    cols: int,
    labels: int,
    bow: bool,
    bare: bool,
    comma: bool,
    duplicates: str,
    threads: int = 1,
) -> tuple[tuple[Arrays, ...], Problem | None]:
    """See `xmlkernels._host.parse_sparse`; `threads` is not used."""
    found = _count_rows(buffer, start, rows)
    if rows >= 0 and found != rows:
        return (), ("rows", found, b"")
    col_limit, label_limit = (cols if cols >= 0 else _MOST), (labels if labels >= 0 else _MOST)
    feature_rows: list[list[tuple[int, float]]] = []
    label_rows: list[list[tuple[int, float]]] = []
    for row, line in zip(range(found), _lines(buffer, start), strict=False):
        text = line.partition(b"#")[0]
        tokens = (text.replace(b",", b" ") if comma else text).split()
        try:
            own: list[tuple[int, float]] = []
            if bow and tokens and not text[:1].isspace() and b":" not in tokens[0]:
                own = _parse_labels(tokens.pop(0), label_limit, duplicates)
            label_rows.append(own)
            feature_rows.append(_parse_features(tokens, col_limit, bare, duplicates))
        except _Fault as problem:
            return (), (problem.fault, row, problem.token)
    narrow = 0 <= cols < 2**31 and (not bow or 0 <= labels < 2**31)
    matrices = (
        (_csr(feature_rows, narrow), _csr(label_rows, narrow))
        if bow
        else (_csr(feature_rows, narrow),)
    )
    return matrices, None
