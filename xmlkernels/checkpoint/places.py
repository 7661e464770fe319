"""Where a checkpoint is on the disk while it is replaced, and where earlier ones go.

`folder.py` explains why. `NAME` is the checkpoint, `.NAME.old` the one that it is about to replace,
`NAME.1` the one before it and `NAME.2` the one before that, `.NAME.new-…` what is being written or
removed.
"""

from __future__ import annotations

import glob
import os
import re
import secrets
import shutil
from pathlib import Path

from xmlkernels.files import sync

# Not `files.replacing_folder`, which keeps what it replaces under a random name that no reader
# knows: readers look for `.NAME.old` between the two renames, and `.NAME.old` becomes `NAME.1`.
TENSORS, STATE = "tensors.safetensors", "state.json"
_SHARD = re.compile(r"shard-[0-9]{5,9}-of-[0-9]{5,9}[.]safetensors")


def shard_name(rank: int, size: int) -> str:
    """Name the file of a process's rows."""
    return f"shard-{rank:05}-of-{size:05}.safetensors"


def is_shard(name: str) -> bool:
    """Whether a file of that name is one of a process's rows."""
    return _SHARD.fullmatch(name) is not None


def old(target: Path) -> Path:
    """Return where the checkpoint is between the two renames of a save."""
    return target.with_name(f".{target.name}.old")


def earlier(target: Path) -> list[Path]:
    """`NAME.1`, `NAME.2`, …, as many as there are, the latest first."""
    found = {}
    for path in target.parent.glob(f"{glob.escape(target.name)}.*"):
        number = path.name.removeprefix(f"{target.name}.")
        if number.isdecimal() and str(int(number)) == number and path.is_dir():
            found[int(number)] = path
    return [found[number] for number in sorted(found)]


def holds_one(folder: Path) -> bool:
    """Whether a file of a checkpoint is there, whole or not."""
    return (folder / STATE).exists() or (folder / TENSORS).exists()


def holds_nothing_else(folder: Path) -> bool:
    """Whether a folder is empty or has the files of a checkpoint, or the tensors, alone."""
    names = {path.name for path in folder.iterdir() if not is_shard(path.name)}
    return names <= {TENSORS, STATE} and (not names or TENSORS in names)


def temporary(target: Path) -> Path:
    """Make a new folder to write the next checkpoint into."""
    fresh = _aside(target)
    fresh.mkdir()
    return fresh


def recover(target: Path, keep: int = 0) -> None:
    """Repair what a crash left.

    The old checkpoint goes back to its place; unfinished and superseded ones are removed.
    """
    if target.is_dir() and not any(target.iterdir()):
        # made by a caller; taken for a checkpoint it would cost the old one its life below
        target.rmdir()
    if not target.exists() and old(target).exists():
        os.rename(old(target), target)
        sync(target.parent)
    if target.exists():
        retire(target, keep)
    for stale in target.parent.glob(f".{glob.escape(target.name)}.new-*"):
        shutil.rmtree(stale, ignore_errors=True)


def swap_in(fresh: Path, target: Path, keep: int = 0) -> None:
    """Put the new checkpoint in place of the old one.

    The old one becomes the first of the earlier checkpoints that are kept.
    """
    # rename() cannot replace a folder that holds files, hence two steps; between them readers use
    # the old one.
    if target.exists():
        os.rename(target, old(target))
    os.rename(fresh, target)
    sync(target.parent)
    retire(target, keep)


def replace(fresh: Path, target: Path) -> None:
    """Put the new folder in place of a damaged checkpoint, which is removed."""
    away = _aside(target)
    if target.exists():
        os.rename(target, away)
    os.rename(fresh, target)
    sync(target.parent)
    shutil.rmtree(away, ignore_errors=True)


def retire(target: Path, keep: int) -> None:
    """Make `.NAME.old` the first of the earlier checkpoints, of which `keep` remain."""
    before = old(target)
    if before.exists() and keep:
        place = next(
            n for n in range(1, keep + 1) if n == keep or not _numbered(target, n).exists()
        )
        _make_room(target, _numbered(target, place))
        # Up to the first gap: whatever a crash leaves of this, it can be gone through again.
        for number in range(place, 1, -1):
            os.rename(_numbered(target, number - 1), _numbered(target, number))
        os.rename(before, _numbered(target, 1))
        sync(target.parent)
    shutil.rmtree(before, ignore_errors=True)
    for path in earlier(target):
        if int(path.name.rpartition(".")[2]) > keep:
            _drop(path)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.new-{secrets.token_hex(4)}")


def _numbered(target: Path, number: int) -> Path:
    return target.with_name(f"{target.name}.{number}")


def _make_room(target: Path, place: Path) -> None:
    """Remove an earlier checkpoint.

    One that holds a file of somebody else's is moved aside with all it holds.
    """
    _drop(place)
    if place.exists():
        os.rename(place, target.with_name(f"{target.name}.aside-{secrets.token_hex(4)}"))


def _drop(path: Path) -> None:
    """Remove an earlier checkpoint; a folder of anything else stays.

    It is renamed first, so that nobody finds half of it.
    """
    if path.exists() and holds_nothing_else(path):
        away = path.with_name(f".{path.name.rpartition('.')[0]}.new-{secrets.token_hex(4)}")
        os.rename(path, away)
        shutil.rmtree(away, ignore_errors=True)
