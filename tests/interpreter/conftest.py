"""Triton kernels in Triton's interpreter: on CPU tensors, one program after another, without a
card.

`TRITON_INTERPRET=1 pytest tests/interpreter`, a process of its own: the variable is read when a
kernel is defined. The interpreter shows no race; races show on a card, by repeating (`-m gpu`).
"""

import importlib.util
import os
import runpy
import sys
import warnings
from pathlib import Path

import numpy
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(
        "tests/interpreter runs in a process of its own: TRITON_INTERPRET=1 python -m pytest "
        "tests/interpreter"
    )
if importlib.util.find_spec("triton") is None:
    raise pytest.UsageError("tests/interpreter needs Triton: `pip install -r requirements-dev.txt`")

# Problems and comparisons are those of the op tests, and so is the poisoned memory.
OPS = Path(__file__).resolve().parents[1] / "ops"
sys.path.insert(0, str(OPS))
poisoned_memory = runpy.run_path(str(OPS / "conftest.py"))["poisoned_memory"]

# A masked-out lane may hold anything, and numpy computes it.
numpy.seterr(all="ignore")
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
