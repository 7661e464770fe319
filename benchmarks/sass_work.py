"""What launches ask of a card, and the time that this takes: a model, nothing is measured.

A resource's time is what all blocks ask of it, spread over the card. "largest" is the longest of
them; "expected" adds half of the others, divided by the blocks that a multiprocessor holds, which
is how much of them such kernels leave uncovered.

What TMA loads is no such part of a block where the loads run on from tile to tile (`Work.ahead`):
no warp waits for it while buffers are filled. Then the shorter of loads and the rest is uncovered
by half over blocks and buffers, as work is by half over blocks: with one buffer, loads and products
take turns. On the other hand all that TMA moves passes through shared memory, beside the operands.

Latencies and the gaps between launches are in no column.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import sass
from benchmarks.sass_launch import Launch, Trips, build, find_trips, recorded


@dataclass(frozen=True)
class Card:
    """What a card does in a second, as read on such cards or published by NVIDIA.

    Attributes:
        multiprocessors, hertz: of the card. products: multiply-adds in bf16 of one multiprocessor
            and cycle (data sheets). memory: bytes of a large copy (H200: 4.3e12 seen; A100, H100:
            nine tenths of the data sheet). cache: bytes from L2 to all multiprocessors (published
            measurements of the H100: 5.5e12 to 9e12).
    """

    arch: str
    multiprocessors: int
    hertz: float
    products: int
    memory: float
    cache: float
    matmul: float


CARDS = {
    "H200": Card("sm_90a", 132, 1.7e9, 2048, 4.3e12, 7e12, 790e12),
    "H100": Card("sm_90a", 132, 1.7e9, 2048, 3.0e12, 7e12, 790e12),
    "A100": Card("sm_80", 108, 1.41e9, 1024, 1.8e12, 4e12, 250e12),
}
Traffic = Callable[[Mapping[str, Any]], tuple[float, float]]
"""Bytes of one launch between memory and L2, and of those that TMA moves from L2 and to it."""


@dataclass(frozen=True)
class Work:
    """What one launch asks of a card.

    Attributes:
        kernel: its name. counts: what a warp executes. warps: of a block. held: blocks that a
            multiprocessor holds. blocks: of the launch.
        memory: bytes between memory and L2. cache: bytes between L2 and the processors that no
            instruction counts: those of TMA. ahead: 0, or the buffers of TMA's loads where these
            run on from tile to tile, whatever the block does.
    """

    kernel: str
    counts: sass.Counts
    warps: int
    held: int
    blocks: int
    memory: float = 0.0
    cache: float = 0.0
    ahead: int = 0


Works = Callable[[Card], Iterable[Work]]


@dataclass(frozen=True)
class Row:
    """An op at the shape of a figure to reach.

    Attributes:
        op, shape, phase, dtype: as `floors.Goal` has them.
        flop, bytes: useful ones, as `cases_NAME.py` counts them: the floor.
        works: what it launches on a card. Raises NotImplementedError where the op refuses it.
    """

    op: str
    shape: str
    phase: str
    dtype: str
    flop: int
    bytes: int
    works: Works

    def floor(self, card: Card) -> float:
        """Return the milliseconds below which no implementation is."""
        return max(self.bytes / card.memory, self.flop / card.matmul) * 1e3


@dataclass
class Line:
    """The model of all launches of one kernel: milliseconds by resource.

    ahead: of its launches, see `Work`; fed: what of L2's time these loads take.
    """

    kernel: str
    launches: int
    occupancy: int
    times: dict[str, float]
    ahead: int = 0
    fed: float = 0.0

    @property
    def largest(self) -> float:
        """The longest of the times."""
        return max(self.times.values())

    @property
    def expected(self) -> float:
        """The longest of a multiprocessor's, and half of its others over the blocks held.

        Memory's is a bound of it: loads are under way while blocks compute.
        """
        own = {name: t for name, t in self.times.items() if name != "memory"}
        own["L2"] -= self.fed
        longest = max(own.values())
        others = sum(t for name, t in own.items() if name != "ALU") - longest
        out = longest + max(others, 0.0) / 2 / self.occupancy
        if self.fed:
            uncovered = min(out, self.fed) / 2 / self.occupancy / self.ahead
            out = max(out, self.fed) + uncovered
        return max(out, self.times["memory"])


def of_triton(
    call: Callable[[], object],
    trips: Mapping[str, Trips] | None = None,
    traffic: Mapping[str, Traffic] | None = None,
    ahead: Callable[[Launch], int] = lambda _: 0,
) -> Works:
    """Return what a call of an op launches, from its Triton kernels.

    Args:
        call: runs an op on CPU tensors.
        trips: of loops whose number of trips no argument tells; see `sass.Trips`. Those of loops
            that a kernel does not have are left out.
        traffic: by kernel; one that is not named moves what its instructions do, through L2 alone.
        ahead: of a launch, see `Work`.

    Raises:
        ValueError: a loop has no trips.
    """

    def works(card: Card) -> Iterable[Work]:
        with recorded(card.arch) as launches:
            call()
        built: dict[str, tuple[sass.Counts, int, int]] = {}
        for launch in launches:
            name = launch.kernel.__name__
            shown = {
                k: str(v.dtype) if isinstance(v, torch.Tensor) else v
                for k, v in launch.arguments.items()
                if k not in PLACES
            }
            key = f"{name} {shown} {launch.options}"
            if key not in built:
                binary = build(launch, card.arch)
                (code,) = sass.disassemble(binary.asm["cubin"]).values()
                (needs,) = sass.resources(binary.asm["cubin"]).values()
                warps, shared = binary.metadata.num_warps, binary.metadata.shared
                counts = code.count(find_trips(code, launch, trips or {}))
                held = sass.occupancy(needs.registers, shared, warps, card.arch)
                built[key] = counts, warps, held
            moved = (traffic or {}).get(name, lambda _: (0.0, 0.0))(launch.arguments)
            yield Work(name, *built[key], launch.blocks, *moved, ahead(launch))

    return works


PLACES = ("first", "begin", "start")
"""Arguments that say where a launch begins: launches that differ in them alone are alike."""


def lines_of(works: Iterable[Work], card: Card) -> list[Line]:
    """Sum launches kernel by kernel."""
    lines: dict[str, Line] = {}
    for work in works:
        line = lines.setdefault(work.kernel, Line(work.kernel, 0, work.held, {}, work.ahead))
        line.launches += 1
        for resource, seconds in _times(work.counts, work.warps, card).items():
            total = line.times.get(resource, 0.0) + seconds * work.blocks * 1e3
            line.times[resource] = total
        line.times["memory"] = line.times.get("memory", 0.0) + work.memory / card.memory * 1e3
        line.times["L2"] += work.cache / card.cache * 1e3
        line.fed += work.cache / card.cache * 1e3 if work.ahead else 0.0
        line.times["shared"] += work.cache / 128 / card.multiprocessors / card.hertz * 1e3
    return list(lines.values())


def _times(counts: sass.Counts, warps: int, card: Card) -> dict[str, float]:
    """Seconds of the card that one block takes of each resource.

    A multiprocessor issues an instruction of four warps per cycle, half as many of integers, and
    moves 128 bytes of shared memory.
    """
    cycle = 1 / card.hertz / card.multiprocessors
    shared = sum(counts.bytes[kind] for kind in ("lds", "sts", "ldgsts")) + counts.operand_bytes
    cache = sum(counts.bytes[kind] for kind in ("ldg", "stg", "ldgsts"))
    return {
        "issue": counts.issue * warps / 4 * cycle,
        "ALU": counts.kinds["alu"] * 2 * warps / 4 * cycle,
        "tensor": counts.multiplications * warps / card.products * cycle,
        "shared": shared * warps / 128 * cycle,
        "L2": cache * warps / card.cache,
    }


def total(lines: Sequence[Line]) -> float:
    """Return the milliseconds of launches one after another."""
    return sum(line.expected for line in lines)


def table(lines: Sequence[Line]) -> list[str]:
    """Return the lines of a table, milliseconds; every one of them a model."""
    names = ("issue", "ALU", "tensor", "shared", "L2", "memory", "largest", "expected")
    out = [f"{'model, ms':24s} launches held " + " ".join(f"{n:>8s}" for n in names)]
    for line in lines:
        cells = [*(line.times[n] for n in names[:6]), line.largest, line.expected]
        shown = " ".join(f"{c:8.3f}" for c in cells)
        out.append(f"{line.kernel:24s} {line.launches:8d} {line.occupancy:4d} {shown}")
    return out
