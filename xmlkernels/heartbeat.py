"""Signs of life between processes that work together: which of them is missing, and that it is.

Each process counts up a number in a store that all of them reach, beside its work: what one does
alone for hours is no silence. A process that is killed or stopped counts no more, and after a while
the others know which it is.

One that lives may never come to where the others wait for it. Each says with its sign how many
messages it has come to, whether all do the same at the time, and for how long it has done nothing
(`Standing`): one that is behind and idle for as long as the others wait is lost, too.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from xmlkernels.life import Turn

ALIVE, FAILED, DONE = b"", b"failed", b"done"


class Store(Protocol):
    """What is used of torch.distributed.Store."""

    def set(self, key: str, value: str) -> None:
        """Set a value."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Return the values of several keys."""


@dataclass(frozen=True)
class Standing:
    """What a process says with a sign of life.

    Attributes:
        count: messages of all processes that it has come to.
        abreast: whether all processes do the same now.
        idle: seconds in which it has done nothing.
    """

    count: int
    abreast: bool
    idle: float

    def told(self) -> str:
        """Write it behind the number of a beat."""
        return f"{self.count} {int(self.abreast)} {self.idle:.1f}"

    @staticmethod
    def read(beat: bytes) -> Standing | None:
        """Read what `told` wrote; None where a beat says nothing."""
        words = beat.split()[1:]
        return Standing(int(words[0]), words[1] == b"1", float(words[2])) if words else None


def interval(patience: float) -> float:
    """Return the seconds from one sign of life to the next."""
    return min(1.0, patience / 5)


