"""Who may write to a place: one process at a time.

The kernel releases the lock when its holder dies.

The lock is `flock` on a small file that says who holds it. For a folder that stays where it is the
file is inside, so that nothing but the folder need be writable; for a file, or a folder that is
replaced whole, it is next to it. It is removed when the holder ends; one that a kill left behind is
taken over.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from xmlkernels.errors import InputError
from xmlkernels.files import PathLike

try:
    import fcntl
except ImportError:  # not a POSIX system: the content of the file decides alone
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
Tell = Callable[[str], None]
_PART = r"\.[0-9a-f]{12}\.part"  # what the writers of `files` add to a name
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def own_folder(
    path: PathLike, flag: str = "--output", *, writes: Iterable[str] = (), wait: Tell | None = None
) -> Iterator[Path]:
    """Hold a folder for the block, and make it where it does not exist.

    One that was made and stays empty is removed.

    Args:
        path: the folder, or a symbolic link to one.
        flag: what named it, for messages.
        writes: names of files written there, whose unfinished copies of a killed process are
            cleared.
        wait: receives a line when another process holds it, which is then waited for; None refuses.

    Raises:
        InputError: another process holds it, no folder can be made there, or it cannot be written
            to.
    """
    folder = Path(path)
    made = _make(folder, flag)
    try:
        with _locked(folder, folder / LOCK, flag, wait, made):
            for name in writes:
                clear_parts(folder, name)
            yield folder
    finally:
        for empty in made:
            with suppress(OSError):
                empty.rmdir()


@contextmanager
def own_place(
    path: PathLike, flag: str = "--output", *, make: bool = False, wait: Tell | None = None
) -> Iterator[Path]:
    """Hold the place of a file, or of a folder that is replaced whole, for the block.

    A symbolic link means what it points to.

    Args:
        make: the folder above where it is not there; otherwise that is an error.
        path, flag, wait: as for `own_folder`, and its errors.
    """
    place = Path(os.path.realpath(path))
    if not make and not place.parent.is_dir():
        got = (
            f"{path}, below a file"
            if place.parent.exists()
            else f"{path}, in a folder that is not there"
        )
        raise InputError(flag, "a place in a folder", got, "make the folder, or name another")
    made = _make(place.parent, flag) if make else None
    try:
        with _locked(Path(path), place.with_name(f".{place.name}{LOCK}"), flag, wait, made):
            clear_parts(place.parent, place.name)
            yield place
    finally:
        for empty in made or ():
            with suppress(OSError):
                empty.rmdir()


def check_place(path: PathLike, flag: str = "--output") -> None:
    """Raise InputError where no folder can be made at `path`, before long work.

    A file is in the way, or there is no right to write.
    """
    place = Path(os.path.realpath(path))
    above = next(folder for folder in (place, *place.parents) if folder.exists())
    if above != place and not above.is_dir():
        raise InputError(
            flag,
            "a folder, or a name for a new one",
            f"{path} (below the file {above})",
            "name another",
        )
    if above != place and not os.access(above, os.W_OK | os.X_OK):
        raise InputError(
            flag,
            "a place that can be written",
            f"{path} (no right to write to {above})",
            "name another",
        )


def is_ours(name: str, writes: Iterable[str]) -> bool:
    """Return whether a file is a folder's lock, or an unfinished copy of a file written there."""
    return name == LOCK or any(re.fullmatch(re.escape(f".{own}") + _PART, name) for own in writes)


def clear_parts(folder: Path, name: str) -> None:
    """Remove what a killed process left of writing `name` in `folder`.

    Only the holder of the place may call it.
    """
    for found in folder.glob(f".{glob.escape(name)}.*"):
        if re.fullmatch(re.escape(f".{name}") + _PART, found.name):
            if found.is_dir() and not found.is_symlink():
                shutil.rmtree(found, ignore_errors=True)
            else:
                found.unlink(missing_ok=True)


