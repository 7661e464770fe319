"""Let torch compute on a chosen number of CPU threads, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from xmlkernels.errors import InputError


def check_threads(count: int) -> int:
    """Return the number itself; InputError where it is negative or no whole number."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        mend = "leave it out: 0 leaves torch's choice"
        raise InputError("threads", "a whole number, 0 or more", repr(count), mend)
    return count


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute on `count` CPU threads inside; 0 changes nothing.

    Neither entering nor leaving starts a thread. With 1, nothing that torch does inside starts its
    pool of OpenMP threads, which a child made by `fork` could not use. The number is that of the
    calling thread, which has its own back afterwards.
    """
    if count == 0:
        yield
        return
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
