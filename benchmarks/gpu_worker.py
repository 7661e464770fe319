"""Measure one op at one shape, or the ceilings of a device, for `benchmarks/gpu_report.py`.

    python benchmarks/gpu_worker.py --ops
    python benchmarks/gpu_worker.py --ceilings
    python benchmarks/gpu_worker.py --op bce_step --shape B128-L2.8M-D768 [--rest]
        [--only KEY …] [--plain KEY …]

It writes one JSON object per line, as things happen: {"op": NAME, "why": REASON or null}, {"todo":
[KEY, …]}, {"begin": KEY}, {"row": …}, {"left_out": KEY, "why": …}, {"capture_failed": KEY, "why":
…}, {"again": KEY, "ms": …}. A kernel that breaks the card's context breaks this process alone. Exit
status: 0 done; 3 a step cannot be captured, call again with --plain; 4 a case broke, call again
without it.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import cases, floors, run, shapes, timing
from xmlkernels.errors import InputError

CAPTURE_FAILED, BROKE = 3, 4
COPY_BYTES = {"cpu": 1 << 26, "cuda": 1 << 31}
ROUNDS, BUDGET_S = 10, 0.5


def name_of(case: cases.Case) -> str:
    """Return implementation/phase/format."""
    return "/".join(case.key)


def tell(**message: object) -> None:
    """Write one message."""
    print(json.dumps(message), flush=True)


def captured(step: timing.Step) -> timing.Step:
    """Capture a step in one CUDA graph and return its replay.

    A step of hundreds of launches is not timed by its launches.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # What a capture may not do (lazy set-up, first allocations) happens before it.
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    # A graph has memory of its own: the step's earlier temporaries would be held besides.
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


class CaptureFailed(Exception):
    """The step did something that a capture does not allow."""


def measure(case: cases.Case, clock: timing.Clock, graph: bool) -> tuple[list[float], float | None]:
    """Measure the milliseconds of each round, and the peak memory.

    Everything that the case makes is freed before the next one: two of them rarely fit the card
    together.

    Returns:
        The times, and 10⁶ bytes beyond table and batch (None on a CPU).

    Raises:
        CaptureFailed: `graph` was asked for and the step cannot be captured.
    """
    held = case.inputs()
    cuda = clock.device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    step = case.start(held)
    for _ in range(2):
        step()
    peak = None
    if cuda:
        torch.cuda.synchronize()
        # The compiler of `compile` allocates too, to choose among kernels.
        if case.impl != "compile":
            peak = round((torch.cuda.max_memory_allocated() - before) / 1e6, 2)
    if graph:
        try:
            step = captured(step)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # torch gives capture errors no class of their own
            raise CaptureFailed(first_line(error)) from None
    found = timing.alternate({case.key: step}, clock, rounds=ROUNDS, budget_s=BUDGET_S)
    return found[case.key], peak


def first_line(error: BaseException) -> str:
    """Return the first line of a message, or the error's class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def make_row(
    about: run.Row,
    case: cases.Case,
    shape: shapes.Shape,
    times: list[float],
    peak: float | None,
    graph: bool,
) -> run.Row:
    """Return the row of one case; its phase says whether it was replayed from a graph."""
    row = about | {"shape": shape.name} | run.measured(case, shape, times, peak)
    row["phase"] = case.phase + floors.GRAPH * graph
    return {column: row[column] for column in run.COLUMNS}


def warm_up(device: str) -> None:
    """Multiply once in each format.

    A library's own one-off buffers are not a step's, and a card's clocks rise with work.
    """
    a = torch.randn(1024, 1024, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 3 if device == "cuda" else 2]:
        torch.mm(a.to(dtype), a.to(dtype))


def free(device: str) -> None:
    """Give back what no case holds any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def ceilings(device: str, about: run.Row) -> None:
    """Measure a large copy, and torch.mm on random data in each format."""
    count = COPY_BYTES[device] // 2

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        source = torch.randn(count, device=device).to(torch.bfloat16)
        return source, torch.empty_like(source)

    def start(held: tuple[torch.Tensor, torch.Tensor]) -> timing.Step:
        return lambda: held[1].copy_(held[0])

    copy = cases.Case("copy", floors.CEILING, "bf16", 0, 2 * COPY_BYTES[device], make, start)
    n, clock = cases.CEILING_SIZE[device], timing.Clock(device)
    formats = [d for d in ("bf16", "fp16", "fp32") if d == cases.ceiling_dtype(d, device)]
    for case in (copy, *(cases.ceiling(dtype, device) for dtype in formats)):
        shape = shapes.Shape("", n, n, n) if case.impl == "mm" else shapes.Shape("", 1, count, 1)
        times, _ = measure(case, clock, graph=False)
        tell(row=make_row(about, case, shape, times, None, False))
        free(device)


