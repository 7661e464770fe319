"""Checkpoints of a few numbers, as the tests write and read them."""

import os
from pathlib import Path

import torch

from xmlkernels.checkpoint import (
    load,
)


def value(number: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((300,), float(number)), "n": torch.tensor(number)}


def whole(folder: Path) -> int:
    """The number of the checkpoint; fails if its two files do not belong together."""
    tensors, state = load(folder)
    number = state["number"]
    assert tensors["n"].item() == number and bool((tensors["w"] == number).all())
    return number


def names_of(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))
