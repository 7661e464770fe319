"""Short texts that processes leave for each other, for work that no thread may wait for.

Messages of torch.distributed must come in the same order in every process, so a thread beside the
training loop cannot use them. It reads and writes here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Store(Protocol):
    """What is used of torch.distributed.Store."""

    def set(self, key: str, value: str) -> None:
        """Set a value."""

    def check(self, keys: list[str]) -> bool:
        """Return whether all of them are set."""

    def get(self, key: str) -> bytes:
        """Return a value that is set."""


class Board:
    """A store, seen from one of several processes.

    Args:
        store: with a connection of its own: another thread's wait would hold this one up.
        rank, size: this process's number, and how many there are.
        check: raises an error where another process has ended.
    """

    def __init__(self, store: Store, rank: int, size: int, check: Callable[[], None]) -> None:
        self._store, self.rank, self.size, self.check = store, rank, size, check

    def post(self, key: str, text: str) -> None:
        """Leave a text in place of the last one of that name."""
        self._store.set(f"xmlkernels/board/{key}", text)

    def read(self, key: str) -> str | None:
        """Return the text of that name; None where there is none yet."""
        name = f"xmlkernels/board/{key}"
        return self._store.get(name).decode() if self._store.check([name]) else None
