"""What readers and writers of files share: opening, unpacking, quoting, replacing whole."""

from __future__ import annotations

import errno
import glob
import gzip
import io
import mmap
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, cast

from xmlkernels.errors import InputError
from xmlkernels.file_kinds import (
    HEAD,
    MOST_RATIO,
    DamagedArchive,
    PathLike,
    TooMuch,
    Unpackers,
    archive,
    check_text,
    unpacked,
)

__all__ = [
    "DataWarning",
    "PathLike",
    "at_line",
    "check_file",
    "empty_file",
    "map_bytes",
    "naming",
    "open_bytes",
    "quote",
    "reason_of",
    "recover_folder",
    "replacing",
    "replacing_folder",
    "share_read",
    "sync",
]


_reading: dict[str, IO[bytes]] = {}  # by name, as they are on disk


class DataWarning(UserWarning):
    """Something in a data file was changed or left out.

    The message names the file, the place and the count.
    """


def quote(token: bytes | str, limit: int = 40) -> str:
    """Return a token for a message: quoted, printable, at most `limit` characters of it."""
    text = token.decode("utf-8", "backslashreplace") if isinstance(token, bytes) else token
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}…"


def at_line(path: PathLike, line: int) -> str:
    """Return `file:line`, lines counted from 1."""
    return f"{os.fspath(path)}:{line}"


def check_file(path: PathLike, *, may_be_empty: bool = False) -> Path:
    """Return the path of a file that exists and holds something.

    Raises:
        InputError: there is nothing, or a folder, or the file is empty.
    """
    name, path = os.fspath(path), Path(path)
    try:
        stat = path.stat()
    except FileNotFoundError:
        raise InputError(name, "a file", "no file of that name", "check the path") from None
    except OSError as error:
        raise InputError(
            name, "a readable file", str(error.strerror or error), "check the path"
        ) from None
    if path.is_dir():
        raise InputError(name, "a file", "a folder", "name the file inside it")
    if stat.st_size == 0 and path.is_file() and not may_be_empty:
        raise empty_file(path)
    return path


def empty_file(path: PathLike) -> InputError:
    """Make the error for a file without content."""
    return InputError(
        os.fspath(path), "at least one line", "an empty file", "make or fetch the file again"
    )


@contextmanager
def open_bytes(
    path: PathLike, *, may_be_empty: bool = False, more: Unpackers | None = None, utf8: bool = True
) -> Iterator[io.BufferedReader]:
    """Open a text file as a stream of bytes, unpacked where it starts as gzip, bzip2 or xz do.

    The name of the file does not matter.

    Args:
        path: the file.
        may_be_empty: whether a file without a byte is taken.
        more: other archives, see `unpacked`.
        utf8: whether it must be text in UTF-8.

    Raises:
        InputError: as `check_file`; the file holds no text (`kinds.check_text`); or an archive is
            cut short, damaged or unpacks to far more than text does (then while it is read).
    """
    path = check_file(path, may_be_empty=may_be_empty)
    name = os.fspath(path)
    try:
        opened = path.open("rb")
    except OSError as error:
        raise InputError(
            name, "a readable file", str(error.strerror), "change its rights"
        ) from None
    kind = ""
    try:
        with opened as file:
            _reading[name] = file
            stream = unpacked(file, more)
            kind = archive(stream)
            if utf8:
                check_text(name, stream.peek(HEAD))
            yield stream
    except EOFError:
        raise InputError(
            name, f"a whole {kind} file", "one that is cut short", "fetch the file again"
        ) from None
    except (gzip.BadGzipFile, zlib.error, DamagedArchive) as error:
        raise InputError(
            name, f"a whole {kind} file", f"damaged data ({error})", "fetch the file again"
        ) from None
    except TooMuch as error:
        expected = f"text, which unpacks to at most {MOST_RATIO} times its {kind} file"
        raise InputError(
            name, expected, str(error), "check the file; unpack it first if that is right"
        ) from None
    finally:
        _reading.pop(name, None)


def share_read(path: PathLike) -> float | None:
    """Return how much of a file is read, from 0 to 1: one that `open_bytes` holds open.

    None of another one, and where there is no telling. Of an archive its packed bytes count.
    """
    file = _reading.get(os.fspath(path))
    try:
        if file is None or not (size := os.fstat(file.fileno()).st_size):
            return None
        return min(1.0, os.lseek(file.fileno(), 0, os.SEEK_CUR) / size)
    except (OSError, ValueError):  # a pipe, or closed meanwhile
        return None


