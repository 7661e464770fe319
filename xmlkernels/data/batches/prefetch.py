"""An iterator that a background thread keeps ahead of its consumer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
SECONDS_TO_STOP = 5.0


def in_background(make: Callable[[], Iterator[Item]], ahead: int) -> Iterator[Item]:
    """Yield the items of `make()`, made up to `ahead` in advance by one daemon thread.

    The thread ends with the iterator.

    The thread takes a slot before it makes an item, so it never waits on a full queue and is
    stopped without polling. What it raises is raised to the consumer. 0 makes items in line,
    without a thread.
    """
    if ahead == 0:
        yield from make()
        return
    done: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    slots, stopped = threading.Semaphore(ahead), threading.Event()

    def work() -> None:
        try:
            items = make()
            while slots.acquire() and not stopped.is_set():
                try:
                    done.put(("item", next(items)))
                except StopIteration:
                    done.put(("end", None))
                    return
        except BaseException as error:
            done.put(("error", error))

    thread = threading.Thread(target=work, name="xmlkernels-batches", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = done.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            slots.release()
            yield value
    finally:
        stopped.set()
        slots.release()
        # A source that waits for a terminal or pipe cannot be interrupted: leave that (daemon)
        # thread behind.
        thread.join(SECONDS_TO_STOP)
