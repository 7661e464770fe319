"""Compiled loops on several threads: as many as `numba.get_num_threads()` says.

The loops release the interpreter's lock and are compiled without numba's own parallel transform, which takes minutes to
compile what takes seconds without it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from numba import get_num_threads


def threads() -> int:
    """How many threads the loops run on."""
    return int(get_num_threads())


def in_parallel(work: Callable[[int, int], None], count: int, step: int) -> None:
    """Calls work(begin, end) for the pieces of `step` of range(count). Who does which piece must not change the result."""
    pieces = [(begin, min(begin + step, count)) for begin in range(0, count, step)]
    workers = min(threads(), len(pieces))
    if workers <= 1:
        for begin, end in pieces:
            work(begin, end)
        return
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work, begin, end) for begin, end in pieces]:
            done.result()
