"""Find and load the native libraries, and say so when one is missing.

`python -m xmlkernels.ops` prints what was found.
"""

import os
import warnings
from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("_cpu.so")
_CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")
_warned: set[str] = set()
missing_cuda: str | None = "not asked for yet"
"""Why the CUDA library is not loaded; None when it is. Set by `load`."""


def load() -> str | None:
    """Load the CPU kernels into torch's dispatcher, and the CUDA ones where torch has CUDA.

    Returns:
        None when the CPU kernels are loaded, else the reason why not. `missing_cuda` is the same
        for the CUDA kernels.

    Raises:
        ImportError: when XMLKERNELS_REQUIRE_NATIVE=1 and the CPU kernels cannot be loaded, or the
            CUDA kernels are built but cannot be loaded; when XMLKERNELS_CUDA=1 and torch has CUDA
            and they are not there at all.
    """
    global missing_cuda  # noqa: PLW0603  (the libraries load once per process)
    reason = _load(_LIBRARY)
    required = os.environ.get("XMLKERNELS_REQUIRE_NATIVE") == "1"
    if reason is not None and required:
        raise ImportError(
            f"xmlkernels: XMLKERNELS_REQUIRE_NATIVE=1, but {reason}; build it with "
            "`pip install --no-build-isolation .` where a C++ compiler and torch are installed"
        )
    missing_cuda = _missing_cuda()
    demanded = os.environ.get("XMLKERNELS_CUDA") == "1" and torch.version.cuda is not None
    if missing_cuda is not None and (demanded or (required and _cuda_can_load())):
        raise ImportError(
            f"xmlkernels: CUDA kernels are required, but {missing_cuda}; build them with "
            "`XMLKERNELS_CUDA=1 pip install --no-build-isolation .` where nvcc is installed, or "
            "set XMLKERNELS_CUDA=0"
        )
    return reason


def load_late() -> None:
    """Load the CUDA kernels where they have been built since `load` looked for them."""
    global missing_cuda  # noqa: PLW0603  (the libraries load once per process)
    if missing_cuda is not None:
        missing_cuda = _missing_cuda()


def _load(library: Path) -> str | None:
    if os.environ.get("XMLKERNELS_NATIVE") == "0":
        return "XMLKERNELS_NATIVE=0"
    if not library.exists():
        return "the package was built without native code"
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{library.name} does not load under torch {torch.__version__}: {error}"
    return None


def _cuda_can_load() -> bool:
    """Return whether the CUDA library is there and fits this torch.

    A CPU-only torch lacks what it is linked with.
    """
    return (
        torch.version.cuda is not None
        and _CUDA_LIBRARY.exists()
        and os.environ.get("XMLKERNELS_CUDA") != "0"
    )


def _missing_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if os.environ.get("XMLKERNELS_CUDA") == "0":
        return "XMLKERNELS_CUDA=0"
    if not _CUDA_LIBRARY.exists():
        return "the package was built without CUDA kernels (nvcc builds them)"
    return _load(_CUDA_LIBRARY)


def warn_reference(device: str, reason: str) -> None:
    """Warn once per device type that an op runs on its slow reference.

    The reference may hold whole matrices (`B x L`).
    """
    if device not in _warned:
        _warned.add(device)
        builds = (
            "`pip install --no-build-isolation .` builds kernels, given a C++ compiler, cmake, "
            "ninja and pybind11 (-v shows what is missing)"
        )
        mend = {"cpu": builds, "cuda": f"{builds} where nvcc is installed"}.get(
            device, "kernels exist for CPU and CUDA alone"
        )
        warnings.warn(
            f"xmlkernels: ops on {device} run on their slow reference: {reason}. The full-label "
            f"ops then hold all logits; {mend}",
            RuntimeWarning,
            stacklevel=3,
        )
