"""Write the checkpoints of a run one after the other, beside the training loop where there is room.

Its errors are raised by the next call, the same ones in every process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from xmlkernels.checkpoint.folder import CheckpointFolder
from xmlkernels.checkpoint.head import RowRange
from xmlkernels.checkpoint.snapshot import Snapshot, snapshot_bytes
from xmlkernels.checkpoint.together import Content, Group, arrange


class Abandoned(Exception):
    """The save was given up; the checkpoint before it is whole."""


@dataclass
class _Save:
    content: Content
    identity: str
    best: bool
    step: int
    error: BaseException | None = None
    thread: threading.Thread | None = None
    given_up: threading.Event = field(default_factory=threading.Event)


class Saver:
    """Saves of one run, of which one is under way at a time.

    Every process of a run has one and makes the same calls.

    Attributes:
        saved: the step of the last checkpoint that is whole on the disk; None before there is one.
        begun: the step of the last one that was begun.
        prepared: whether it is decided how saves are written; the first one decides it else.

    Args:
        folder: of the checkpoints.
        group: the processes of the run; None for one.
        room: whether memory has room for a copy of so many bytes (None: no copy can be taken);
            where not, a save returns when it is on the disk.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        group: Group | None,
        room: Callable[[int | None], bool],
    ) -> None:
        self.saved: int | None = None
        self.begun: int | None = None
        self._folder, self._group, self._room = folder, group, room
        self._snapshot: Snapshot | None = None
        self.prepared = False
        self._now: _Save | None = None

    def prepare(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Decide whether saves go on beside the loop, and take the memory of a copy."""
        size, self.prepared = snapshot_bytes(tensors), True
        if self._room(size) and size is not None:
            self._snapshot = Snapshot(size)

    def save(
        self,
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        shards: Mapping[str, RowRange],
        identity: str,
        *,
        step: int,
        best: bool = False,
    ) -> None:
        """Write the last checkpoint, and make it the best too where it is.

        The save before must have been waited for (`wait`).

        Args:
            tensors, state, shards, identity: as for `xmlkernels.checkpoint.save`.
            step: that it is of.
            best: whether it is the best, too.

        Raises:
            InputError: as `xmlkernels.checkpoint.save`, where that can be seen at once.
        """
        assert self._now is None, "the save before is not waited for"
        if not self.prepared:
            self.prepare(tensors)
        content = arrange(tensors, state, shards)
        if self._snapshot is not None:
            content = self._snapshot.take(content)
        self.begun, self._now = step, _Save(content, identity, best, step)
        if self._snapshot is None:
            self._write(self._now)
            return
        self._now.thread = threading.Thread(
            target=self._write, args=(self._now,), name="xmlkernels-save", daemon=True
        )
        self._now.thread.start()

    def settle(self) -> None:
        """Return when no save is under way.

        Raises:
            OSError: the disk of one process refuses; the checkpoint before is unchanged. Other
                errors as for `xmlkernels.checkpoint.save`.
        """
        if (now := self._now) is None:
            return
        if now.thread is not None:
            now.thread.join()
        self._now = None
        if now.error is not None:
            raise now.error

    @property
    def waits(self) -> bool:
        """Whether a save returns when it is on the disk."""
        return self._snapshot is None

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise an error at once."""
        return self._now is not None and self._now.error is not None

    def give_up(self) -> None:
        """Wait no longer for processes that are lost; what this process can do alone it ends."""
        now, self._now = self._now, None
        if now is not None and now.thread is not None:
            now.given_up.set()
            now.thread.join(5)

    def end(self) -> None:
        """Wait for a save that is under way, without its errors: the run ends by another one."""
        with suppress(Exception):
            self.settle()

    def _write(self, now: _Save) -> None:
        group = None if self._group is None else _Watched(self._group, now.given_up)
        link = self._folder.save_best if now.best else None
        try:
            self._folder.write_last(now.content, group, now.identity, link)
            self.saved = now.step
        except BaseException as error:
            now.error = error


class _Watched:
    """A group whose waits end when the save is given up."""

    def __init__(self, group: Group, given_up: threading.Event) -> None:
        self._group, self._given_up = group, given_up
        self.rank, self.size = group.rank, group.size
        self.post, self.read = group.post, group.read

    def check(self) -> None:
        if self._given_up.is_set():
            raise Abandoned
        self._group.check()
