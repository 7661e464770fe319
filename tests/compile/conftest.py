"""Triton kernels compiled ahead of time for cards that are not here: `pytest tests/compile`, a process of its own."""

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/compile cannot run in Triton's interpreter: unset TRITON_INTERPRET")
pytest.importorskip("triton", reason="Triton is not installed: `pip install -r requirements-dev.txt`")
sys.path.insert(0, str(Path(__file__).parent))
