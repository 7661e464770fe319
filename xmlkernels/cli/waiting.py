"""Choose whether torch's threads spin or sleep while they wait, before torch is loaded.

OpenMP's threads wait by spinning for some ten milliseconds. On an idle machine that is the fastest
way. Where other programs want the same cores, waiting threads take them away from working ones, and
everything becomes several to twenty times slower. Sleeping costs 10 to 40 % on an idle machine, so
a command looks first. The library neither reads nor writes the environment: servers choose for
themselves (docs/serving.md).

`python -m xmlkernels.cli.waiting` prints what a command would choose now: "spin", or "sleep" and
why.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_BUSY = 0.75  # cores; every system does less than that in the background
_FIRST, _SECOND = 0.1, 0.4  # seconds to look; the second time only where the first saw something
_HELP = {"-h", "--help"}


def choose(words: Sequence[str]) -> None:
    """Let threads sleep while they wait where other programs use the cores, and say so.

    Nothing happens where the user has chosen already. Call it before torch is imported: OpenMP
    reads the environment once, when it is loaded.
    """
    # As torchrun sets it: with one thread nobody waits.
    alone = os.environ.get("OMP_NUM_THREADS") == "1"
    chosen = any(name in os.environ for name in _CHOSEN)
    if alone or chosen or "torch" in sys.modules or _HELP & set(words):
        return
    if reason := crowded():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0":
            mend = "OMP_WAIT_POLICY=ACTIVE has them spin"
            note = f"note: {reason}; threads sleep while they wait ({mend})"
            print(note, file=sys.stderr, flush=True)


def crowded(root: Path = Path("/"), sleep: Callable[[float], None] = time.sleep) -> str:
    """Return why threads should not spin here, or "".

    Args:
        root: where /proc and /sys are; another place in tests.
        sleep: lets time pass; another one in tests.
    """
    cores = _cores()
    if len(cores) < 2:
        return ""  # one thread has nobody to wait for
    allowed = _quota(root)
    if allowed is not None and allowed < len(cores):
        return f"this process may use {allowed:g} of {len(cores)} cores"
    for seconds in (_FIRST, _SECOND):
        busy = _busy(root, cores, seconds, sleep)
        if busy < _BUSY:
            return ""
    return f"other programs use {busy:.1f} of {len(cores)} cores"


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _busy(root: Path, cores: set[int], seconds: float, sleep: Callable[[float], None]) -> float:
    """Return how many of these cores others keep busy while this process sleeps.

    0 where the system does not say.
    """
    before = _times(root, cores)
    sleep(seconds)
    after = _times(root, cores)
    busy = 0.0
    for core in before.keys() & after.keys():
        idle, total = (after[core][part] - before[core][part] for part in (0, 1))
        busy += 1 - idle / total if total > 0 else 0
    return busy


def _times(root: Path, cores: set[int]) -> dict[int, tuple[int, int]]:
    """Return the ticks that each core was idle (or waited for a disk), and all its ticks."""
    try:
        lines = (root / "proc" / "stat").read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, *ticks = line.split() or [""]
        if name[:3] == "cpu" and name[3:].isdecimal() and int(name[3:]) in cores:
            # user nice system idle iowait irq softirq steal
            numbers = [int(tick) for tick in ticks[:8]]
            found[int(name[3:])] = numbers[3] + numbers[4], sum(numbers)
    return found


def _quota(root: Path) -> float | None:
    """Return how many cores' time the cgroup grants this process, or None."""
    for place, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (root / "sys" / "fs" / "cgroup" / place).read_text().split()
            if period is not None:
                words += (root / "sys" / "fs" / "cgroup" / period).read_text().split()
        except OSError:
            continue
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
            return int(words[0]) / int(words[1])
    return None


if __name__ == "__main__":
    found = crowded()
    print(f"sleep: {found}" if found else "spin")
