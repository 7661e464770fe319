"""Finds and loads the native library, and says so when it is not there.

`python -m xmlkernels.native` prints what was found, in one line.
"""

import os
import warnings
from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("_cpu.so")
_warned: set[str] = set()


def load() -> str | None:
    """Loads the CPU kernels into torch's dispatcher.

    Returns:
        None when they are loaded, else the reason why not.

    Raises:
        ImportError: when XMLKERNELS_REQUIRE_NATIVE=1 and they cannot be loaded.
    """
    reason = None
    if os.environ.get("XMLKERNELS_NATIVE") == "0":
        reason = "XMLKERNELS_NATIVE=0"
    elif not _LIBRARY.exists():
        reason = "the package was built without native code"
    else:
        try:
            torch.ops.load_library(str(_LIBRARY))
        except OSError as error:
            reason = f"{_LIBRARY.name} does not load under torch {torch.__version__}: {error}"
    if reason is not None and os.environ.get("XMLKERNELS_REQUIRE_NATIVE") == "1":
        raise ImportError(
            f"xmlkernels: XMLKERNELS_REQUIRE_NATIVE=1, but {reason}; build it with "
            "`pip install --no-build-isolation .` where a C++ compiler and torch are installed"
        )
    return reason


def warn_reference(device: str, reason: str) -> None:
    """Tells once per device type that an op runs on its slow reference, which holds the whole `B x L` matrix."""
    if device not in _warned:
        _warned.add(device)
        built = "`pip install --no-build-isolation .` builds kernels"
        mend = built if device == "cpu" else f"not every op has a kernel for {device} yet"
        warnings.warn(
            f"xmlkernels: ops on {device} run on their slow reference: {reason}. It holds all logits in memory; {mend}",
            RuntimeWarning,
            stacklevel=3,
        )


if __name__ == "__main__":
    # Importing the ops has loaded the library already, or raised.
    from xmlkernels.ops import missing

    print(f"xmlkernels: native library: {'loaded' if missing is None else 'not loaded, ' + missing}")
