"""Compiled loops on several threads: as many as `use_threads` says, all at first.

Numba's own number is never asked for: that starts its pool, and sets torch's number too. The loops
release the interpreter's lock and are compiled without numba's own parallel transform,
which takes minutes to compile what takes seconds without it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from threading import Event
from typing import Any

from numba import config

from xmlkernels.errors import InputError

_kept: set[Any] = set()
_chosen = ContextVar("threads", default=0)  # 0 is all


def keep_compiled(*loops: Any) -> None:
    """Keep the machine code of compiled loops on disk: it takes seconds to make.

    It is kept from the first call on.

    Not `njit(cache=True)`, which makes folders when a module is imported. Numba's cache sees
    changes of the loop's own file alone, so the loops of a file must not call those of another.
    """
    for loop in loops:
        if loop not in _kept and hasattr(loop, "enable_caching"):  # without NUMBA_DISABLE_JIT
            _kept.add(loop)
            # No folder that can be written: compiled for this process alone.
            with suppress(RuntimeError):
                loop.enable_caching()


def most_threads() -> int:
    """Return how many threads numba can use: the processors, or NUMBA_NUM_THREADS."""
    return int(config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]  # numba fills its config when it is imported


def use_threads(count: int) -> None:
    """Let the loops that are called from here on run on `count` threads; 0 is all."""
    _chosen.set(count)


def threads() -> int:
    """How many threads the loops run on."""
    return _chosen.get() or most_threads()


def in_parallel(
    work: Callable[[int, int], None],
    count: int,
    step: int,
    workers: int = 0,
    *,
    done: Callable[[int], None] = lambda count: None,
) -> None:
    """Call work(begin, end) for the pieces of `step` of range(count).

    Who does which piece must not change the result.

    Args:
        workers: threads; 0 is `threads()`.
        done: receives the size of each piece behind it, for progress.

    Raises:
        InputError: a negative number of them.
    """
    if workers < 0:
        raise InputError("threads", "0 or more", str(workers), "leave it out")
    pieces = [(begin, min(begin + step, count)) for begin in range(0, count, step)]
    workers = min(workers or threads(), len(pieces))
    if workers <= 1:
        for begin, end in pieces:
            work(begin, end)
            done(end - begin)
        return
    failed = Event()

    def one(begin: int, end: int) -> None:
        if failed.is_set():  # what is left is of no use any more
            return
        try:
            work(begin, end)
            done(end - begin)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(workers) as pool:
        for ended in [pool.submit(one, begin, end) for begin, end in pieces]:
            ended.result()
