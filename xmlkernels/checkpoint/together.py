"""Save one checkpoint by several processes: all of it is in place, or none.

Each process writes the rows that it holds alone into the one new folder. The first writes the rest
and puts the folder in place when all files are on the disk. They meet by texts on a board and never
by the messages of the training loop, which may go on meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from xmlkernels.checkpoint.contents import refuse_foreign, write
from xmlkernels.checkpoint.head import RowRange
from xmlkernels.checkpoint.places import recover, shard_name, swap_in, temporary
from xmlkernels.checkpoint.shards import OwnFile, write_shard
from xmlkernels.checkpoint.state import encode
from xmlkernels.checkpoint.writing import unshared
from xmlkernels.errors import InputError

_LOOK = 0.02  # seconds between two looks at the board
_APPEARS = 30.0  # seconds after which a file of another process must be seen; NFS may take some


class Group(Protocol):
    """The processes that save together, as one of them sees them.

    Attributes:
        rank, size: this process's number, and how many there are.
    """

    rank: int
    size: int

    def post(self, key: str, text: str) -> None:
        """Leave a text for the others in place of the last one of that name."""

    def read(self, key: str) -> str | None:
        """Return the text of that name; None where there is none yet."""

    def check(self) -> None:
        """Raise an error where another process has ended."""


@dataclass(frozen=True)
class Content:
    """What is saved.

    Attributes:
        stored: whole tensors, as `TensorFile` takes them.
        alias: other names of them.
        own: rows that this process alone holds, likewise.
        shards: which rows they are.
        text: the state as JSON.
    """

    stored: Mapping[str, torch.Tensor]
    alias: Mapping[str, str]
    own: Mapping[str, torch.Tensor]
    shards: Mapping[str, RowRange]
    text: str


def arrange(
    tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], shards: Mapping[str, RowRange]
) -> Content:
    """Make tensors and a state ready to be saved; see `folder.save`.

    Raises:
        InputError: as `save`.
    """
    text = json.dumps(encode(state), ensure_ascii=False, allow_nan=False)
    for name, rows in shards.items():
        if name not in tensors or len(tensors[name]) != rows.end - rows.first:
            got = f"{len(tensors[name])} rows" if name in tensors else "none"
            expected = f"rows {rows.first:,} to {rows.end:,} of it"
            raise InputError(f"tensor {name!r}", expected, got, "pass the shard that it is")
    stored, alias = unshared({name: t for name, t in tensors.items() if name not in shards})
    own, same = unshared({name: tensors[name] for name in shards})
    own |= {name: own[first] for name, first in same.items()}
    return Content(stored, alias, own, shards, text)


def write_together(
    target: Path,
    content: Content,
    keep: int,
    identity: str,
    group: Group | None = None,
    then: Callable[[], None] | None = None,
) -> None:
    """Write a checkpoint in place of an earlier one; every process of a group calls it.

    Args:
        target: the folder, a resolved path.
        content: what `arrange` gave.
        keep: earlier checkpoints that stay.
        identity: of the checkpoint, the same in every process and never used before.
        group: None for one process.
        then: what the first process does when the checkpoint is in place, and the others wait for.

    Raises:
        InputError: something else is at `target`, or the processes share no file system.
        OSError: the disk of one process refuses; all raise it, and the old checkpoint is unchanged.
    """
    meeting = None if group is None or group.size == 1 else _Meeting(group, identity)
    if meeting is None and content.shards:
        whole = [name for name, rows in content.shards.items() if rows.end - rows.first < rows.rows]
        if whole:
            raise InputError(
                f"tensor {whole[0]!r}",
                "all rows of it, or the other processes",
                "some rows",
                "pass the group of processes",
            )
        content = Content({**content.stored, **content.own}, content.alias, {}, {}, content.text)
    if meeting is not None and meeting.group.rank > 0:
        _follow(target, content, meeting)
        return
    fresh: Path | None = None
    try:
        refuse_foreign(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target, keep)
        fresh = temporary(target)
        files = None if meeting is None else _gather(fresh, content, meeting)
        write(fresh, content.stored, content.alias, content.text, identity, files)
        swap_in(fresh, target, keep)
        if then is not None:
            then()
    except BaseException as error:
        _name(error, target)
        if meeting is not None:
            meeting.say("end", _told(error))
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
            recover(target, keep)
        raise
    if meeting is not None:
        meeting.say("end", {})


def _gather(fresh: Path, content: Content, meeting: _Meeting) -> dict[str, OwnFile] | None:
    """Write the first process's rows and wait for those of the others, which are then on the disk.

    Returns:
        What each says of its file; None where nobody has rows of its own.
    """
    group, sharded = meeting.group, bool(content.own)
    meeting.say("place", {"folder": fresh.name})
    files: dict[str, OwnFile] = {}
    if sharded:
        name = shard_name(0, group.size)
        files[name] = write_shard(fresh / name, content.own, content.shards, meeting.identity)
    for rank in range(1, group.size):
        told = meeting.wait(f"part/{rank}")
        _raise(told)
        if sharded != (told["file"] is not None):
            raise ValueError(f"process {rank} and this one do not shard the same tensors")
        if sharded:
            name = shard_name(rank, group.size)
            files[name] = told["file"]
            _check_there(fresh / name, told["file"]["facts"]["bytes"], rank)
    return files if sharded else None


def _follow(target: Path, content: Content, meeting: _Meeting) -> None:
    """Write another process's rows, and wait until the first has put all in place."""
    told = meeting.wait("place", "end")
    if "folder" in told:
        rank, size = meeting.group.rank, meeting.group.size
        own: OwnFile | None = None
        try:
            if content.own:
                fresh = target.with_name(told["folder"])
                _check_folder(fresh, meeting)
                path = fresh / shard_name(rank, size)
                own = write_shard(path, content.own, content.shards, meeting.identity)
        except BaseException as error:
            _name(error, target)
            meeting.say(f"part/{rank}", _told(error))
            if not isinstance(error, (OSError, InputError)):
                raise
        else:
            meeting.say(f"part/{rank}", {"file": own})
        told = meeting.wait("end")
    _raise(told)


