"""What a file holds, by its first bytes.

Packed text is unpacked; anything that is no text is refused in a sentence.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import shlex
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

from xmlkernels.errors import InputError

PathLike = str | os.PathLike[str]

HEAD = 8192  # bytes that are looked at
PACKED = (".gz", ".bz2", ".xz")
FREE_BYTES = 16 << 20
MOST_RATIO = 100
"""Text is packed to a third or a tenth. A file may unpack to this many times its size, and to
`FREE_BYTES` in any case.
"""
_XZ_MEMORY = 1 << 28  # `xz -9` needs 65 MiB; a forged header may ask for 4 GiB
_BLOCK = 1 << 16
_CONVERT = "write its texts to a .txt file, one per line"
_OR_PACK = "or pack it as .gz, .bz2 or .xz"
# First bytes, their offset, what the file then is, and how to get text out of it.
_MAGIC: tuple[tuple[bytes, int, str, str], ...] = (
    (b"PAR1\x15", 0, "a Parquet table", f"{_CONVERT}, for example by pandas.read_parquet"),
    (b"ARROW1", 0, "an Arrow table", f"{_CONVERT}, for example by pandas.read_feather"),
    (b"Obj\x01", 0, "an Avro file", _CONVERT),
    (b"\x89HDF\r\n", 0, "an HDF5 file", _CONVERT),
    (
        b"SQLite format 3\0",
        0,
        "an SQLite database",
        f"{_CONVERT}, for example by `sqlite3 FILE 'select …'`",
    ),
    (b"\x93NUMPY", 0, "a NumPy array", "name the file of texts or labels that belongs here"),
    (
        b"PK\x03\x04",
        0,
        "a zip archive (.npz and .xlsx are such)",
        "unpack it first, or name the .npz as one",
    ),
    (b"\x28\xb5\x2f\xfd", 0, "a zstd archive", f"unpack it first with `zstd -d`, {_OR_PACK}"),
    (b"\x04\x22\x4d\x18", 0, "an lz4 archive", f"unpack it first with `lz4 -d`, {_OR_PACK}"),
    (b"\x1f\x9d", 0, "an archive of `compress` (.Z)", "unpack it first with `uncompress`"),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7-Zip archive", "unpack it first"),
    (b"Rar!\x1a\x07", 0, "a RAR archive", "unpack it first"),
    (b"ustar\0", 257, "a tar archive", "unpack it first with `tar -xf`"),
    (b"ustar  \0", 257, "a tar archive", "unpack it first with `tar -xf`"),
    (b"%PDF-", 0, "a PDF", "extract its text first, for example with `pdftotext`"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", 0, "an old Office document", "save it as text first"),
    (b"{\\rtf", 0, "a rich text document", "save it as plain text first"),
    (
        b"version https://git-lfs.github.com/spec/",
        0,
        "a pointer of Git LFS, not the file",
        "fetch it with `git lfs pull`",
    ),
    (b"\x1f\x8b", 0, "a gzip archive inside another archive", "unpack it once first"),
    (b"1AY&SY", 4, "a bzip2 archive inside another archive", "unpack it once first"),
    (b"\xfd7zXZ\0", 0, "an xz archive inside another archive", "unpack it once first"),
)
_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


class DamagedArchive(Exception):
    """Packed data that cannot be unpacked."""


class TooMuch(Exception):
    """Packed data that unpacks to more than text does."""


class _Unpacked(io.RawIOBase):
    """A .bz2 or .xz stream, unpacked as it is read; several streams behind each other are one."""

    def __init__(self, file: IO[bytes], make: Callable[[], Any]) -> None:
        self._file, self._make, self._inner = file, make, make()

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while True:
            data = b""
            if self._inner.eof:
                data = self._inner.unused_data.lstrip(b"\0") or self._file.read(_BLOCK).lstrip(
                    b"\0"
                )
                if not data:
                    return 0
                self._inner = self._make()
            elif self._inner.needs_input:
                data = self._file.read(_BLOCK)
                if not data:
                    raise EOFError
            try:
                found = self._inner.decompress(data, len(target))
            except (OSError, lzma.LZMAError) as error:
                raise DamagedArchive(str(error)) from None
            if found:
                target[: len(found)] = found
                return len(found)


class _Counted:
    """A file that says how much of it was read; a pipe has no place to ask for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.count = file, 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.count += len(data)
        return data


class _Bounded(io.RawIOBase):
    """What an archive unpacks to, up to what text can be packed to.

    Some megabytes may hold terabytes of one byte.
    """

    def __init__(self, kind: str, inner: IO[bytes], packed: _Counted) -> None:
        self.kind, self._inner, self._packed, self._given = kind, inner, packed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        data = self._inner.read(len(target))
        self._given += len(data)
        if self._given > FREE_BYTES + MOST_RATIO * self._packed.count:
            raise TooMuch(f"{self._given:,} bytes out of {self._packed.count:,}")
        target[: len(data)] = data
        return len(data)


