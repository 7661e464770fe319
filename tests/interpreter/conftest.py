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
from collections.abc import Iterator
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
sys.path.insert(0, str(Path(__file__).parent))
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from races import RECORDER, recorded

poisoned_memory = runpy.run_path(str(OPS / "conftest.py"))["poisoned_memory"]

# A masked-out lane may hold anything, and numpy computes it.
numpy.seterr(all="ignore")
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")


def fused_multiply_add(x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """Round a multiply-add once, as a card does; the interpreter rounds the product, too."""
    wide = numpy.longdouble if x.data.dtype == numpy.float64 else numpy.float64
    total = x.data.astype(wide) * y.data + z.data
    return TensorHandle(total.astype(x.data.dtype), z.dtype.scalar)


interpreter_builder.create_fma = fused_multiply_add


@pytest.fixture(autouse=True)
def no_races(request: pytest.FixtureRequest) -> Iterator[None]:
    """Record every launch of a test, and fail where programs race."""
    if request.node.path.stem == "test_races":  # its kernels race on purpose
        yield
        return
    before = len(RECORDER.races)
    with recorded(RECORDER):
        yield
    found = RECORDER.races[before:]
    assert not found, "\n".join(map(str, dict.fromkeys(found)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put last what looks at all launches of the run."""
    items.sort(key=lambda item: item.name == "test_every_kernel_was_examined")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many launches were examined."""
    launches = RECORDER.launches
    terminalreporter.write_line(
        f"races: {len(RECORDER.races)} found, {launches.total():,} launches of {len(launches)} "
        "kernels examined"
    )
