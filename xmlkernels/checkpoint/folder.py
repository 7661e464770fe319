"""Checkpoints: `tensors.safetensors`, `state.json` and shards in a folder, replaced as a whole.

A reader finds the old checkpoint or the new one, never half of one.

A save writes a folder next to the target, syncs it, moves the old one to `.NAME.old`, moves the new
one in, and removes the old one or keeps it as `NAME.1`. Whoever finds the target missing reads
`.NAME.old`: at every instant one of the two is whole. All files carry the same random identity, so
that a reader during a save never mixes two checkpoints.

Tables of which several processes hold some rows each are in a file per process (`shards.py`,
`together.py`); any number of processes reads them. One process alone writes two files.

Every bit is under a checksum: `state.json` has one of each tensor, of each block of rows and of the
header of each shard, and the header of the tensors has one of `state.json`. What was written before
there were checksums is read without them.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch

from xmlkernels.checkpoint.contents import read, refuse_foreign
from xmlkernels.checkpoint.head import RowRange
from xmlkernels.checkpoint.places import (
    STATE,
    TENSORS,
    earlier,
    holds_one,
    is_shard,
    old,
    recover,
    replace,
    swap_in,
    temporary,
)
from xmlkernels.checkpoint.together import Content, Group, arrange, write_together
from xmlkernels.checkpoint.writing import stat
from xmlkernels.errors import InputError
from xmlkernels.files import sync

_TRIES = 16
_MOMENT = 0.005  # seconds, much longer than the two renames of a save


def save(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    *,
    keep: int = 0,
    shards: Mapping[str, RowRange] | None = None,
    group: Group | None = None,
    identity: str = "",
) -> None:
    """Write a checkpoint in place of an earlier one.

    A crash at any instant leaves the old checkpoint or the new one.

    Args:
        folder: place of the checkpoint. Anything there but an earlier checkpoint is left alone
            and refused.
        tensors: dense; any shape, dtype, strides and device. Names that share one tensor are stored
            once and come back as one tensor; other overlapping views are stored apart.
        state: JSON values; non-finite floats and integers of any size come back exactly, tuples as
            lists. Of several processes, that of the first is saved.
        keep: checkpoints before this one that stay, as `FOLDER.1` (the latest), `FOLDER.2`, …;
            others of that name go.
        shards: tensors of which this process holds some rows alone, and which; every process saves
            its own. All others are the first process's.
        group: several processes that call this together (`dist.board()`); None for one.
        identity: of a group: the same text in every process, and never used before.

    Raises:
        InputError: `state` is no JSON, a tensor is not dense, something else is at `folder`, or
            the processes share no file system.
        OSError: the disk refuses (full, read-only); the old checkpoint is then unchanged. Every
            process of a group raises what one of them met.
    """
    content = arrange(tensors, state, shards or {})
    write_together(Path(folder).resolve(), content, keep, identity or new_identity(), group)


def new_identity() -> str:
    """Draw the identity of a checkpoint."""
    return os.urandom(16).hex()


def load(
    folder: str | os.PathLike[str],
    keep: Callable[[str], bool] = lambda name: True,
    rows: Mapping[str, RowRange] | None = None,
    on_disk: Container[str] = (),
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a checkpoint: (tensors on the CPU, state).

    Names, shapes, dtypes and checksums are compared with what the checkpoint says of them.

    Args:
        keep: which tensors to read, by name: prediction needs no optimizer state.
        rows: which rows to read of some tensors, by name, whoever wrote them: of a table in parts
            no others are touched, beside those under the same checksums. Other tensors are whole.
        on_disk: names of tensors whose rows stay on the disk: tensors without memory stand in for
            them (`xmlkernels.rows.rows_behind`), and what is read of a table in parts is verified
            then. A save may replace the checkpoint meanwhile.

    Raises:
        InputError: no checkpoint there, another format version, a file missing, damaged, cut short
            or foreign, or a tensor with another number of rows.
    """
    target = Path(folder).resolve()
    for left in reversed(range(_TRIES)):
        # Beside a running save the folder may move between the two reads: begin again with the one
        # now in place.
        found = target if (target / STATE).exists() else old(target)
        if not (found / STATE).exists():
            found = target
        before = stat(found / STATE)
        try:
            result = read(found, target, keep, rows or {}, on_disk)
        except InputError:
            same = stat(target / STATE) in (before, None) and stat(found / STATE) == before
            # Each look may have met another save between its renames: only time tells that there
            # is nothing.
            if same and (before is not None or not left):
                raise
            if before is None:
                time.sleep(_MOMENT)
            continue
        return result
    raise InputError(
        str(target), "a checkpoint that stands still", "one replaced all the time", "try again"
    )


