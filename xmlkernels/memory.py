"""How much memory there is, how much a process can still take, and when to refuse a run."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from xmlkernels.errors import InputError

if TYPE_CHECKING:
    import torch

# The plan's activations are an estimate: what exceeds the memory by less than a tenth may start.
MARGIN = 1.1
# A control group counts its files' cache as used, though it can give it up at once. The names are
# those of version 2, then those of version 1.
_CACHE = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")


def machine_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process may use: the machine's or, if less, its control group's.

    What other programs hold at the moment does not count, nor does swap: a run takes long, and they
    come and go.

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


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take; None where the system does not say.

    Counted are the machine's free memory, the limits of the control groups, and the process's own
    limit.

    Args:
        root: where the system's files are; another one in tests.
    """
    found = [limit - used for limit, used in control_groups(root)]
    with suppress(OSError, ValueError, IndexError):
        lines = (root / "proc" / "meminfo").read_text("ascii").splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    with suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            pages = int((root / "proc" / "self" / "statm").read_text("ascii").split()[0])
            found.append(limit - pages * resource.getpagesize())
    return max(0, min(found)) if found else None


def resident_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process holds now, files that it reads by mapping among them.

    None where the system does not say.

    Args:
        root: where the system's files are; another one in tests.
    """
    with suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        pages = int((root / "proc" / "self" / "statm").read_text("ascii").split()[1])
        return pages * resource.getpagesize()
    return None


def control_groups(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes in use without the cache of files) of each control group with a limit.

    These are the groups of this process and all above them, of version 2 and of version 1.

    Args:
        root: where the system's files are; another one in tests.
    """
    listed = root / "proc" / "self" / "cgroup"
    for line in listed.read_text().splitlines() if listed.exists() else ():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers not in ("", "memory"):
            continue
        base = root / "sys" / "fs" / "cgroup" / controllers
        most, used = "memory.max", "memory.current"
        if controllers:
            most, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        here = base / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder != base and base not in folder.parents:
                break
            # A container without a view of its own has the host's path: only the top exists then.
            text = (folder / most).read_text().strip() if (folder / most).is_file() else "max"
            if text.isdecimal():
                yield int(text), _in_use(folder, used)


def _in_use(folder: Path, name: str) -> int:
    total, facts = 0, {}
    with suppress(OSError, ValueError):
        total = int((folder / name).read_text())
    with suppress(OSError, ValueError):
        pairs = map(str.split, (folder / "memory.stat").read_text().splitlines())
        facts = {key: int(count) for key, count in pairs}
    # Version 1 has both kinds of names; the totals include the groups below, as the usage does.
    names = _CACHE[2:] if _CACHE[2] in facts else _CACHE[:2]
    return max(0, total - sum(facts.get(name, 0) for name in names))


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of a device; None where nobody knows."""
    import torch

    if device.type == "cpu":
        return machine_memory()
    if device.type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(device).total_memory)
    return None


def check_memory(
    parts: Mapping[str, int], device: torch.device, mends: Mapping[str, str], *, processes: int = 1
) -> None:
    """Refuse a plan that no memory can hold.

    Args:
        parts: bytes by part of one process, as `planner.plan` gives them.
        device: where they will be.
        mends: what helps against a part, by how its name begins; the largest part decides.
        processes: that share the device's memory.

    Raises:
        InputError: the plan exceeds the device's memory by a tenth or more.
    """
    limit, total = device_memory(device), sum(parts.values()) * processes
    if limit is None or total <= MARGIN * limit:
        return
    large = sorted(parts.items(), key=lambda part: -part[1])
    shown = [(name, count) for name, count in large if count * processes >= total / 100]
    named = ", ".join(f"{name} {readable(count)}" for name, count in shown)
    several = f"{processes} processes, each " if processes > 1 else ""
    mend = next((text for begin, text in mends.items() if large[0][0].startswith(begin)), mends[""])
    whose = "this machine" if device.type == "cpu" else str(device)
    expected = f"at most {readable(limit)}, the memory of {whose}"
    got = f"about {readable(total)} ({several}{named})"
    raise InputError("memory of this run", expected, got, mend)


def release_free() -> None:
    """Give the system what malloc holds free, between blocks in use too, where it can (glibc).

    What many buffers of some MB leave behind is otherwise kept, now more and now less of it, and
    adds to the peak of what comes next. Takes milliseconds.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def readable(count: int) -> str:
    """Write a number of bytes in the unit that suits it."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


LESS_MEMORY = (
    "end other programs, or ask for less, as by a smaller --batch or --table bf16 "
    "(xmlkernels plan RECIPE says what a run takes, and what would fit)"
)
# Torch on a CPU, CUDA's allocator, NumPy.
_WANTED = (
    re.compile(r"can't allocate memory: you tried to allocate (?P<bytes>\d+) bytes"),
    re.compile(r"out of memory\. Tried to allocate (?P<size>[\d.]+ \wi?B)\. (?P<place>GPU \d+)?"),
    re.compile(r"Unable to allocate (?P<size>[\d.]+ \wi?B)"),
)


def out_of_memory(error: BaseException) -> str | None:
    """Return what a user is told where an error means that memory has run out; else None."""
    found = next((hit for form in _WANTED if (hit := form.search(str(error)))), None)
    if found is None:
        return "memory has run out" if isinstance(error, MemoryError) else None
    if not isinstance(error, MemoryError | RuntimeError):
        return None
    parts = found.groupdict()
    size = parts.get("size") or f"{int(parts['bytes']) / 2**30:.3g} GiB"
    place = f" of {parts['place']}" if parts.get("place") else ""
    return f"memory{place} has run out: another {size} could not be had"
