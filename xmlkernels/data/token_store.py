"""Ragged token ids in one file, read row by row.

The file, little-endian throughout::

    bytes 0-7      magic b"XMKTOKEN"
    bytes 8-15     uint32 format version, uint32 length of the JSON text
    bytes 16-1023  JSON header, padded with spaces
    then           int64 offsets [rows + 1], counted in tokens
    then           tokens, uint16 where the vocabulary has fewer than 65,536 entries, else uint32

Only real tokens are stored: no padding, no attention mask (upstream's int64 maps take 16 bytes for
every position).
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self, TypedDict

import numpy as np

from xmlkernels.errors import InputError
from xmlkernels.files import replacing
from xmlkernels.records import Count, Positive, parse_record

MAGIC = b"XMKTOKEN"
FORMAT_VERSION = 1
HEADER_BYTES = 1024
SCAN_BYTES = 64 << 20
"""Tokens of a file up to this size are all read when it is opened; those of a larger one when a
batch takes them.
"""


class HeaderValues(TypedDict):
    """The JSON of a header."""

    rows: Count
    tokens: Count
    dtype: str
    vocab_size: Positive
    tokenizer_hash: str
    max_length: Positive
    pad_id: Count


@dataclass(frozen=True)
class TokenHeader:
    """The header of a token file.

    `tokens` counts all rows together; `max_length` is the cut per row.
    """

    rows: int
    tokens: int
    dtype: str
    vocab_size: int
    tokenizer_hash: str
    max_length: int
    pad_id: int

    @property
    def file_bytes(self) -> int:
        """Size in bytes that a whole file with this header has."""
        return HEADER_BYTES + 8 * (self.rows + 1) + self.tokens * np.dtype(self.dtype).itemsize


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32."""
    return np.dtype("<u2" if vocab_size < 65_536 else "<u4")


class TokenWriter:
    """Writes a token file row by row; it appears under its name only when all rows are there.

    Args:
        path: the file to make (replaced when it exists).
        rows: number of rows that will be appended.
        vocab_size: ids are checked to lie in [0, vocab_size).
        tokenizer_hash, max_length, pad_id: copied into the header.

    Use as a context manager. Leaving it with an exception removes what was written.
    """

    def __init__(
        self,
        path: str | Path,
        rows: int,
        *,
        vocab_size: int,
        tokenizer_hash: str,
        max_length: int,
        pad_id: int,
    ) -> None:
        self.path, self.rows = Path(path), rows
        self._dtype = token_dtype(vocab_size)
        self._header = TokenHeader(
            rows, 0, self._dtype.str, vocab_size, tokenizer_hash, max_length, pad_id
        )
        self._offsets = np.zeros(rows + 1, np.dtype("<i8"))
        self._done = 0

    def __enter__(self) -> Self:
        self._replacing = replacing(self.path)
        self._file = self._replacing.__enter__()
        self._file.seek(HEADER_BYTES + self._offsets.nbytes)
        return self

    def append(self, tokens: Sequence[np.ndarray]) -> None:
        """Add one row per array of integer ids.

        Raises:
            ValueError: For an id outside the vocabulary or a row too many.
        """
        if not tokens:
            return
        self.append_flat(
            np.concatenate(tokens), np.fromiter((len(row) for row in tokens), np.int64, len(tokens))
        )

    def append_flat(self, flat: np.ndarray, lengths: np.ndarray) -> None:
        """Add `len(lengths)` rows whose ids lie one behind the other in `flat`."""
        if self._done + len(lengths) > self.rows:
            raise ValueError(f"{self.path}: more rows than the {self.rows} announced")
        if flat.size and (flat.min() < 0 or flat.max() >= self._header.vocab_size):
            bad = int(flat.min()) if flat.min() < 0 else int(flat.max())
            raise ValueError(
                f"{self.path}: token id {bad} outside a vocabulary of {self._header.vocab_size}"
            )
        stop = self._done + len(lengths)
        self._offsets[self._done + 1 : stop + 1] = self._offsets[self._done] + np.cumsum(lengths)
        self._done = stop
        self._file.write(flat.astype(self._dtype).tobytes())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._replacing.__exit__(kind, error, at)
            return
        try:
            self._write_header()
        except ValueError as failure:
            self._replacing.__exit__(ValueError, failure, None)
            raise
        self._replacing.__exit__(None, None, None)

    def _write_header(self) -> None:
        if self._done != self.rows:
            raise ValueError(f"{self.path}: {self._done} rows written of the {self.rows} announced")
        text = json.dumps(asdict(self._header) | {"tokens": int(self._offsets[-1])}).encode()
        head = MAGIC + np.array([FORMAT_VERSION, len(text)], "<u4").tobytes() + text
        if len(head) > HEADER_BYTES:
            raise ValueError(f"{self.path}: header of {len(head)} bytes, room for {HEADER_BYTES}")
        self._file.seek(0)
        self._file.write(head.ljust(HEADER_BYTES))
        self._file.write(self._offsets.tobytes())