@contextmanager
def map_bytes(path: PathLike, *, may_be_empty: bool = False) -> Iterator[bytes | mmap.mmap]:
    """Give the whole (unpacked) file as one buffer.

    Memory-mapped where it can be, else in memory.
    """
    with open_bytes(path, may_be_empty=may_be_empty) as file:
        if archive(file) or not Path(path).is_file() or os.fstat(file.fileno()).st_size == 0:
            content = _all(file, os.fspath(path))
            if not content and not may_be_empty:
                raise empty_file(path)
            yield content
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            with suppress(AttributeError, OSError):  # a hint, absent on some systems
                view.madvise(mmap.MADV_SEQUENTIAL)
            yield view


def _all(file: io.BufferedReader, name: str) -> bytes:
    try:
        return file.read()
    except MemoryError:
        mend = "use a larger machine, or unpack the file first"
        raise InputError(name, "a file that fits into memory", "more than is free", mend) from None


@contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Give an OSError of the block the name of the file.

    It may come from a stream without a name.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextmanager
def replacing(path: PathLike) -> Iterator[IO[bytes]]:
    """Give a stream whose content takes the place of `path` when the block ends well.

    Written next to the target, synced, then renamed: a reader or a crash sees the old file or the
    new one, never a part. A name that ends in `.gz` is compressed, with no time stamp inside, so
    equal content gives equal bytes.

    A symbolic link stays, and what it points to is replaced.

    Raises:
        InputError: the folder does not exist or cannot be written.
        OSError: the disk refuses (full, say), with the path as its file name; the old file is then
            unchanged.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise InputError(
            os.fspath(path), "a file, or a name for a new one", "a folder", "choose another name"
        )
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        descriptor = os.open(
            part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666
        )
    except OSError as error:
        raise InputError(
            os.fspath(path),
            "a folder that can be written",
            str(error.strerror),
            "make the folder or choose another",
        ) from error
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
            if path.suffix == ".gz":
                with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
                    yield cast(IO[bytes], packed)
            else:
                yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every file system lets a folder be synced
        sync(path.parent)


@contextmanager
def replacing_folder(
    path: PathLike, *, replace: bool, check: Callable[[Path], None]
) -> Iterator[Path]:
    """Give a new folder that takes the place of `path` when the block ends without an exception.

    The block writes and syncs what it puts there. An exception removes the new folder and leaves
    what was at `path`. Between the two renames nothing is at `path`: `recover_folder` puts the old
    folder back if the process is killed there.

    Args:
        path: Place of the folder.
        replace: Whether an existing folder goes; only once the new one is whole.
        check: Raises an InputError for an existing folder that must stay.

    Raises:
        InputError: The folder cannot be made, `check` refuses, or another process made one here
            meanwhile.
        OSError: The disk refuses (full, say), with a file name.
    """
    output = Path(path).resolve()
    folder = output.with_name(f".{output.name}.{secrets.token_hex(6)}.part")
    old = folder.with_suffix(".old")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            str(output), "a place to make a folder", str(error.strerror), "choose another"
        ) from error
    try:
        with naming(output):
            yield folder
        if replace and output.exists():
            check(output)
            os.rename(output, old)
        try:
            os.rename(folder, output)
        except OSError as error:
            if old.exists():
                os.rename(old, output)
            raise InputError(
                str(output), "nothing there", "a folder made meanwhile", "run the command again"
            ) from error
        sync(output.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():  # stopped between the two renames
            os.rename(old, output)


def recover_folder(path: Path, marker: str) -> None:
    """Repair what a process killed inside `replacing_folder` left; call it while holding the place.

    Args:
        path: Place of the folder.
        marker: Name of the file that a whole folder holds.
    """
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.old"):
        if not re.fullmatch(re.escape(f".{path.name}") + r"\.[0-9a-f]{12}\.old", old.name):
            continue
        if not path.exists() and (old / marker).is_file():
            os.rename(old, path)
        else:
            shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Call fsync for a file or, where the system allows it, for a folder and the renames in it."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason_of(error: Exception) -> str:
    """Return one sentence for what the system refused: which file, why, and what to do."""
    if not isinstance(error, OSError):
        return str(error)
    # NumPy says how many values it could not write, and no reason.
    reason = error.strerror or f"{error.args[0] if error.args else error!r}; is the disk full?"
    where = "standard output" if error.filename is None else str(error.filename)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, None):
        return f"{where} could not be written: {reason}; make room there, or name another place"
    return f"{where} could not be used: {reason}"
