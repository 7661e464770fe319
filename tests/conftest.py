"""What all tests share: no network, no card where there is none, slow tests only when they are
asked for.
"""

import os
import signal

# Threads that wait by spinning make the suite several times slower on a machine that also does
# other things. Read once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Repeats on a card are compared bit for bit, which cuBLAS grants with a fixed workspace only.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Tests stop commands by these. A shell's background job ignores the first, nohup the second, and
# every process that a test starts would too.
for _number, _answer in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _answer)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("markexpr")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "slow" in item.keywords and "slow" not in asked:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(autouse=True)
def _progress_on_standard_output() -> None:
    """Tests read what a run says as a command would print it."""
    from xmlkernels.cli.console import print_logs

    print_logs()
