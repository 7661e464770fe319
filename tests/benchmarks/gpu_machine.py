"""A machine with a card, played: rows, ceilings and workers."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import cases, run, shapes
from benchmarks.children import Outcome

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


class Machine:
    """Answers `children.run` from a script; each call takes `seconds` of the faked clock."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.now, self.seconds = 0.0, seconds
        self.commands: list[list[str]] = []
        self.limits: list[float] = []
        self.measuring: list[tuple[int | None, list[dict[str, object]]]] = []
        self.answers: dict[str, tuple[int | None, list[str], str]] = {
            "setup.py": (0, [], ""),
            "xmlkernels.ops": (0, ["native library: loaded", "CUDA library: loaded"], ""),
            "--ops": (
                0,
                ['{"op": "bce_step", "why": null}', '{"op": "cluster_step", "why": "no kernel"}'],
                "",
            ),
            "--ceilings": (0, [json.dumps({"row": r}) for r in CEILINGS], ""),
        }

    def monotonic(self) -> float:
        return self.now

    def run(
        self, command: Sequence[str], limit_s: float, on_line: Callable[[str], None] | None = None
    ) -> Outcome:
        self.commands.append(list(command))
        self.limits.append(limit_s)
        asked = next((name for name in self.answers if name in command), None)
        if asked is not None:
            status, lines, errors = self.answers[asked]
        else:
            status, messages = (
                self.measuring.pop(0) if "--rest" not in command else (0, [{"todo": []}])
            )
            lines = ["a library's warning", *map(json.dumps, messages)]
            errors = "Segmentation fault"
        self.now += limit_s if status is None else min(self.seconds, limit_s)
        for line in lines if on_line else ():
            on_line(line)  # type: ignore[misc]
        return Outcome(status, tuple(lines), errors)


def messages(
    *keys: str, ms: float = 4.0, todo: Sequence[str] | None = None
) -> list[dict[str, object]]:
    told: list[dict[str, object]] = [{"todo": list(todo or keys)}]
    for place, key in enumerate(keys):
        told += [{"begin": key}, {"row": row(key, ms * (place + 1))}]
    return told


def stored(tmp_path: Path) -> list[dict[str, str]]:
    with open(tmp_path / "fake-card.csv", newline="") as file:
        return list(csv.DictReader(file))
