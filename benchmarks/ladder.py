"""The speed ladder: one training step, from plain PyTorch to the fused one, a rung at a time.

    python benchmarks/ladder.py [--device cpu|cuda] [--shape NAME] [--json] [--no-compile]

The rungs are those of Renee's table 8 (MLSys 2023), written anew from its description, each with
what the one before it has unless it says otherwise:

    plain        PyTorch: dense targets, BCEWithLogitsLoss(sum), autograd, torch's fused SGD
    accumulated  the classifier in PIECES micro-batches
    compiled     torch.compile of logits and loss
    sparse       no autograd: logits turn into σ - y in place, at the positives alone; exact loss
    sampled      the same with the loss in one of LOSS_EVERY steps
    none         the same without a loss
    mixed        on a card: this package's fp32 master with fp16 products, piece by piece
    fused        this package's step, by table format

All train the same encoder on the same batch: a random BERT of the shape's depth and of MiniLM's
width. The encoder is not compiled: what that saves is the same on every rung. On a card, `sparse`,
`sampled` and `none` multiply in fp16 and keep an fp32 master, as Renee does; dtype says which.

A row is a rung and a phase: `step` the whole, `encoder` its forward and backward, `table` logits,
loss and gradients (of `fused` the update, too), `optimizer` AdamW and the table's SGD. ms_p* of
`sampled` are those of `none` and `sparse` of the same round, (LOSS_EVERY - 1) : 1: a loss in a
hundred steps meets no median. peak_mb is the table with its momentum and all that a step holds
beside them; encoder, its moments and the batch are not counted. tflops are of `table`, from 6 B L D
operations. Rungs take turns in one process; documents/s is B over the median of `step`. What is
printed is a table in Markdown (docs/results/ops-cpu.md).

Exit status: 0 done, 1 tests not green, 2 an input that cannot be used.
"""

import argparse
import datetime
import functools
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# The tree's own package is timed, installed or not: the commit in the row is the tree's.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import cases, run, timing
from benchmarks.ladder_rungs import (
    LOSS_EVERY,
    SETTINGS,
    TINY,
    Held,
    Rung,
    Setting,
    make_held,
    rungs_of,
)
from benchmarks.shapes import Shape
from xmlkernels.errors import InputError

OP = "ladder"
PARTS = ("encoder", "table", "optimizer")
HEADER = (
    "| rung | format | documents/s | step, ms (min to max) | encoder | table | optimizer | peak MB"
    " | against the first |\n|---|---|---|---|---|---|---|---|---|"
)


class Marks:
    """Clocks the parts of steps without waiting for the device within one."""

    def __init__(self, device: str) -> None:
        self._events = device == "cuda"
        self._steps: list[list[tuple[str, float | torch.cuda.Event]]] = []

    def begin(self) -> None:
        """Begin a step."""
        self._steps.append([("", self._now())])

    def reach(self, part: str) -> None:
        """End a part; one that comes again adds to its first."""
        self._steps[-1].append((part, self._now()))

    def _now(self) -> "float | torch.cuda.Event":
        if not self._events:
            return time.perf_counter_ns() / 1e6
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def times(self) -> dict[str, list[float]]:
        """Return milliseconds per step by part, without the first two steps, which warm up."""
        found: dict[str, list[float]] = {part: [] for part in PARTS}
        for marks in self._steps[2:] or self._steps:
            spent = dict.fromkeys(PARTS, 0.0)
            for (_, before), (part, now) in itertools.pairwise(marks):
                spent[part] += _between(before, now)
            for part, ms in spent.items():
                found[part].append(ms)
        return found


def _between(before: "float | torch.cuda.Event", now: "float | torch.cuda.Event") -> float:
    if isinstance(now, float):
        assert isinstance(before, float)
        return now - before
    assert not isinstance(before, float)
    return float(before.elapsed_time(now))


