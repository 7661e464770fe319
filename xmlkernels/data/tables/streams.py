"""Files of tables: standard input, archives, part files of a folder, and lines of text."""

from __future__ import annotations

import io
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

from xmlkernels.data.formats.text_lines import LONGEST_LINE, line_too_long
from xmlkernels.errors import InputError
from xmlkernels.file_kinds import HEAD, DamagedArchive
from xmlkernels.files import at_line, check_file, open_bytes, quote

STDIN = "standard input"
PACKED = (".gz", ".zst", ".bz2", ".xz")
_ZSTD = b"\x28\xb5\x2f\xfd"


class _Zstd(io.RawIOBase):
    """A .zst stream, unpacked as it is read, by pyarrow's codec."""

    def __init__(self, file: IO[bytes]) -> None:
        import pyarrow

        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(_Seekless(file)), "zstd")

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        try:
            return bytes(self._stream.read(size))
        except OSError as error:
            raise DamagedArchive(str(error).partition(".")[0]) from None


class _Seekless(io.RawIOBase):
    """A stream as pyarrow asks for one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)


MORE = {_ZSTD: ("zstd", lambda file: cast(IO[bytes], _Zstd(file)))}


@contextmanager
def open_table(path: Path, encoding: str = "utf-8") -> Iterator[io.BufferedReader]:
    """Open a file of text, packed or not; see `open_bytes` for what is refused."""
    with open_bytes(path, more=MORE, utf8=_is_utf8(encoding)) as stream:
        yield stream


@contextmanager
def open_text(
    path: Path, encoding: str, *, repair: bool, newline: str | None = None
) -> Iterator[io.TextIOWrapper]:
    """Open a text file.

    Args:
        path: plain or packed.
        encoding: of its text; a mark of UTF-8 at its beginning is left out.
        repair: replace what is not of that encoding by U+FFFD; otherwise it is refused.
        newline: see `open`.

    Raises:
        InputError: names the line that is of another encoding, or what `open_bytes` refuses.
    """
    name = "utf-8-sig" if _is_utf8(encoding) else encoding
    errors = "replace" if repair else "strict"
    try:
        with (
            open_table(path, encoding) as stream,
            io.TextIOWrapper(stream, name, errors, newline) as text,
        ):
            yield text
    except UnicodeError as error:
        raise _of_another_encoding(path, encoding, error) from None


def _is_utf8(encoding: str) -> bool:
    return encoding.lower().replace("_", "-") in ("utf-8", "utf8", "utf-8-sig")


def _of_another_encoding(path: Path, encoding: str, error: UnicodeError) -> InputError:
    """Find the line that cannot be decoded, which a stream of text does not say."""
    where, got = str(path), str(error)
    with open_table(path, encoding) as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError as broken:
                where = at_line(path, number)
                around = line[max(0, broken.start - 12) : broken.start + 12]
                got = f"the byte 0x{line[broken.start]:02x} in {quote(around.strip())}"
                break
    mend = (
        "name the encoding, as --encoding cp1252 for files of Windows, or replace such characters "
        "with --repair-encoding"
    )
    return InputError(where, f"text in {encoding.upper()}", got, mend)


def lines_of(path: Path, encoding: str, *, repair: bool) -> Iterator[tuple[int, str]]:
    """Stream (line number from 1, line without its end), blank lines left out.

    Raises:
        InputError: a line of more than 2^24 characters, or as `open_text`.
    """
    with open_text(path, encoding, repair=repair) as text:
        number = 0
        while line := text.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise line_too_long(at_line(path, number))
            if line := line.rstrip("\r\n"):
                yield number, line


def beginning(path: Path, encoding: str = "utf-8") -> str:
    """Return the first characters of a file, unpacked, whatever they are."""
    with open_bytes(path, more=MORE, utf8=False) as stream:
        head = stream.peek(HEAD)[:HEAD] or stream.read(1)
    name = "utf-8-sig" if _is_utf8(encoding) else encoding
    return head.decode(name, "replace")


# ---- where they are ----


@cache
def _spool() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="xmlkernels-")


@cache
def from_stdin() -> Path:
    """Keep what comes from standard input in a file, once: it is read more than one time."""
    path = Path(_spool().name) / STDIN
    stream: Any = getattr(sys.stdin, "buffer", sys.stdin)
    with open(path, "wb") as file:
        shutil.copyfileobj(stream, file)
    if path.stat().st_size == 0:
        raise InputError(STDIN, "a table", "nothing", "pipe one into the command")
    return path


def located(path: Path) -> Path:
    """Return the file or folder that a flag names; `-` is what comes from standard input."""
    if str(path) == "-":
        return from_stdin()
    return path if path.is_dir() else check_file(path)


def suffix_of(path: Path) -> str:
    """Return the suffix in lower case, without that of an archive: ".csv" of `x.csv.zst`."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def parts_of(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """List the part files of a folder, by name.

    Raises:
        InputError: there is none.
    """
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and suffix_of(path) in suffixes and not _hidden(path, folder)
    )
    if not found:
        others = sorted(path.name for path in folder.iterdir())[:3]
        got = f"{', '.join(others)} …" if others else "an empty folder"
        expected = f"files of a table ({', '.join(suffixes)})"
        raise InputError(str(folder), expected, got, "name the file, or the folder that holds them")
    return found


def _hidden(path: Path, folder: Path) -> bool:
    """Return whether a file is no data: Spark's `_SUCCESS`, checksums, caches."""
    return any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)


_SPLITS = re.compile(r"(train|trn|validation|valid|val|dev|test|tst)(?![a-z])", re.IGNORECASE)
NAMES = {
    "train": "train", "training": "train", "trn": "train",
    "validation": "val", "valid": "val", "val": "val", "dev": "val", "development": "val",
    "test": "test", "tst": "test", "testing": "test",
}  # fmt: skip


def split_of(path: Path) -> str | None:
    """Return the split that the name of a part file begins with; None for none."""
    match = _SPLITS.match(path.name)
    return NAMES[match[1].lower()] if match else None
