"""Check and measure one op, for `benchmarks/gpu_report.py`; one process does all of its shapes.

    python benchmarks/gpu_worker.py --op bce_step [--device cuda] [--checked] [--trial]

It first checks the op (see `benchmarks/gpu_check.py`) and then waits for orders, one JSON object
per line of its input: {"ceilings": true}, or {"shape": NAME, "round": "goal", "peers" or "rest",
"skip": [KEY, …], "plain": [KEY, …]}. It writes one JSON object per line as things happen:
{"untimed": REASON}, {"checked": KEY, "error": NUMBER}, {"wrong": KEY, "why": …}, {"ready": true},
{"begin": KEY}, {"row": …}, {"left_out": KEY, "why": …}, {"capture_failed": KEY, "why": …},
{"again": KEY, "ms": …}, {"done": true} at the end of an order. A kernel that breaks the card's
context breaks this process alone. Exit status: 0 done; 3 a step cannot be captured, start another
and say "plain"; 4 a case broke, start another and say "skip"; 5 the op is wrong.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import cases, floors, gpu_check, run, shapes, timing
from xmlkernels.errors import InputError

CAPTURE_FAILED, BROKE, WRONG = 3, 4, 5
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


def in_turn(todo: Sequence[cases.Case], op: str, shape: str, round_: str) -> list[cases.Case]:
    """Return the cases of one of three rounds; a run cut short has what matters of every shape.

    "goal": the case with a figure to reach (every own case, where the shape has no figure).
    "peers": those that a figure names, the others, the one that must be compiled last. "rest": all
    that is left.
    """
    goals = [g for g in floors.GOALS if (g.op, g.shape) == (op, shape)]
    aims, named = {(g.phase, g.dtype) for g in goals}, {impl for g in goals for impl in g.peers}

    def rank(case: cases.Case) -> tuple[str, int]:
        if case.impl in floors.OWN:
            return "goal" if not goals or (case.phase, case.dtype) in aims else "rest", 0
        if case.impl == "reference":
            return "rest", 1
        alike = (case.phase, case.dtype) in aims
        return "peers", 3 if case.impl == "compile" else 2 - (case.impl in named) - alike

    return sorted((case for case in todo if rank(case)[0] == round_), key=rank)


def measure_all(
    todo: Sequence[cases.Case],
    shape: shapes.Shape,
    about: run.Row,
    plain: Sequence[str],
    again: bool = True,
) -> int:
    """Measure every case alone, one after another.

    The first is measured once more at the end where `again`, which shows how far a time swings.

    Returns:
        The exit status, 0 where the process can go on.
    """
    device = str(about["device"])
    clock = timing.Clock(device)
    measured: list[tuple[cases.Case, bool]] = []
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
    if measured and again:
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


def check(op: str, todo: Sequence[shapes.Shape], device: str) -> int:
    """Check an op with what stands for it; return 0, or the exit status of what went wrong."""
    for shape, key in gpu_check.to_check(op, todo, device):
        name = "/".join(key)
        try:
            capture = captured if device == "cuda" else None
            tell(checked=name, error=gpu_check.check(op, shape, key, device, capture))
        except gpu_check.Wrong as error:
            tell(wrong=f"{name} {shape.name}", why=str(error))
            return WRONG
        # A kernel that does not compile, or a step that cannot be captured.
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            tell(wrong=f"{name} {shape.name}", why=why)
            return WRONG
        free(device)
    return 0


def shapes_of(op: str, trial: bool) -> dict[str, shapes.Shape]:
    """Return the shapes of a card by name; in a trial, tiny ones in their place."""
    return {s.name: shapes.tiny(s) if trial else s for s in cases.BENCHMARKS[op].for_card()}


def obey(order: dict[str, object], options: argparse.Namespace, about: run.Row) -> int:
    """Do what one line of the input asks for; return the exit status, 0 to go on."""
    op, device = str(options.op), str(options.device)
    if order.get("ceilings"):
        ceilings(device, about | {"op": floors.CEILING})
        return 0
    name, round_ = str(order["shape"]), str(order["round"])
    shape = shapes_of(op, options.trial)[name]
    found = cases.build_for_card(op, shape, device)
    skip, plain = (list(map(str, order.get(key, []))) for key in ("skip", "plain"))  # type: ignore[call-overload]
    todo = [case for case in in_turn(found, op, name, round_) if name_of(case) not in skip]
    if options.trial:  # no figure of a trial is one of the shape's
        shape = replace(shape, name=f"trial-{name}")
    return measure_all(todo, shape, about, plain, again=round_ == "goal")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_worker.py", description=summary)
    add = parser.add_argument
    add("--op", choices=list(cases.BENCHMARKS), required=True)
    add("--device", default="cuda")
    add("--shape", action="append", help="a shape that the card holds; without it, every one")
    add("--checked", action="store_true", help="an earlier process has checked the op")
    add("--trial", action="store_true", help="tiny shapes, to try the report without a card")
    add("--date", default="", help="of the whole run, for the rows")
    add("--commit", help="for the rows, where the tree has no git folder")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = parse(arguments)
    try:
        cases.require_op(options.op, options.device)
    except InputError as error:
        tell(untimed=first_line(error))
        return 0
    about = run.setting(options.op, options.device) | {"date": options.date}
    about |= {"commit": options.commit} if options.commit else {}
    warm_up(options.device)
    known = shapes_of(options.op, options.trial)
    wanted = [shape for name, shape in known.items() if name in (options.shape or known)]
    if not options.checked and (status := check(options.op, wanted, options.device)):
        return status
    tell(ready=True)
    for line in sys.stdin:
        if status := obey(json.loads(line), options, about):
            return status
        tell(done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
