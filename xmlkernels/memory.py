"""How much memory there is for a run, and the word against one that needs more."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from xmlkernels.errors import InputError
from xmlkernels.free_memory import control_groups
from xmlkernels.planner import readable

# the plan's activations are an estimate: what passes the memory by less than a tenth is let go on
MARGIN = 1.1


def machine_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that this process may use.

    Those of the machine or, where it is less, what its cgroup allows.

    What other programs hold at the moment does not count, nor does swap: a run goes on for long,
    and they come and go.

    Args:
        root: where the system's files are; another one in tests.

    Returns:
        None where the system does not say.
    """
    known = [limit for limit, _ in control_groups(root)]
    meminfo = root / "proc" / "meminfo"
    if meminfo.exists():
        sizes = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemTotal" in sizes:
            known.append(int(sizes["MemTotal"].split()[0]) << 10)
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(known, default=None)


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of a device; None where nobody knows."""
    if device.type == "cpu":
        return machine_memory()
    if device.type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(device).total_memory)
    return None


def check_memory(
    parts: Mapping[str, int], device: torch.device, mends: Mapping[str, str], *, processes: int = 1
) -> None:
    """Refuses a plan that no memory can hold.

    Args:
        parts: bytes by part of one process, as `plan` gives them.
        device: where they will be.
        mends: what helps against a part, by how its name begins; the largest part decides.
        processes: that share the device's memory.

    Raises:
        InputError: they are more than the device has, by a tenth of it or more.
    """
    limit, total = device_memory(device), sum(parts.values()) * processes
    if limit is None or total <= MARGIN * limit:
        return
    large = sorted(parts.items(), key=lambda part: -part[1])
    named = ", ".join(
        f"{name} {readable(count)}" for name, count in large if count * processes >= total / 100
    )
    several = f"{processes} processes, each " if processes > 1 else ""
    mend = next((text for begin, text in mends.items() if large[0][0].startswith(begin)), mends[""])
    whose = "this machine" if device.type == "cpu" else str(device)
    expected = f"at most {readable(limit)}, the memory of {whose}"
    raise InputError(
        "memory of this run", expected, f"about {readable(total)} ({several}{named})", mend
    )
