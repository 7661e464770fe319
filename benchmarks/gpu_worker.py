"""Measures one op at one shape, or the ceilings of a device, in a process that
`benchmarks/gpu_report.py` starts.

    python benchmarks/gpu_worker.py --ops
    python benchmarks/gpu_worker.py --ceilings
    python benchmarks/gpu_worker.py --op bce_step --shape B128-L2.8M-D768 [--rest] [--only KEY …]
    [--plain KEY …]

It writes one JSON object a line, as things happen: {"op": NAME, "why": REASON or null}, {"todo":
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
    return "/".join(case.key)


def tell(**message: object) -> None:
    print(json.dumps(message), flush=True)


def captured(step: timing.Step) -> timing.Step:
    """The replay of a step that was captured in one CUDA graph: a step of hundreds of launches is
    not timed by its launches.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # What a capture may not do (lazy set-up, first allocations) happens before it.
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    # a graph has memory of its own; the step's earlier temporaries would stand beside it
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
    """Milliseconds of each round, and the peak memory in 10⁶ bytes beyond table and batch (None on
    a CPU).

    Everything that the case makes is freed before the next one: two of them rarely fit the card
        together.

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
        peak = (
            None
            if case.impl == "compile"
            else round((torch.cuda.max_memory_allocated() - before) / 1e6, 2)
        )
    if graph:
        try:
            step = captured(step)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # torch gives capture errors no class of their own
            raise CaptureFailed(first_line(error)) from None
    return timing.alternate({case.key: step}, clock, rounds=ROUNDS, budget_s=BUDGET_S)[
        case.key
    ], peak


def first_line(error: BaseException) -> str:
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
    """A library's own one-off buffers are not a step's, and a card's clocks rise with work."""
    a = torch.randn(1024, 1024, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 3 if device == "cuda" else 2]:
        torch.mm(a.to(dtype), a.to(dtype))


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def ceilings(device: str, about: run.Row) -> None:
    """Rows of a large copy and of torch.mm on random data in each format."""
    count = COPY_BYTES[device] // 2

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(count, device=device).to(torch.bfloat16), torch.empty(
            count, dtype=torch.bfloat16, device=device
        )

    def start(held: tuple[torch.Tensor, torch.Tensor]) -> timing.Step:
        return lambda: held[1].copy_(held[0])

    copy = cases.Case("copy", floors.CEILING, "bf16", 0, 2 * COPY_BYTES[device], make, start)
    n, clock = cases.CEILING_SIZE[device], timing.Clock(device)
    for case in (
        copy,
        *(
            cases.ceiling(d, device)
            for d in ("bf16", "fp16", "fp32")
            if d == cases.ceiling_dtype(d, device)
        ),
    ):
        shape = shapes.Shape("", n, n, n) if case.impl == "mm" else shapes.Shape("", 1, count, 1)
        times, _ = measure(case, clock, graph=False)
        tell(row=make_row(about, case, shape, times, None, False))
        free(device)


def in_turn(todo: Sequence[cases.Case], op: str, shape: str, rest: bool) -> list[cases.Case]:
    """The cases of one of two rounds, so that a run cut short has what matters of every shape.

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
    """Every case alone, one after another; the first is measured once more at the end, which shows
    how far a time swings.
    """
    device = str(about["device"])
    clock = timing.Clock(device)
    measured: list[tuple[cases.Case, bool]] = []
    tell(todo=[name_of(case) for case in todo])
    for case in todo:
        syncs = (case.impl, case.phase) in cases.BENCHMARKS[str(about["op"])].syncing
        graph = device == "cuda" and not syncs and name_of(case) not in plain
        tell(begin=name_of(case))
        status = attempt(
            case,
            lambda c=case, g=graph: tell(row=make_row(about, c, shape, *measure(c, clock, g), g)),
        )
        if status:
            return status
        measured.append((case, graph))
        free(device)
    if len(measured) > 1:
        case, graph = measured[0]
        return attempt(case, lambda: tell_again(case, measure(case, clock, graph)[0]))
    return 0


def tell_again(case: cases.Case, times: list[float]) -> None:
    tell(again=name_of(case), ms=round(timing.quantiles(times)[1], 4))


def attempt(case: cases.Case, act: Callable[[], None]) -> int:
    """0 where the process can go on, whether or not the case could be measured."""
    try:
        act()
    except CaptureFailed as error:
        tell(capture_failed=name_of(case), why=str(error))
        return CAPTURE_FAILED
    except torch.OutOfMemoryError:
        tell(left_out=name_of(case), why="it does not fit the card's memory")
    except InputError as error:
        tell(left_out=name_of(case), why=first_line(error))
    except (
        Exception
    ) as error:  # after a failed launch nothing on the card can be trusted in this process
        tell(left_out=name_of(case), why=f"{type(error).__name__}: {first_line(error)}")
        return BROKE
    return 0


def tell_ops(device: str) -> None:
    """Asked of a process started after the build: one that was there before has not loaded what was
    built.
    """
    for op in cases.BENCHMARKS:
        try:
            cases.require_op(op, device)
            tell(op=op, why=None)
        except InputError as error:
            tell(op=op, why=first_line(error))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu_worker.py", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--ops", action="store_true", help="tell which ops have cases and a kernel for the device"
    )
    parser.add_argument("--ceilings", action="store_true", help="measure a large copy and torch.mm")
    parser.add_argument("--op", choices=list(cases.BENCHMARKS))
    parser.add_argument("--shape")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rest", action="store_true", help="the cases of the second round")
    parser.add_argument("--only", action="append", help="impl/phase/dtype; without it, every case")
    parser.add_argument(
        "--plain", action="append", default=[], help="impl/phase/dtype never captured in a graph"
    )
    parser.add_argument("--date", default="", help="of the whole run, for the rows")
    parser.add_argument("--commit", help="for the rows, where the tree has no git folder")
    options = parser.parse_args(arguments)
    if options.ops:
        tell_ops(options.device)
        return 0
    about = run.setting(floors.CEILING if options.ceilings else options.op, options.device) | {
        "date": options.date
    }
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
