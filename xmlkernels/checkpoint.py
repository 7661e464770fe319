"""Checkpoints: a folder of `tensors.safetensors` and `state.json` that is either the old one or the new one, never half.

A save writes a folder beside the target, syncs it, moves the old one to `.NAME.old`, moves the new one in, and removes
the old one. Whoever finds the target missing reads `.NAME.old`: at every instant one of the two is whole. Both files
carry the same random identity, so that a reader beside a running save never mixes two checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xmlkernels._state import decode, encode
from xmlkernels._state import load_optimizer_tensors as load_optimizer_tensors
from xmlkernels._state import optimizer_tensors as optimizer_tensors
from xmlkernels._state import rng_state as rng_state
from xmlkernels._state import set_rng_state as set_rng_state
from xmlkernels.errors import InputError

FORMAT, VERSION = "xmlkernels checkpoint", 1
TENSORS, STATE = "tensors.safetensors", "state.json"