Unpackers = Mapping[bytes, tuple[str, Callable[[IO[bytes]], IO[bytes]]]]


def unpacked(file: io.BufferedReader, more: Unpackers | None = None) -> io.BufferedReader:
    """Return the stream behind gzip, bzip2 or xz; any other stream as it is.

    The name of the file does not matter.

    Args:
        file: the packed stream.
        more: other archives: first bytes → what the archive is called, and what unpacks it.

    Reading it raises TooMuch where it unpacks to more than `FREE_BYTES` and `MOST_RATIO` times what
    was packed.
    """
    head, packed = file.peek(8), _Counted(file)
    kind, inner = "", cast(IO[bytes], packed)
    if head.startswith(b"\x1f\x8b"):
        kind = "gzip"
        inner = cast(IO[bytes], gzip.GzipFile(fileobj=cast(IO[bytes], packed), mode="rb"))
    elif head.startswith(b"BZh") and head[4:10] in (b"1AY&SY"[: len(head[4:10])], b"\x17rE8P\x90"):
        kind, inner = "bzip2", cast(IO[bytes], _Unpacked(inner, bz2.BZ2Decompressor))
    elif head.startswith(b"\xfd7zXZ\0"):
        kind = "xz"
        inner = cast(
            IO[bytes], _Unpacked(inner, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY))
        )
    for magic, (name, unpack) in (more or {}).items():
        if head.startswith(magic):
            kind, inner = name, unpack(inner)
    return io.BufferedReader(_Bounded(kind, inner, packed), _BLOCK) if kind else file


def archive(file: io.BufferedReader) -> str:
    """Return what `unpacked` made this stream of: "gzip", "bzip2", "xz" or "".

    "" means that its bytes are those of the file.
    """
    return file.raw.kind if isinstance(file.raw, _Bounded) else ""


def check_text(name: str, head: bytes) -> None:
    """Refuse what is no UTF-8 text.

    Args:
        name: of the file, for the message.
        head: the first bytes, unpacked.

    Raises:
        InputError: the bytes are those of a table, archive, database or document, of UTF-16 or
            UTF-32, of another character set, or hold NUL.
    """
    head = head[:HEAD]
    for magic, at, what, mend in _MAGIC:
        if head[at : at + len(magic)] == magic:
            raise InputError(name, "a text file", what, mend)
    for mark, what in _MARKS:
        if head.startswith(mark):
            mend = f"convert it with `iconv -f {what.lower()} -t utf-8`"
            raise InputError(f"{name}:1", "UTF-8 text", what, mend)
    if b"\0" in head:
        line = head.count(b"\n", 0, head.index(b"\0")) + 1
        mend = (
            "name a text file; UTF-16 text is converted by iconv, stray NUL bytes go with `tr -d "
            "'\\000'`"
        )
        raise InputError(f"{name}:{line}", "UTF-8 text", "a NUL byte, as binary files hold", mend)
    text = head.decode("utf-8", "replace")
    broken = text.count("\ufffd") - 1  # the last character may be cut
    if broken > 16 and broken > len(text) // 5:
        got = f"{broken} broken characters among the first {len(text)}"
        mend = (
            "convert it with `iconv -f ENCODING -t utf-8` (GB18030, SHIFT-JIS, CP1251, …), or name "
            "a text file"
        )
        raise InputError(name, "UTF-8 text", got, mend)


# ---- what is text, but not one document a line ----

_TABLES = (".csv", ".tsv", ".tab", ".psv")
_JSON = (".json", ".jsonl", ".ndjson")
_OTHERS = (
    ".parquet",
    ".feather",
    ".arrow",
    ".orc",
    ".avro",
    ".xls",
    ".xlsx",
    ".ods",
    ".doc",
    ".docx",
    ".odt",
    ".pdf",
    ".rtf",
    ".npz",
    ".npy",
    ".pkl",
    ".pickle",
    ".pt",
    ".db",
    ".sqlite",
    ".sqlite3",
    ".zip",
    ".zst",
    ".tar",
    ".tgz",
    ".7z",
    ".rar",
)
_TEXT_COLUMNS = (
    "text",
    "texts",
    "title",
    "content",
    "body",
    "document",
    "doc",
    "abstract",
    "sentence",
    "description",
    "query",
)
_LABEL_COLUMNS = (
    "label",
    "labels",
    "target",
    "targets",
    "tag",
    "tags",
    "class",
    "classes",
    "category",
    "categories",
    "topic",
    "topics",
    "subject",
    "subjects",
    "target_ind",
    "y",
    "id",
    "uid",
)
_ENTRIES = re.compile(r"\s*(\d+(,\d+)*\s+)?\d+:[-+.\deE]+(\s+\d+:[-+.\deE]+)*\s*")
_RECORD = re.compile(r"\{\s*\"(" + "|".join(_TEXT_COLUMNS + _LABEL_COLUMNS) + r")\"\s*:")
_COUNTS = re.compile(r"\s*\d+(\s+\d+){1,2}\s*")


