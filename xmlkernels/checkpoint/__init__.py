"""Checkpoints: two files that are either the old ones or the new ones, never half."""

from xmlkernels.checkpoint.contents import FORMAT
from xmlkernels.checkpoint.folder import CheckpointFolder, load, save
from xmlkernels.checkpoint.places import STATE, TENSORS
from xmlkernels.checkpoint.state import (
    load_optimizer_tensors,
    optimizer_tensors,
    rng_state,
    set_rng_state,
)

__all__ = [
    "FORMAT",
    "STATE",
    "TENSORS",
    "CheckpointFolder",
    "load",
    "load_optimizer_tensors",
    "optimizer_tensors",
    "rng_state",
    "save",
    "set_rng_state",
]