class Heartbeat:
    """This process's signs of life, and those of the others.

    Args:
        store: with a connection of its own: another thread's wait would hold this one up.
        rank, size: this process's number, and how many there are.
        patience: seconds without a sign after which a process counts as lost.
        beats: whether this process's thread beats; otherwise something else does, for a thread is
            silent while a call keeps Python's lock (`beat`).
        turn: where this process stands; None: it does not see who is behind.
        lost: called once with a sentence, from the thread, when one is lost; may end this process.
            None: nothing happens.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        patience: float,
        lost: Callable[[str], None] | None = None,
        *,
        beats: bool = True,
        turn: Turn | None = None,
    ) -> None:
        self.patience, self.lost, self._beats = patience, lost, beats
        self.interval = interval(patience)
        self._store, self._rank, self._size = store, rank, size
        self._others = [r for r in range(size) if r != rank]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xmlkernels-heartbeat", daemon=True)
        self._turn, self._arrived = turn, (0, time.monotonic())
        self._stuck: list[int] = []
        self._seen = dict.fromkeys(self._others, b"0")
        self._state = dict.fromkeys(self._others, ALIVE)
        self._last = dict.fromkeys(self._others, time.monotonic())
        self._who = dict.fromkeys(self._others, b"not started yet")
        self._write("state", ALIVE.decode())
        self._write("who", f"process {os.getpid()} on {socket.gethostname()}")
        beat(store, rank, 0)

    def keys(self) -> list[str]:
        """Return the names in the store that are there once every process has made its own."""
        return [f"xmlkernels/beat/{r}" for r in range(self._size)]

    def start(self) -> None:
        """Begins; every process must have made its own first."""
        self._last = dict.fromkeys(self._others, time.monotonic())
        self._who = dict(zip(self._others, self._read("who"), strict=True))
        self._thread.start()

    def stop(self, *, failed: bool = False) -> None:
        """Say that this process ends: in order, or with an error that it reports itself."""
        self._stopped.set()
        with suppress(Exception):  # the store's own process may have ended before
            self._write("state", (FAILED if failed else DONE).decode())
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(2 * self.interval)

    def missing(self, silence: float) -> list[int]:
        """Return processes that gave no sign for so many seconds and did not say that they end."""
        now = time.monotonic()
        return [
            r for r in self._others if self._state[r] == ALIVE and now - self._last[r] > silence
        ]

    def behind(self, silence: float) -> list[int]:
        """Return processes that the others have waited for so many seconds, and that do nothing.

        Only where all do the same: what one does alone may take as long as it likes.
        """
        if self._turn is None:
            return []
        now, count = time.monotonic(), self._turn.count
        if count != self._arrived[0]:
            self._arrived = count, now
        if now - self._arrived[1] <= silence:
            return []
        read = {r: Standing.read(self._seen[r]) for r in self._others}
        standing = {r: s for r, s in read.items() if s is not None}
        # Those before the last wait for it themselves, though in another message.
        last = min((s.count for s in standing.values()), default=count)
        found = {r: s for r, s in standing.items() if s.count == last < count}
        return [r for r, s in found.items() if s.abreast and s.idle > silence]

    def failed(self) -> bool:
        """Return whether another process has ended by an error that it reports itself."""
        return FAILED in self._state.values()

    def all_alive(self) -> bool:
        """Whether no other process has said that it ends."""
        return all(state == ALIVE for state in self._state.values())

    def find(self) -> str | None:
        """Return a sentence that names the process which did not answer a call.

        None where one that failed says so itself, or all are alive.
        """
        end = time.monotonic() + 5 * self.interval
        while time.monotonic() < end and not self.failed():
            if gone := self.missing(3 * self.interval):
                return self.sentence(gone)
            time.sleep(self.interval / 4)
        return None

    def sentence(self, gone: list[int]) -> str:
        """Who is missing, for how long."""
        seconds = max(time.monotonic() - self._last[r] for r in gone)
        many = "has ended or stands still" if len(gone) == 1 else "have ended or stand still"
        return f"{self._names(gone)} {many}: no sign of life for {seconds:.0f} s"

    def _names(self, ranks: list[int]) -> str:
        return ", ".join(f"process {r} of {self._size} ({self._who[r].decode()})" for r in ranks)

    def sentence_behind(self, stuck: list[int]) -> str:
        """Say who lives and has not come to where the others wait, for how long."""
        seconds = time.monotonic() - self._arrived[1]
        many = "stands" if len(stuck) == 1 else "stand"
        told = f"alive, but without any work for {seconds:.0f} s, in which the others waited"
        return f"{self._names(stuck)} {many} still: {told}"

    def speaks(self) -> bool:
        """Return whether this process is the one of those left that reports it."""
        gone = [*self.missing(3 * self.interval), *self._stuck]
        return all(r > self._rank or r in gone for r in self._others)

    def _write(self, what: str, value: str) -> None:
        self._store.set(f"xmlkernels/{what}/{self._rank}", value)

    def _read(self, what: str) -> list[bytes]:
        return self._store.multi_get([f"xmlkernels/{what}/{r}" for r in self._others])

    def _run(self) -> None:
        number, before = 0, time.monotonic()
        if self._turn is not None:
            self._turn.watched_by(threading.get_native_id())
        while not self._stopped.wait(self.interval):
            number, now = number + 1, time.monotonic()
            if now - before > 3 * self.interval + 1:
                # This process itself stood still, and the others' signs went by unseen.
                self._last = dict.fromkeys(self._others, now)
                self._arrived = self._arrived[0], now
            with suppress(Exception):  # no store: then no sign is seen, and patience decides
                if self._beats:
                    beat(self._store, self._rank, number)
                beats, states = self._read("beat"), self._read("state")
                for r, number_there, state in zip(self._others, beats, states, strict=True):
                    self._state[r] = state
                    if number_there != self._seen[r]:
                        self._seen[r], self._last[r] = number_there, time.monotonic()
            before = time.monotonic()
            gone, self._stuck = self.missing(self.patience), self.behind(self.patience)
            if (gone or self._stuck) and self.lost is not None and not self._stopped.is_set():
                call, self.lost = self.lost, None
                call(self.sentence(gone) if gone else self.sentence_behind(self._stuck))


def beat(store: Store, rank: int, number: int, standing: Standing | None = None) -> None:
    """Give a sign of life of one process, and say where it stands."""
    told = "" if standing is None else f" {standing.told()}"
    store.set(f"xmlkernels/beat/{rank}", f"{number}{told}")
