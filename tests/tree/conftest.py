"""Fixtures of the tree tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from xmlkernels.tree import parallel


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the number of threads; numba's own setter refuses more than the machine has."""
    return lambda count: monkeypatch.setattr(parallel, "get_num_threads", lambda: count)
