"""Clocks, alternating rounds, quantiles, peak memory, the machine and its load."""

import ctypes
import gc
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy
import torch

Step = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)
Held = TypeVar("Held")

ROUNDS = 7
"""Fewest rounds whose median is reported."""
_SAMPLE_S = 0.02
_MAX_ROUNDS = 200


class Clock:
    """Times calls on one device.

    CPU: wall clock around `repeats` calls, divided. CUDA: events around one call, with the L2 cache
    overwritten before it, so that a table that fits the cache is read from memory as it is in
    training.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
            self._flush = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")

    def once(self, step: Step, repeats: int = 1) -> float:
        """Return the milliseconds of one call."""
        if self.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end)
        begin = time.perf_counter_ns()
        for _ in range(repeats):
            step()
        return (time.perf_counter_ns() - begin) / 1e6 / repeats

    def repeats(self, step: Step) -> int:
        """Return the calls per sample.

        A CPU sample of less than 20 ms would mostly measure the scheduler.
        """
        step()  # the first call compiles, allocates and faults pages in
        if self.device == "cuda":
            return 1
        return min(1000, max(1, math.ceil(_SAMPLE_S * 1e3 / max(self.once(step), 1e-6))))


def alternate(
    steps: Mapping[Key, Step], clock: Clock, *, rounds: int = ROUNDS, budget_s: float = 20.0
) -> dict[Key, list[float]]:
    """Time every step once per round, in one process: a drift of the machine meets all alike.

    The order turns by one place each round, so that none always follows the same neighbour.

    Args:
        steps: what to time, by key; each is called once or more before the first round.
        clock: of their device.
        rounds: at least this many.
        budget_s: seconds of rounds to fill beyond that; quick steps get up to 200 rounds.

    Returns:
        Milliseconds per call, one entry per round, by key.
    """
    repeats = {key: clock.repeats(step) for key, step in steps.items()}
    samples: dict[Key, list[float]] = {key: [] for key in steps}
    order, begin = list(steps), time.monotonic()
    for done in range(_MAX_ROUNDS):
        if done >= rounds and time.monotonic() - begin > budget_s:
            break
        for key in order:
            samples[key].append(clock.once(steps[key], repeats[key]))
        order = order[1:] + order[:1]
    return samples


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """Return p20, p50 and p80, interpolated linearly between samples."""
    p20, p50, p80 = numpy.quantile(samples, (0.2, 0.5, 0.8))
    return float(p20), float(p50), float(p80)


def peak_bytes(
    device: str, inputs: Callable[[], Held], start: Callable[[Held], Step], steps: int = 3
) -> int | None:
    """Measure the most memory held during the first steps beyond what `inputs` made.

    State, caches and temporaries count alike. On a CPU this is the kernel's own high-water mark of
    resident pages (`VmHWM`, reset after the inputs are made), so no peak between two samples is
    missed. Call it in a fresh process: memory that an allocator kept from earlier work would be
    taken again unseen. On CUDA it is the caching allocator's mark.

    Returns:
        Bytes; None where the platform cannot reset the mark (not Linux).
    """
    held = inputs()
    warm = torch.ones(256, 256, device=device)
    # A library's own one-off buffers are not the step's.
    for dtype in (torch.float32, torch.bfloat16):
        torch.mm(warm.to(dtype), warm.to(dtype))
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _run(start(held), steps)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    if sys.platform == "linux":
        # glibc: free heap pages go back, so reuse is seen.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmHWM")
    except OSError:
        return None
    _run(start(held), steps)
    return _status("VmHWM") - before


def _run(step: Step, steps: int) -> None:
    for _ in range(steps):
        step()


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


class Load:
    """What else uses the machine's processors while this process times."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _idle, _wait, irq, softirq, steal = (int(field) for field in fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, sum(os.times()[:2]), time.monotonic()

    def others(self) -> float | None:
        """Return how many processors others have kept busy since this was made.

        Others are other guests of the host too. None where it is not known.
        """
        now = self._now()
        if now is None or self._before is None or now[2] <= self._before[2]:
            return None
        busy, own, wall = (a - b for a, b in zip(now, self._before, strict=True))
        return max(0.0, (busy - own) / wall)


def load_average() -> float | None:
    """Return the load average of the last minute; None where the platform has none."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def slug(text: str) -> str:
    """Return the words of a hardware name that tell machines apart, for a file name."""
    text = re.sub(r"\((r|tm|c)\)|@.*|\b(cpu|processor|with .*|\d+-core)\b", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def instruction_set(flags: set[str]) -> str:
    """Name the widest unit of the CPU that the kernels or the GEMM library can use."""
    known = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve", "asimd")
    names = ("amxbf16", "avx512bf16", "avx512", "avx2", "sve", "neon")
    return next((name for flag, name in zip(known, names, strict=True) if flag in flags), "scalar")


def machine_name(device: str) -> str:
    """Return for example `amd-epyc-2c-avx512bf16`, or the GPU's name."""
    if device == "cuda":
        return slug(torch.cuda.get_device_name(0))
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        capability = torch.backends.cpu.get_cpu_capability().lower()
        fields["flags"] = capability.replace("avx512", "avx512f")
    model = fields.get("model name") or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    isa = instruction_set(set((fields.get("flags") or fields.get("Features") or "").split()))
    return f"{slug(model)}-{cores}c-{isa}"
