"""Fixtures of the op tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import card

_ROOM = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m does not name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        here = item.path.parent == _ROOM and "gpu" in item.keywords
        if here and card.chosen(item.path.name, item.name):
            item.add_marker("card")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills every `torch.empty` with NaN (integers with their largest value), so that a result left
    unwritten shows.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's thread count back after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
