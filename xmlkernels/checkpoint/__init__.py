"""Checkpoints: two files that are either the old ones or the new ones, never half."""

from xmlkernels.checkpoint.contents import FORMAT as FORMAT
from xmlkernels.checkpoint.folder import CheckpointFolder as CheckpointFolder
from xmlkernels.checkpoint.folder import load as load
from xmlkernels.checkpoint.folder import save as save
from xmlkernels.checkpoint.places import STATE as STATE
from xmlkernels.checkpoint.places import TENSORS as TENSORS
from xmlkernels.checkpoint.state import load_optimizer_tensors as load_optimizer_tensors
from xmlkernels.checkpoint.state import optimizer_tensors as optimizer_tensors
from xmlkernels.checkpoint.state import rng_state as rng_state
from xmlkernels.checkpoint.state import set_rng_state as set_rng_state
