"""A machine with a card, played: rows, ceilings and workers."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cases, run, shapes

OWN, ELMO, EAGER = "xmlkernels/sgd/bf16", "elmo/sgd/bf16", "eager/momentum/fp32"

SHAPE = cases.BENCHMARKS["bce_step"].gpu_shapes[0]


def row(
    key: str, ms: float, *, op: str = "bce_step", shape: shapes.Shape = SHAPE, phase: str = ""
) -> run.Row:
    """A row with the rates that belong to its time."""
    impl, plain, dtype = key.split("/")
    found = dict.fromkeys(run.COLUMNS) | {
        "op": op,
        "impl": impl,
        "phase": phase or plain,
        "dtype": dtype,
        "shape": shape.name,
    }
    case = next(c for c in cases.build_for_card(op, shape, "cuda") if c.key == (impl, plain, dtype))
    found |= {
        "date": "now",
        "commit": "abc",
        "machine": "fake-card",
        "device": "cuda",
        "torch": "2",
        "peak_mb": 120.0,
    }
    found |= {letter: getattr(shape, letter) for letter in "BLDSK"}
    found |= {
        "ms_p20": ms,
        "ms_p50": ms,
        "ms_p80": ms,
        "gbps": case.bytes / ms / 1e6,
        "tflops": case.flops / ms / 1e9,
    }
    return found


def ceiling(impl: str, dtype: str, gbps: float, tflops: float) -> run.Row:
    found = dict.fromkeys(run.COLUMNS) | {
        "op": "ceiling",
        "impl": impl,
        "phase": "ceiling",
        "dtype": dtype,
        "date": "now",
    }
    return found | {
        "commit": "abc",
        "machine": "fake-card",
        "torch": "2",
        "gbps": gbps,
        "tflops": tflops,
    }


CEILINGS = [
    ceiling("copy", "bf16", 3000, 0),
    ceiling("mm", "bf16", 400, 800),
    ceiling("mm", "fp32", 40, 50),
]


HANGS = "hangs"
READY: list[object] = [{"checked": OWN, "error": 0.001}, {"ready": True}]


class Machine:
    """A machine under a faked clock: workers that check, obey and tell, each line in `seconds`.

    Attributes:
        starts: what the workers of an op tell when they begin, one list per start; READY without.
        scripts: what they tell, by op, shape and round, one list per order; nothing without. A
            number ends the process with that status.
        build: seconds it takes and its status.
    """

    def __init__(self, seconds: float = 0.5) -> None:
        self.now, self.seconds = 0.0, seconds
        self.commands: list[list[str]] = []
        self.orders: list[tuple[str, dict[str, object]]] = []
        self.starts: dict[str, list[list[object]]] = {}
        self.scripts: dict[tuple[str, str, str], list[list[object]]] = {}
        self.ceilings: list[object] = [{"row": r} for r in CEILINGS]
        self.build: tuple[float, int] = (60.0, 0)

    def monotonic(self) -> float:
        return self.now

    def child(
        self, command: Sequence[str], *, threads: int | None = None, nice: bool = False
    ) -> "Played":
        return Played(self, list(command))

    def measuring(self, *told: list[object]) -> None:
        """What the worker of bce_step tells of its first shape, one list per order."""
        self.scripts["bce_step", SHAPE.name, "goal"] = list(told)


class Played:
    """A process of the machine."""

    def __init__(self, machine: Machine, command: list[str]) -> None:
        machine.commands.append(command)
        self.machine, self.status = machine, None
        self.begun = machine.now
        self.op = command[command.index("--op") + 1] if "--op" in command else None
        starts = machine.starts.get(self.op or "", [])
        self.lines: list[object] = list(starts.pop(0) if starts else READY)
        if "--checked" in command:
            self.lines = [{"ready": True}]

    def send(self, line: str) -> None:
        order = json.loads(line)
        assert self.op is not None
        self.machine.orders.append((self.op, order))
        told = self.machine.ceilings
        if "round" in order:
            scripts = self.machine.scripts.get((self.op, order["shape"], order["round"]), [])
            told = scripts.pop(0) if scripts else []
        self.lines += ["a library's warning", *told, {"done": True}]

    def read(self, limit_s: float) -> str | None:
        machine = self.machine
        limit_s = max(0.0, limit_s)
        if self.op is None:
            left = self.begun + machine.build[0] - machine.now
            machine.now += max(0.0, min(left, limit_s))
            self.status = machine.build[1] if left <= limit_s else None
            return None
        line = self.lines[0] if self.lines else HANGS
        if line == HANGS or machine.seconds > limit_s:
            machine.now += limit_s
            return None
        machine.now += machine.seconds
        self.lines.pop(0)
        if isinstance(line, int):
            self.status = line
            return None
        return json.dumps(line)

    def end(self) -> str:
        return "nvcc fatal: no such file" if self.op is None else "Segmentation fault\n"


def messages(*keys: str, ms: float = 4.0) -> list[object]:
    told: list[object] = []
    for place, key in enumerate(keys):
        told += [{"begin": key}, {"row": row(key, ms * (place + 1))}]
    return told


def stored(tmp_path: Path) -> list[dict[str, str]]:
    with open(tmp_path / "fake-card.csv", newline="") as file:
        return list(csv.DictReader(file))