def bare_suffix(path: PathLike) -> str:
    """Return the suffix in lower case, without that of an archive: ".csv" of `x.csv.gz`."""
    name = os.path.basename(os.fspath(path)).lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return os.path.splitext(name)[1]


def is_json_lines(path: PathLike) -> bool:
    """Whether the name is that of a JSON lines file (.json, .jsonl, .ndjson, also packed)."""
    return bare_suffix(path) in _JSON


def check_documents(path: PathLike, head: bytes) -> None:
    """Refuse a file that holds more than one document per line.

    A table would be labelled line by line, labels and all.

    Args:
        path: a file of texts, one per line.
        head: its first bytes, unpacked.

    Raises:
        InputError: by its name or first lines it is a table, JSON, a sparse matrix, or texts with
            their labels.
    """
    name, suffix = os.fspath(path), bare_suffix(path)
    lines = head[:HEAD].decode("utf-8-sig", "replace").splitlines()
    first = lines[0].strip() if lines else ""
    columns = _columns(first)
    words = [column for column in columns if column.lower() in _TEXT_COLUMNS]
    marked = [column for column in columns if column.lower() in _LABEL_COLUMNS]
    if suffix in _TABLES or (words and marked):
        got = (
            f"a table with the columns {', '.join(columns)}"
            if words or marked
            else f"a table ({suffix})"
        )
        raise InputError(
            name,
            "texts, one per line",
            got,
            f"write its texts to a file: {_from_table(name, first, words)}",
        )
    if suffix in _OTHERS:
        raise InputError(name, "texts, one per line", f"a {suffix} file", _CONVERT)
    if suffix in _JSON or _is_record(first):
        mend = (
            "xmlkernels prepare reads it with --source lf; elsewhere write its texts to a .txt "
            "file, one per line"
        )
        if suffix not in _JSON:
            there = os.path.exists(name)
            mend = f"name the file .jsonl; {mend}" if there else "save it as a .jsonl file first"
        raise InputError(f"{name}:1", "texts, one per line", "JSON", mend)
    if first.startswith("__label__"):
        mend = f"divide them: `{_source(name)}sed 's/__label__[^ ]* *//g'` gives the texts"
        raise InputError(
            f"{name}:1", "texts, one per line", "texts behind their labels (fastText)", mend
        )
    rows = [line for line in lines[1:-1] if line.strip()]
    if rows and _COUNTS.fullmatch(first) and all(map(_ENTRIES.fullmatch, rows)):
        mend = "name the raw texts; bags of words are read with --source bow"
        raise InputError(f"{name}:1", "texts, one per line", "a sparse matrix", mend)


def _columns(line: str) -> list[str]:
    """Return the column names of a table's header by its commonest divider.

    None where the line reads as a text.
    """
    divider = max("\t,;|", key=line.count)
    columns = [column.strip().strip("\"'") for column in line.split(divider)]
    plain = all(column and len(column.split()) == 1 for column in columns)
    return columns if len(columns) > 1 and plain else []


def _from_table(name: str, header: str, words: list[str]) -> str:
    """Return the command that writes the texts of a table, one per line."""
    divider = {"\t": ", delimiter='\\t'", ";": ", delimiter=';'", "|": ", delimiter='|'"}
    commonest = max(",\t;|", key=header.count)
    reader = f"csv.DictReader(sys.stdin{divider.get(commonest, '')})"
    joined = " + ' ' + ".join(f"row['{word}']" for word in words) or "row['COLUMN']"
    # Excel begins its files with a byte order mark and ends lines inside of cells by themselves.
    opened = "sys.stdin.reconfigure(encoding='utf-8-sig', newline='')"
    program = f"import csv, sys; {opened}; [print(*({joined}).split()) for row in {reader}]"
    return f'`{_source(name)}python3 -c "{program}" > texts.txt`'


def _source(name: str) -> str:
    """Return the beginning of a pipe that gives a file's text.

    Nothing for standard input, which has no name.
    """
    if not os.path.exists(name):
        return ""
    tools = {".gz": "zcat", ".bz2": "bzcat", ".xz": "xzcat"}
    return f"{tools.get(os.path.splitext(name)[1].lower(), 'cat')} {shlex.quote(name)} | "


def _is_record(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        # Its end lies beyond the head.
        return len(line) > HEAD // 4 and _RECORD.match(line) is not None
    return isinstance(value, dict) and any(
        key in value for key in (*_TEXT_COLUMNS, *_LABEL_COLUMNS)
    )