def start(rung: Rung, held: Held, marks: Marks | None = None) -> timing.Step:
    """Return the whole training step of a rung."""
    gradients, update = rung.make(held)
    reach = marks.reach if marks is not None else lambda part: None

    def step() -> tuple[Tensor, Tensor | None]:
        if marks is not None:
            marks.begin()
        held.optimizer.zero_grad(set_to_none=True)
        x = held.encoder(*held.inputs)
        reach("encoder")
        dx, loss = gradients(x.detach())
        reach("table")
        x.backward(dx)
        reach("encoder")
        update()
        held.optimizer.step()
        reach("optimizer")
        return dx, loss

    return step


def measure_peak(setting: Setting, device: str, key: tuple[str, str]) -> int | None:
    """Measure a rung's memory beyond encoder and batch, in bytes.

    On a CPU, call it in a fresh process (`timing.peak_bytes`).
    """
    rung = next(rung for rung in rungs_of(device) if rung.key == key)
    inputs = functools.partial(make_held, setting, device)
    return timing.peak_bytes(device, inputs, functools.partial(start, rung), steps=2)


def peaks(setting: Setting, device: str, rungs: Sequence[Rung]) -> dict[tuple[str, str], float]:
    """Measure the memory of each rung in 10⁶ bytes; without the compiler's own, and what fails."""
    found: dict[tuple[str, str], float] = {}
    for rung in (rung for rung in rungs if rung.name != "compiled" and rung.timed):
        if device == "cuda":
            bytes_ = measure_peak(setting, device, rung.key)
        else:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                bytes_ = pool.submit(measure_peak, setting, device, rung.key).result()
        if bytes_ is not None:
            found[rung.key] = round(bytes_ / 1e6, 2)
    return found


def measure(
    setting: Setting,
    device: str,
    about: run.Row,
    say: Callable[[str], None],
    *,
    compiled: bool = True,
    rounds: int = timing.ROUNDS,
) -> Iterator[run.Row]:
    """Measure every rung of a setting and say what was found.

    Args:
        setting: table and encoder.
        device: "cpu" or "cuda".
        about: the columns of `run.setting`; its op is set here.
        say: prints a line for people.
        compiled: with the rung that torch.compile makes.
        rounds: of turns.

    Yields:
        Rows of `run.COLUMNS`, when all are measured: the ceiling, then each rung's phases.
    """
    rungs, shape = rungs_of(device, compiled=compiled), setting.shape
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = about | {"op": OP, "date": now, "shape": shape.name}
    peak = peaks(setting, device, rungs)
    held, steps, marks = make_held(setting, device), dict[tuple[str, str], timing.Step](), {}
    for rung in (rung for rung in rungs if rung.timed):
        marks[rung.key] = Marks(device)
        step = start(rung, held, marks[rung.key])
        if rung.name == "compiled" and (why := _fails(step)):
            say(f"compiled is left out: torch.compile failed here: {why}")
            continue
        steps[rung.key] = step
    mm = cases.ceiling("fp32" if device == "cpu" else "bf16", device)
    ceiling = ("mm", mm.dtype)
    load = timing.Load()
    samples = timing.alternate(
        steps | {ceiling: mm.start(mm.inputs())},
        timing.Clock(device),
        rounds=rounds,
        budget_s=0,
    )
    average, others = timing.load_average(), load.others()
    if others is not None and others > 0.1:
        say(f"WARNING: other processes kept {others:.2f} processors busy: not to be reported")
    n = cases.CEILING_SIZE[device]
    yield _row(about, ("mm", mm.dtype, "ceiling"), Shape("", n, n, n), samples[ceiling], mm.flops)
    rate = mm.flops / timing.quantiles(samples[ceiling])[1] / 1e6
    say(
        f"{OP} {shape.name} at commit {about['commit']}: B {shape.B}, L {shape.L:,}, D {shape.D}, "
        f"{setting.layers} layers, {setting.tokens} tokens; mm {mm.dtype} {rate:.1f} GFLOP/s, load "
        f"average {run.shown(average)}, other processes {run.shown(others)} processors"
    )
    say(HEADER)
    times = {key: {"step": samples[key]} | marks[key].times() for key in steps}
    for rung in rungs:
        if not rung.timed:
            often, seldom = (times.get((name, rung.dtype)) for name in ("none", "sparse"))
            assert often is not None and seldom is not None
            times[rung.key] = {part: _mixed(often[part], seldom[part]) for part in often}
            if memory := peak.get(("sparse", rung.dtype)):
                peak[rung.key] = memory
        if rung.key not in times:
            continue
        for phase, ms in times[rung.key].items():
            flops = 6 * shape.B * shape.L * shape.D if phase == "table" else None
            own = peak.get(rung.key) if phase == "step" else None
            yield _row(about, (*rung.key, phase), shape, ms, flops, own)
        say(_line(rung, shape, times, peak.get(rung.key)))


