"""Print what a report of a fault needs: `xmlkernels env`."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from xmlkernels import __version__, native
from xmlkernels.cli.arguments import parse
from xmlkernels.ops import missing
from xmlkernels.training.environment import PACKAGES


@dataclass(frozen=True)
class Options:
    """None."""


def main(words: Sequence[str]) -> None:
    """Print versions, native libraries and devices."""
    parse(Options, "xmlkernels env", __doc__ or "", words=words)
    print(f"xmlkernels {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in dict.fromkeys([*PACKAGES, "triton", "scikit-learn", "numba"]):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package}: not installed")
    print(f"native library: {'loaded' if missing is None else 'not loaded, ' + missing}")
    if torch.version.cuda is not None:
        cuda = native.missing_cuda
        print(f"CUDA library: {'loaded' if cuda is None else 'not loaded, ' + cuda}")
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(
        f"devices: {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}; "
        f"{', '.join(cards) or 'no GPU'}"
    )