def _make(folder: Path, flag: str) -> list[Path]:
    """Make a folder; returns those that were made, the deepest first."""
    made = []
    for above in (folder, *folder.parents):
        if above.exists() or above.is_symlink():
            break
        made.append(above)
    if folder.is_symlink() and not folder.exists():
        got = f"{folder}, a symbolic link to {os.readlink(folder)}, which is not there"
        raise InputError(
            flag, "a folder, or a name for a new one", got, "make that folder, or name another"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file of that name, or as a parent; no right to write
        reason = "a file" if isinstance(error, FileExistsError) else error.strerror
        raise InputError(
            flag, "a folder, or a name for a new one", f"{folder} ({reason})", "name another"
        ) from error
    return made


@contextmanager
def _locked(
    place: Path, lock: Path, flag: str, wait: Tell | None, made: list[Path] | None
) -> Iterator[None]:
    """Hold the lock; `made` are folders for it, which a holder before may remove: None makes none.

    Those that are made anew are added to it.
    """
    told = False
    while isinstance(handle := _take(lock, place, flag, made), InputError):
        if wait is None:
            raise handle
        if not told:
            wait(f"note: {place} is in use: {handle.got}; waiting for it")
            told = True
        time.sleep(0.2)
    try:
        yield
    finally:
        # Removed while it is held: whoever opened it meanwhile finds another file of that name, or
        # none, and begins again.
        with suppress(OSError):
            lock.unlink()
        os.close(handle)


def _take(lock: Path, place: Path, flag: str, made: list[Path] | None) -> int | InputError:
    """Return the locked file's descriptor, or the error that names its holder."""
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if made is not None and not lock.parent.exists():
                # Its holder was interrupted, and has removed the empty folder that it had made.
                made[:] = dict.fromkeys([*made, *_make(lock.parent, flag)])
                continue
            reason = error.strerror
            raise InputError(
                flag, "a place that can be written", f"{place} ({reason})", "name another"
            ) from error
        try:
            taken = _flock(handle)
            if taken and not _is_file(handle, lock):
                os.close(handle)
                continue  # its holder ended and removed it in between
            holder = _holder(lock) if taken else _holder(lock, patient=True)
            elsewhere = bool(holder) and not _here(holder)
            if taken is False or elsewhere or (taken is None and _lives(holder)):
                os.close(handle)
                mend = "wait for its end, or name another"
                if elsewhere:
                    mend = (
                        f"wait for its end or name another; if that process is gone, remove {lock}"
                    )
                return InputError(flag, f"{place} for this command alone", _told(holder), mend)
            os.ftruncate(handle, 0)
            os.write(handle, (json.dumps(_own()) + "\n").encode())
            return handle
        except OSError as error:
            os.close(handle)
            with suppress(OSError):
                lock.unlink()
            raise InputError(
                flag,
                "a place that can be written",
                f"{place} ({error.strerror})",
                "make room, or name another",
            ) from error


def _flock(handle: int) -> bool | None:
    """Whether the lock is ours now; None where the file system knows no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        raise
    return True


def _is_file(handle: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


def _own() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": _boot(),
        "command": _command(),
        "since": since,
    }


def _command() -> str:
    """Name this program; of a command of this package, which one."""
    program = Path(sys.argv[0])
    if program.name in ("__main__.py", "xmlkernels"):
        return " ".join(["xmlkernels", *sys.argv[1:2]])
    return program.name or "python"


def _boot() -> str:
    """Return what tells this kernel from others; "" where it is not known.

    Containers may have host names of their own.
    """
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _holder(lock: Path, *, patient: bool = False) -> dict[str, Any]:
    """Return what the file says.

    It may have been taken an instant ago and say nothing yet.
    """
    for _ in range(10 if patient else 1):
        with suppress(OSError, ValueError):
            found = json.loads(lock.read_text())
            if isinstance(found, dict):
                return found
        if patient:
            time.sleep(0.02)
    return {}


def _here(holder: dict[str, Any]) -> bool:
    return holder.get("host") == socket.gethostname() or (holder.get("boot") or "?") == _boot()


def _lives(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _told(holder: dict[str, Any]) -> str:
    if not holder:
        return "held by another process"
    pid, command, host, since = (
        holder.get(name, "?") for name in ("pid", "command", "host", "since")
    )
    return f"held by process {pid} ({command}) on {host} since {since}"