class CheckpointFolder:
    """The checkpoints of a run in one folder: `last`, `best`, and earlier ones.

    The earlier ones are `last.1` (the latest), `last.2`, …

    Args:
        folder: holds them; made by the first save.
        keep: checkpoints before the last that stay. They replace it when it turns out to be
            damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 1) -> None:
        self.folder, self.keep = Path(folder), keep

    def save_last(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """`save` as `last`, by one process."""
        save(self.folder / "last", tensors, state, keep=self.keep)

    def write_last(
        self,
        content: Content,
        group: Group | None = None,
        identity: str = "",
        then: Callable[[], None] | None = None,
    ) -> None:
        """Write what `arrange` has made ready as `last`; every process of a group calls it.

        The first process calls `then` when it is in place, and all raise its errors.
        """
        last = (self.folder / "last").resolve()
        write_together(last, content, self.keep, identity or new_identity(), group, then)

    def save_best(self) -> None:
        """Make `last` the `best` too, by hard links (copies where the file system has none).

        Raises:
            InputError: there is no `last` to link.
        """
        source, target = (self.folder / "last").resolve(), (self.folder / "best").resolve()
        recover(source, self.keep)
        if not (source / STATE).exists():
            raise InputError(
                str(source), "a checkpoint to keep as best", "none", "call save_last first"
            )
        refuse_foreign(target)
        recover(target)
        fresh = temporary(target)
        try:
            _link(source, fresh)
            swap_in(fresh, target)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            recover(target)
            raise

    def put_back(self, which: str) -> None:
        """Put another checkpoint of the run in the place of a damaged `last`, which is removed."""
        source, target = self._path(which).resolve(), (self.folder / "last").resolve()
        if holds_one(target):
            refuse_foreign(target)
        fresh = temporary(target)
        try:
            _link(source, fresh)
            replace(fresh, target)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise

    def load(
        self,
        which: str = "last",
        keep: Callable[[str], bool] = lambda name: True,
        rows: Mapping[str, RowRange] | None = None,
        on_disk: Container[str] = (),
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """`load` the "last" or the "best" one, or one of the earlier ones, "last.1" and so on."""
        return load(self._path(which), keep, rows, on_disk)

    def load_first(
        self,
        order: tuple[str, ...],
        keep: Callable[[str], bool] = lambda name: True,
        check: Callable[[Mapping[str, Any]], None] = lambda state: None,
        rows: Mapping[str, RowRange] | None = None,
        on_disk: Container[str] = (),
        agree: Callable[[InputError | None], InputError | None] = lambda error: error,
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any], str, InputError | None]:
        """Load the first whole checkpoint of `order`.

        "earlier" means the checkpoints before the last, the latest first.

        Args:
            keep: which tensors, as for `load`.
            check: raises an InputError where a state is not what it should be; the checkpoint then
                counts as damaged.
            rows, on_disk: of some tensors, as for `load`.
            agree: gives all processes the error that one has met, or None where none has.

        Returns:
            Tensors, state, its name, and why the first of them was not taken; None where it was.

        Raises:
            InputError: of the first, where none is whole.
        """
        before = [path.name for path in earlier((self.folder / "last").resolve())]
        names = [name for entry in order for name in (before if entry == "earlier" else [entry])]
        reason: InputError | None = None
        for name in [name for name in names if self.exists(name)] or names[:1]:
            found, error = None, None
            try:
                found = self.load(name, keep, rows, on_disk)
                check(found[1])
            except InputError as met:
                error = met
            error = agree(error)
            if error is None and found is not None:
                return *found, name, reason
            reason = reason or error
        assert reason is not None  # there is always a first
        raise reason

    def exists(self, which: str = "last") -> bool:
        """Whether there is one to load (whole or not)."""
        return _is_there(self._path(which).resolve())

    def resumable(self) -> bool:
        """Whether there is any to go on from (whole or not)."""
        return (
            self.exists("last")
            or bool(earlier((self.folder / "last").resolve()))
            or self.exists("best")
        )

    def _path(self, which: str) -> Path:
        kind, _, number = which.partition(".")
        if which not in ("last", "best") and not (kind == "last" and number.isdecimal()):
            raise InputError("checkpoint", "'last' or 'best'", repr(which), "choose one of the two")
        return self.folder / which


def _is_there(target: Path) -> bool:
    """Whether there is a checkpoint, also beside a running save."""
    # Looked at last once more: a save may have put the new one in place and removed the old one
    # between the first two looks.
    return holds_one(target) or holds_one(old(target)) or holds_one(target)


def _link(source: Path, fresh: Path) -> None:
    shards = sorted(path.name for path in source.iterdir() if is_shard(path.name))
    for name in (TENSORS, *shards, STATE):
        # Safe to share: a save never writes into an existing file, it makes new ones.
        try:
            os.link(source / name, fresh / name)
        except OSError:
            shutil.copyfile(source / name, fresh / name)
            sync(fresh / name)
    sync(fresh)