class TokenStore:
    """Read-only rows of token ids.

    Nothing but a small file's ids is read from disk before it is asked for.

    `store[i]` is row i, uint16 or uint32; `lengths` int32 [rows]; `offsets` int64 [rows + 1], in
    memory. Pickling carries the path, so a process that receives a store opens the same file again.

    Rows are read, not mapped: a map of a file that is cut ends the process (SIGBUS), a read comes
    back short. Ids are below the vocabulary's size: all are read for that when a file of up to
    `SCAN_BYTES` of them is opened, those of a larger one whenever they are handed out. Before they
    are, the file is looked at too: one that was cut or written to since it was opened is an
    InputError.
    """

    def __init__(self, path: Path, header: TokenHeader) -> None:
        self.path, self.header = path, header
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._handle)
        self._stood = self._stands()
        if self._stood[0] != header.file_bytes:
            got = f"{self._stood[0]} bytes"
            raise InputError(
                str(path),
                f"{header.file_bytes} bytes, as its header says",
                got,
                "copy or prepare it again",
            )
        self.offsets = np.empty(header.rows + 1, "<i8")
        self._first = HEADER_BYTES + self.offsets.nbytes  # where the ids begin
        self._read_into(self.offsets, HEADER_BYTES)
        self._known = False  # whether every id was seen to lie in the vocabulary

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """Open a token file.

        Raises:
            InputError: the file is missing, is no token file, has another format version, was cut
                short, or has rows or ids that its header does not allow.
        """
        path = Path(path)
        store = cls(path, _read_header(path))
        header, lengths = store.header, np.diff(store.offsets)
        if (
            store.offsets[0] != 0
            or store.offsets[-1] != header.tokens
            or (store.offsets[1:] < store.offsets[:-1]).any()
        ):
            raise InputError(
                str(path),
                "row offsets that rise from 0 to the number of tokens",
                "others",
                "prepare it again",
            )
        if lengths.size and lengths.max() > header.max_length:
            row = int(lengths.argmax())
            expected = f"at most {header.max_length} tokens, as its header says"
            raise InputError(f"{path}, row {row}", expected, str(lengths[row]), "prepare it again")
        if header.file_bytes - store._first <= SCAN_BYTES:
            _ = store.tokens
        return store

    @property
    def tokens(self) -> np.ndarray:
        """All ids, one row behind the other, read into memory."""
        self._check_file()
        ids = np.empty(self.header.tokens, self.header.dtype)
        self._read_into(ids, self._first)
        if not self._known:
            self._check_ids(ids)
            self._known = True
        return ids

    def _read_into(self, target: np.ndarray, at: int) -> None:
        """Fill an array with the file's bytes from `at` on.

        Raises:
            InputError: Where the file ends before.
        """
        view = target.view(np.uint8).data
        while len(view):
            if not (count := _read_at(self._handle, view, at)):
                self._check_file()
                raise InputError(
                    str(self.path),
                    "a file that stands still",
                    "one that ends early",
                    "start the run again",
                )
            view, at = view[count:], at + count

    def _stands(self) -> tuple[int, int]:
        stat = os.fstat(self._handle)
        return stat.st_size, stat.st_mtime_ns

    def _check_file(self) -> None:
        if (now := self._stands()) != self._stood:
            got = f"{now[0]} bytes" if now[0] != self._stood[0] else "one that was written to"
            mend = "leave a dataset alone while a run uses it, and start the run again"
            raise InputError(
                str(self.path),
                f"the {self._stood[0]} bytes that were there when it was opened",
                got,
                mend,
            )

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.size and ids.max() >= self.header.vocab_size:
            expected = f"token ids below {self.header.vocab_size}, the size of the vocabulary"
            raise InputError(str(self.path), expected, str(ids.max()), "copy or prepare it again")

    def __len__(self) -> int:
        return self.header.rows

    def __getitem__(self, row: int) -> np.ndarray:
        row = int(row)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of a token file with {len(self)} rows")
        return self.gather(np.array([row % len(self)]))[0]

    def __reduce__(self) -> tuple[Callable[[Path], TokenStore], tuple[Path]]:
        return TokenStore.open, (self.path,)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per row, int32 [rows]."""
        return np.diff(self.offsets).astype(np.int32)

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of `rows`, concatenated, and the length of each.

        (ids [sum of n], n int64 [rows]).
        """
        self._check_file()
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        ids, done = np.empty(int(lengths.sum()), self.header.dtype), 0
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            self._read_into(ids[done : done + length], self._first + start * ids.itemsize)
            done += length
        if not self._known:
            self._check_ids(ids)
        return ids, lengths


