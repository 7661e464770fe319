"""Facts that a run records about itself: commit, versions, devices, number formats."""

import resource
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import torch

from xmlkernels import __version__, dist
from xmlkernels.models.base import Model
from xmlkernels.ops import missing
from xmlkernels.training.plan import Plan

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "safetensors")


def commit() -> str:
    """Return the commit of the source tree, with -dirty for changed files, else the version.

    An installed package may lie inside somebody else's repository (a virtual environment in a
    project, say): only the repository that tracks this very file is asked.
    """
    here = Path(__file__).resolve()
    try:
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        return _git(
            here.parent, "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return f"version {__version__}"


def _git(folder: Path, *words: str) -> str:
    # Without its optional locks: a run that is killed meanwhile must leave none in the user's
    # repository.
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def environment(plan: Plan, model: Model) -> dict[str, Any]:
    """Collect what the bits of a result depend on besides settings and data, as flat JSON."""
    return versions(PACKAGES) | {
        "device": str(model.device),
        "label_device": str(plan.label_device or model.device),
        "table_store": plan.config.table_store.partition(":")[0],
        "threads": torch.get_num_threads(),
        "processes": dist.size(),
        "native": missing is None,
        "autocast": dtype_name(getattr(model.encoder, "autocast", None)),
        "table": plan.table,
        "state": plan.state,
    }


def around_a_ranker() -> dict[str, Any]:
    """Collect commit, versions and the process's peak memory in MB, for a ranker's metrics.json."""
    return {
        "commit": commit(),
        "environment": versions(("numpy", "scipy", "numba", "scikit-learn")),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python, of xmlkernels, and of packages."""
    found = {"python": python_version(), "xmlkernels": __version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a torch built from source may have no metadata
            found[name] = "unknown"
    return found


def dtype_name(dtype: torch.dtype | None) -> str:
    """Name a dtype: fp32, bf16 or fp16; None is autocast switched off."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype or torch.float32, "fp32")


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Describe what has changed on one line; empty when nothing has."""
    return ", ".join(
        f"{key} {now[key]} instead of {before[key]}"
        for key in now
        if key in before and before[key] != now[key]
    )
