"""Checkpoints: a few files that are either the old ones or the new ones, never half."""

from xmlkernels.checkpoint.folder import CheckpointFolder, load, new_identity, save
from xmlkernels.checkpoint.head import FORMAT, RowRange
from xmlkernels.checkpoint.places import STATE, TENSORS
from xmlkernels.checkpoint.saver import Saver
from xmlkernels.checkpoint.state import (
    load_optimizer_tensors,
    optimizer_tensors,
    rng_state,
    set_rng_state,
)
from xmlkernels.checkpoint.together import Content, Group, arrange

__all__ = [
    "FORMAT",
    "STATE",
    "TENSORS",
    "CheckpointFolder",
    "Content",
    "Group",
    "RowRange",
    "Saver",
    "arrange",
    "load",
    "load_optimizer_tensors",
    "new_identity",
    "optimizer_tensors",
    "rng_state",
    "save",
    "set_rng_state",
]
