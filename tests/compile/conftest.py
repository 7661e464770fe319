"""Triton kernels compiled ahead of time for cards that are not here: `pytest tests/compile`, a
process of its own.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError(
        "tests/compile cannot run in Triton's interpreter: unset TRITON_INTERPRET"
    )
if importlib.util.find_spec("triton") is None:
    raise pytest.UsageError("tests/compile needs Triton: `pip install -r requirements-dev.txt`")
# Problems are those of the op tests.
sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parents[1] / "ops"),
]
