"""Check an op against plain PyTorch in the process that is to time it.

One step of a small table, captured in a CUDA graph where a step can be and replayed, beside the
same steps by the reference, which is plain torch on the same device. A row is only written for an
op and format that passed.
"""

import contextlib
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks import cases, floors
from benchmarks.case import Case
from benchmarks.shapes import Shape
from benchmarks.timing import Step
from xmlkernels import ops

ROWS = 8_011
"""Labels of the small table: odd, as those of the large ones, and many tiles."""
STEPS = 3
MOST = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.05, "fp8": 0.15}
"""Largest ‖ours − torch's‖ / ‖torch's‖ by the table's format; of a table, of what it changed by."""
ALIKE = 0.95
"""Least share of a sample's best labels that both name: scores next to each other may swap."""


Key = tuple[str, str, str]


class Wrong(Exception):
    """A kernel's results are not those of plain PyTorch."""


def small(shape: Shape) -> Shape:
    """Return the shape with a small table; lists and clusters shrink with it."""
    S, K = shape.S, shape.K
    if S and K:  # clusters of as many rows, fewer of them
        S, K = S // 10, max(1, K // 10)
    elif S:
        S = min(S, 512)
    return replace(shape, name=f"check-{shape.name}", L=min(shape.L, ROWS), S=S, K=K)


def to_check(op: str, shapes: Sequence[Shape], device: str) -> list[tuple[Shape, Key]]:
    """Return the cases that stand for an op.

    Those of its figures to reach at the shapes given (on a small card, at its own); without any,
    the bf16 ones of the first shape. A case that reads a size on the host is left out: the ops that
    it is made of are checked by the others.
    """
    goals = [goal for goal in floors.GOALS if goal.op == op]
    large = {shape.name for shape in cases.BENCHMARKS[op].gpu_shapes}
    aims = [
        (shape, ("xmlkernels", goal.phase, goal.dtype))
        for goal in goals
        for shape in shapes
        if shape.name == goal.shape or shape.name not in large
    ]
    if aims or not shapes:
        return list(dict.fromkeys(aims))
    found = cases.build_for_card(op, small(shapes[0]), device, compiled=False)
    syncing = cases.BENCHMARKS[op].syncing
    own = [case.key for case in found if case.impl == "xmlkernels" and case.dtype == "bf16"]
    return [(shapes[0], key) for key in own if key[:2] not in syncing]


@contextlib.contextmanager
def plain_torch(op: str) -> Iterator[None]:
    """Let the cases of an op call the references in place of `xmlkernels.ops`."""
    module = importlib.import_module(f"benchmarks.cases_{op}")
    room = {}
    for name in ops.__all__:
        function = getattr(ops, name)
        if inspect.isfunction(function):
            stem = inspect.unwrap(function).__module__.rsplit(".", 1)[-1]
            home = importlib.import_module(f"xmlkernels.reference.{stem}")
            room[name] = getattr(home, name, None)
    before = module.ops  # type: ignore[attr-defined]
    module.ops = SimpleNamespace(**room)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.ops = before  # type: ignore[attr-defined]


def tables(held: Any) -> dict[str, Tensor]:
    """Return what a step may update."""
    found = {name: getattr(held, name, None) for name in ("weight", "param", "row_scale")}
    return {name: value for name, value in found.items() if value is not None}


def after(case: Case, capture: Callable[[Step], Step] | None) -> tuple[list[Tensor], Any]:
    """Return the last step's results, and what was held, after `STEPS` steps."""
    held = case.inputs()
    step, kept = case.start(held), {}

    def keep() -> None:
        kept["out"] = step()

    if capture is not None:
        # Two steps before the capture, one replay after it; the results live in the graph's memory.
        kept["graph"] = capture(keep)
    else:
        for _ in range(STEPS):
            keep()
    return [t.detach().clone() for t in tree_leaves(kept["out"]) if isinstance(t, Tensor)], held


def values(held: Any, name: str) -> Tensor:
    """Return a table's values in fp64: e4m3 times its scale."""
    table: Tensor = getattr(held, name)
    scale = getattr(held, "row_scale", None)
    wide = table.float().double()
    return wide * scale[:, :1].double() if name == "weight" and scale is not None else wide


def check(op: str, shape: Shape, key: Key, device: str, capture: Any) -> float:
    """Compare one case with plain PyTorch on a small table.

    Args:
        op: the op.
        shape: of the case that is to be timed.
        key: of the case.
        device: as torch names it.
        capture: captures a step in a graph and replays it once; None to step eagerly.

    Returns:
        The largest relative error.

    Raises:
        Wrong: with what differs, and by how much.
    """

    def build() -> Case:
        found = cases.build_for_card(op, small(shape), device, compiled=False)
        return next(case for case in found if case.key == key)

    mine, held = after(build(), capture)
    with plain_torch(op):
        case = build()
        base = case.inputs()
        theirs, other = after(case, None)
    worst = 0.0
    pairs = [
        (f"result {i}", a.double(), b.double(), None)
        if a.is_floating_point()
        else (f"result {i}", a, b, None)
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True))
    ]
    pairs += [
        (name, values(held, name), values(other, name), values(base, name)) for name in tables(held)
    ]
    for what, a, b, start in pairs:
        if not a.is_floating_point():
            alike = (a[..., :, None] == b[..., None, :]).any(-1).double().mean().item()
            if alike < ALIKE:
                raise Wrong(f"{what}: {alike:.1%} of the entries are plain PyTorch's")
            continue
        inside = b.isfinite()
        scale = float((b if start is None else b - start)[inside].norm())
        error = float((a - b)[inside].norm()) / scale if scale else float((a - b)[inside].norm())
        if not (math.isfinite(error) and bool((a.isfinite() == inside).all())):
            raise Wrong(f"{what}: it is not finite where plain PyTorch's is")
        if error > MOST[key[2]]:
            raise Wrong(f"{what}: {error:.2e} from plain PyTorch, allowed {MOST[key[2]]:.0e}")
        worst = max(worst, error)
    return worst