if hasattr(os, "preadv"):

    def _read_at(handle: int, view: memoryview, at: int) -> int:
        # It has no place of its own in the file, which threads and forked processes would share.
        return os.preadv(handle, [view], at)

else:
    _turn = threading.Lock()

    def _read_at(handle: int, view: memoryview, at: int) -> int:
        with _turn:
            os.lseek(handle, at, os.SEEK_SET)
            data = os.read(handle, len(view))
        view[: len(data)] = data
        return len(data)


def _read_header(path: Path) -> TokenHeader:
    if not path.is_file():
        raise InputError(
            str(path), "a token file", "no such file", "run xmlkernels prepare to make it"
        )
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    if head[:8] != MAGIC:
        raise InputError(
            str(path),
            f"a token file, which starts with {MAGIC!r}",
            repr(head[:8]),
            "prepare it again",
        )
    if len(head) < HEADER_BYTES:
        raise InputError(
            str(path), f"a header of {HEADER_BYTES} bytes", f"{len(head)} bytes", "copy it again"
        )
    version, length = (int(value) for value in np.frombuffer(head, "<u4", 2, 8))
    if version != FORMAT_VERSION:
        raise InputError(
            str(path), f"format version {FORMAT_VERSION}", f"version {version}", "prepare it again"
        )
    where = f"{path}, header"
    if length > HEADER_BYTES - 16:
        raise InputError(
            where,
            f"JSON of at most {HEADER_BYTES - 16} bytes",
            f"{length} bytes",
            "prepare it again",
        )
    values = parse_record(
        head[16 : 16 + length], HeaderValues, where=where, mend="prepare it again"
    )
    header = TokenHeader(**{field.name: values[field.name] for field in fields(TokenHeader)})  # type: ignore[literal-required]
    if (
        header.vocab_size > 2**32
        or header.dtype != token_dtype(header.vocab_size).str
        or header.pad_id >= header.vocab_size
    ):
        raise InputError(where, "a consistent header", str(values), "prepare it again")
    return header
