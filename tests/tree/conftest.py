"""Fixtures of the tree tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numba
import pytest

from xmlkernels import parallel


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets the number of threads: numba's, or, where its setter refuses more than the machine has,
    what we read of it.
    """
    before = numba.get_num_threads()

    def choose(count: int) -> None:
        if count <= numba.config.NUMBA_NUM_THREADS:
            numba.set_num_threads(count)
        else:
            monkeypatch.setattr(parallel, "get_num_threads", lambda: count)
        assert parallel.threads() == count

    yield choose
    numba.set_num_threads(before)
