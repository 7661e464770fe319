"""How SIGINT, SIGTERM and SIGHUP end a command: the first in order, a later one at once.

The first raises Stopped where the command is, so that every `with` cleans up on the way out.
Inside `held` it is noted instead: a training loop looks at `asked` between its steps. The same
signal comes twice at nearly the same time from a terminal and from torchrun, or from `timeout`:
within a moment it counts once.
"""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_CHECKPOINT = "ends after this step, with a checkpoint; a second signal ends at once"
_ONCE = 1.0  # seconds; torchrun passes a signal on within a tenth of one


class Stopped(KeyboardInterrupt):
    """A signal asks for the end.

    Args:
        number: of the signal.
        told: what the user is told about it, beside the signal's name.
    """

    def __init__(self, number: int, told: str = "") -> None:
        super().__init__(number)
        self.number, self.told = number, told

    @property
    def name(self) -> str:
        """SIGTERM, say."""
        return signal.Signals(self.number).name

    @property
    def status(self) -> int:
        """The exit status that says so: 130, 143, 129."""
        return 128 + self.number


class _Listener:
    """What answers the signals of this process.

    Attributes:
        asked: the first signal; 0 before it.
        when: seconds, when it came.
        held: how many `held` blocks are open.
        told: what the innermost of them does at a signal.
        status: the exit status of a command that ends by itself (see `ending`).
        quiet: whether a signal ends such a command at once.
    """

    def __init__(self) -> None:
        self.asked, self.when, self.held = 0, 0.0, 0
        self.told = _CHECKPOINT
        self.status: int | None = None
        self.quiet = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.status is not None:
            if self.quiet:
                os._exit(self.status)
        elif not self.asked:
            self.asked, self.when = number, time.monotonic()
            if not self.held:
                raise Stopped(number)
            # torchrun says so itself, and sends a signal too when a process is lost.
            if os.environ.get("WORLD_SIZE", "1") == "1":
                # os.write: the signal may have come in the middle of a print.
                name = signal.Signals(number).name
                os.write(2, f"{name}: {self.told}\n".encode())
        elif time.monotonic() - self.when > _ONCE:
            os._exit(128 + number)


_listener = _Listener()


@contextmanager
def listening() -> Iterator[None]:
    """Answer signals as above inside the block.

    Those that whoever started the command has switched off (nohup) stay off.
    """
    global _listener  # noqa: PLW0603  (signals belong to the process)
    _listener = _Listener()
    before: dict[int, Any] = {}
    for number in SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, _listener)
    try:
        yield
    finally:
        # Else the same signal, sent once more, would find the interpreter's own answer.
        if not _listener.asked:
            for number, handler in before.items():
                signal.signal(number, handler)


def ending(status: int, *, quiet: bool = False) -> None:
    """Note that the command ends by itself with this status, which no signal changes any more.

    A signal ends at once a command that is `quiet`: it leaves the message to another process.
    """
    _listener.status, _listener.quiet = status, quiet


def done() -> None:
    """Note that the work is written, and only telling of it is left.

    A signal then ends the command at once, as one that has done its work.
    """
    ending(0, quiet=True)


def asked() -> int:
    """Return the signal that has asked for the end; 0 before one has."""
    return _listener.asked


@contextmanager
def held(told: str = _CHECKPOINT) -> Iterator[None]:
    """Note a signal inside the block for whoever looks at `asked`.

    A block that then goes on to its end has done its work.

    Args:
        told: what the block does at a signal, for the user.
    """
    before, _listener.told = _listener.told, told
    _listener.held += 1
    try:
        yield
    finally:
        _listener.held -= 1
        _listener.told = before


class Watched:
    """A model's inputs whose batches end by Stopped when a signal has asked for it.

    They end between two batches, where the model is as it was before.
    """

    def __init__(self, inputs: Any) -> None:
        self._inputs = inputs

    def batches(self, *args: Any, **more: Any) -> Any:
        """Return the inputs' batches, which end so."""
        return _Watched(self._inputs.batches(*args, **more))


class _Watched:
    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def epoch(self, *args: Any, **more: Any) -> Iterator[Any]:
        for batch in self._batches.epoch(*args, **more):
            if _listener.asked:
                raise Stopped(_listener.asked)
            yield batch