def in_turn(todo: Sequence[cases.Case], op: str, shape: str, rest: bool) -> list[cases.Case]:
    """Return the cases of one of two rounds; a run cut short has what matters of every shape.

    First round: the case with a figure to reach (every own case, where the shape has no figure),
    then the peers, the one that must be compiled last. Second: all others.
    """
    goal = {(g.phase, g.dtype) for g in floors.GOALS if (g.op, g.shape) == (op, shape)}

    def rank(case: cases.Case) -> int:
        if case.impl in floors.OWN:
            return 0 if not goal or (case.phase, case.dtype) in goal else 3
        return {"compile": 2, "reference": 3}.get(case.impl, 1)

    return sorted((case for case in todo if (rank(case) == 3) == rest), key=rank)


def measure_all(
    todo: Sequence[cases.Case], shape: shapes.Shape, about: run.Row, plain: Sequence[str]
) -> int:
    """Measure every case alone, one after another.

    The first is measured once more at the end, which shows how far a time swings.

    Returns:
        The exit status.
    """
    device = str(about["device"])
    clock = timing.Clock(device)
    measured: list[tuple[cases.Case, bool]] = []
    tell(todo=[name_of(case) for case in todo])
    for case in todo:
        syncs = (case.impl, case.phase) in cases.BENCHMARKS[str(about["op"])].syncing
        graph = device == "cuda" and not syncs and name_of(case) not in plain
        tell(begin=name_of(case))

        def act(case: cases.Case = case, graph: bool = graph) -> None:
            times, peak = measure(case, clock, graph)
            tell(row=make_row(about, case, shape, times, peak, graph))

        if status := attempt(case, act):
            return status
        measured.append((case, graph))
        free(device)
    if len(measured) > 1:
        case, graph = measured[0]
        return attempt(case, lambda: tell_again(case, measure(case, clock, graph)[0]))
    return 0


def tell_again(case: cases.Case, times: list[float]) -> None:
    """Write the median of a case that is measured a second time."""
    tell(again=name_of(case), ms=round(timing.quantiles(times)[1], 4))


def attempt(case: cases.Case, act: Callable[[], None]) -> int:
    """Measure one case, and say why where it cannot be.

    Returns:
        0 where the process can go on, else its exit status.
    """
    try:
        act()
    except CaptureFailed as error:
        tell(capture_failed=name_of(case), why=str(error))
        return CAPTURE_FAILED
    except torch.OutOfMemoryError:
        tell(left_out=name_of(case), why="it does not fit the card's memory")
    except InputError as error:
        tell(left_out=name_of(case), why=first_line(error))
    # After a failed launch nothing on the card can be trusted in this process.
    except Exception as error:
        tell(left_out=name_of(case), why=f"{type(error).__name__}: {first_line(error)}")
        return BROKE
    return 0


def tell_ops(device: str) -> None:
    """Write which ops can be timed.

    It is for a process started after the build: one that was there before has not loaded what was
    built.
    """
    for op in cases.BENCHMARKS:
        try:
            cases.require_op(op, device)
            tell(op=op, why=None)
        except InputError as error:
            tell(op=op, why=first_line(error))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary, name = (__doc__ or "").split("\n")[0], "impl/phase/dtype"
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_worker.py", description=summary)
    add = parser.add_argument
    add("--ops", action="store_true", help="tell which ops have a kernel for the device")
    add("--ceilings", action="store_true", help="measure a large copy and torch.mm")
    add("--op", choices=list(cases.BENCHMARKS))
    add("--shape")
    add("--device", default="cuda")
    add("--rest", action="store_true", help="the cases of the second round")
    add("--only", action="append", help=f"{name}; without it, every case")
    add("--plain", action="append", default=[], help=f"{name} never captured in a graph")
    add("--date", default="", help="of the whole run, for the rows")
    add("--commit", help="for the rows, where the tree has no git folder")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = parse(arguments)
    if options.ops:
        tell_ops(options.device)
        return 0
    about = run.setting(floors.CEILING if options.ceilings else options.op, options.device)
    about |= {"date": options.date}
    about |= {"commit": options.commit} if options.commit else {}
    warm_up(options.device)
    if options.ceilings:
        ceilings(options.device, about)
        return 0
    shape = next(s for s in cases.BENCHMARKS[options.op].for_card() if s.name == options.shape)
    found = cases.build_for_card(options.op, shape, options.device)
    todo = in_turn(found, options.op, shape.name, options.rest)
    if options.only is not None:
        todo = [case for case in todo if name_of(case) in options.only]
    return measure_all(todo, shape, about, options.plain)


if __name__ == "__main__":
    sys.exit(main())