def _fails(step: timing.Step) -> str:
    """Return why a first step fails; empty where it does not."""
    try:
        step()
    except Exception as error:
        return str(error).strip().splitlines()[0]
    return ""


def _mixed(often: list[float], seldom: list[float]) -> list[float]:
    return [((LOSS_EVERY - 1) * a + b) / LOSS_EVERY for a, b in zip(often, seldom, strict=False)]


def _row(
    about: run.Row,
    what: tuple[str, str, str],
    shape: Shape,
    ms: list[float],
    flops: int | None,
    peak: float | None = None,
) -> run.Row:
    p20, p50, p80 = timing.quantiles(ms)
    row = about | {"impl": what[0], "dtype": what[1], "phase": what[2], "peak_mb": peak}
    row |= {letter: getattr(shape, letter) for letter in "BLDSK"} | {"gbps": None}
    row |= {"ms_p20": round(p20, 4), "ms_p50": round(p50, 4), "ms_p80": round(p80, 4)}
    row |= {"tflops": None if flops is None else round(flops / p50 / 1e9, 4)}
    return {column: row[column] for column in run.COLUMNS}


def _line(
    rung: Rung,
    shape: Shape,
    times: dict[tuple[str, str], dict[str, list[float]]],
    peak: float | None,
) -> str:
    mid = {phase: timing.quantiles(ms)[1] for phase, ms in times[rung.key].items()}
    first = timing.quantiles(next(iter(times.values()))["step"])[1]
    spread = times[rung.key]["step"]
    cells = [
        rung.name,
        rung.dtype,
        f"{shape.B / mid['step'] * 1e3:,.1f}",
        f"{mid['step']:,.1f} ({min(spread):,.1f} to {max(spread):,.1f})",
        *(f"{mid[part]:,.1f}" for part in PARTS),
        "-" if peak is None else f"{peak:,.0f}" if peak >= 100 else f"{peak:.1f}",
        f"{first / mid['step']:.2f}×",
    ]
    return f"| {' | '.join(cells)} |"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--shape", help="one setting by name; without it, all of the device")
    add("--json", action="store_true", help="rows as JSON lines on stdout, all else on stderr")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--out", type=Path, default=run.ROOT / "benchmarks" / "results")
    return parser.parse_args(arguments)


def pick(device: str, name: str | None) -> list[Setting]:
    """Return the settings of a device, or the one that is named.

    Raises:
        InputError: it has none of that name.
    """
    known = {setting.shape.name: setting for setting in (*SETTINGS[device], TINY)}
    if name is None:
        return list(SETTINGS[device])
    if name not in known:
        raise InputError("--shape", f"one of {', '.join(known)}", name, "choose one of them")
    return [known[name]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = parse(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    try:
        wanted = pick(options.device, options.shape)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device", "a CUDA device", "none", "choose cpu")
        before = timing.load_average()
        about = run.setting(OP, options.device)
        path = options.out / f"{about['machine']}.csv"
        run.check_results(path)
        if before is not None and before > 0.5:
            say(f"WARNING: load average {before:.2f} at the start: something else is running")
        tests = run.ROOT / "tests" / "benchmarks" / "test_ladder.py"
        say(f"{tests.name}: {run.require_green(tests)}")
        for setting in wanted:
            rows = list(
                measure(setting, options.device, about, say, compiled=not options.no_compile)
            )
            run.append(path, rows)
            if options.json:
                for row in rows:
                    print(json.dumps(row), flush=True)
    except InputError as error:
        print(f"benchmarks/ladder.py: {error}", file=sys.stderr)
        return 2
    except run.RedTests as error:
        print(f"benchmarks/ladder.py: {error}", file=sys.stderr)
        return 1
    say(f"rows appended to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
