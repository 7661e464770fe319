"""How much memory this process can still take.

The machine, its control groups and its own limit count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# What a group holds of files and can give up at once counts as in use there: by version 2's names
# and by version 1's.
_CACHE = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")


def control_groups(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """Return (limit, bytes in use without the cache of files) of every group with a limit.

    Groups are those from this process's own up, of version 2 and of version 1.

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
        most, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else ("memory.max", "memory.current")
        )
        here = base / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder != base and base not in folder.parents:
                break
            # The path is that of the host where the container has no view of its own: then only the
            # top is there.
            text = (folder / most).read_text().strip() if (folder / most).is_file() else "max"
            if text.isdecimal():
                yield int(text), _in_use(folder, used)


def _in_use(folder: Path, name: str) -> int:
    total, facts = 0, {}
    with suppress(OSError, ValueError):
        total = int((folder / name).read_text())
    with suppress(OSError, ValueError):
        facts = {
            key: int(count)
            for key, count in map(str.split, (folder / "memory.stat").read_text().splitlines())
        }
    # Version 1 has both kinds of names; the totals include the groups below, as the usage does.
    names = _CACHE[2:] if _CACHE[2] in facts else _CACHE[:2]
    return max(0, total - sum(facts.get(name, 0) for name in names))


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take; None where the system does not say.

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