class _Meeting:
    """One save of a group."""

    def __init__(self, group: Group, identity: str) -> None:
        self.group, self.identity = group, identity

    def say(self, key: str, told: Mapping[str, Any]) -> None:
        self.group.post(f"save/{key}", json.dumps({"identity": self.identity, **told}))

    def wait(self, *keys: str) -> dict[str, Any]:
        """Return what is said in this save under one of the names."""
        while True:
            for key in keys:
                if (told := self.said(key)) is not None:
                    return told
            self.group.check()
            time.sleep(_LOOK)

    def said(self, key: str) -> dict[str, Any] | None:
        """Return what is said in this save under a name; None where nothing is yet."""
        text = self.group.read(f"save/{key}")
        told: dict[str, Any] | None = None if text is None else json.loads(text)
        return told if told is not None and told["identity"] == self.identity else None


def _name(error: BaseException, target: Path) -> None:
    """Give an error of the disk the name that the file was to have."""
    if isinstance(error, OSError):
        inside = error.filename is not None and Path(error.filename).parent.parent == target.parent
        error.filename = str(target / Path(error.filename).name if inside else target)


def _told(error: BaseException) -> dict[str, Any]:
    """Describe an error for the other processes, which raise it too."""
    if isinstance(error, OSError):
        filename = None if error.filename is None else os.fspath(error.filename)
        return {"disk": [error.errno, error.strerror or str(error), filename]}
    if isinstance(error, InputError):
        return {"input": [error.where, error.expected, error.got, error.mend]}
    return {"other": f"{type(error).__name__}: {error}"}


def _raise(told: Mapping[str, Any]) -> None:
    if "disk" in told:
        raise OSError(*told["disk"])
    if "input" in told:
        raise InputError(*told["input"])
    if "other" in told:
        raise RuntimeError(f"another process could not save: {told['other']}")


def _check_folder(fresh: Path, meeting: _Meeting) -> None:
    rank = meeting.group.rank
    # The first may have failed meanwhile, and removed it.
    if not _appears(lambda: fresh.is_dir() or meeting.said("end") is not None):
        raise InputError(
            str(fresh.parent),
            "one folder for all processes",
            f"another one for process {rank}, which does not see what process 0 has made there",
            "name an --output on a file system that all of them share",
        )


def _check_there(path: Path, size: int, rank: int) -> None:
    if not _appears(lambda: path.exists() and path.stat().st_size == size):
        raise InputError(
            str(path.parent.parent),
            "one folder for all processes",
            f"another one for process {rank}, whose {path.name} process 0 does not see",
            "name an --output on a file system that all of them share",
        )


def _appears(there: Callable[[], bool]) -> bool:
    """Wait for a file of another machine, which a network may show late."""
    end = time.monotonic() + _APPEARS
    while not there():
        if time.monotonic() > end:
            return False
        time.sleep(_LOOK)
    return True
