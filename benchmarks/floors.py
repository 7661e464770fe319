"""Floors, figures to reach, and the table that shows both.

Floor of a row, from the ceilings of its own run: the longer of two times, its useful bytes over the
copy rate and its useful operations over the torch.mm rate of its format (e4m3: that of bf16, the
format of its products). The closed forms are in `benchmarks/cases_NAME.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

from benchmarks import modelled

Row = Mapping[str, object]
OWN = ("xmlkernels", "fused")
"""Implementations of ours; the others are peers."""
CEILING = "ceiling"
GRAPH = "+graph"
"""Ends the phase of a row whose calls were replayed from one captured CUDA graph."""
PRODUCTS = {"fp8": "bf16"}


@dataclass(frozen=True)
class Goal:
    """A figure to reach at one shape.

    Attributes:
        op, shape, phase, dtype: the row of this package.
        floor: the largest multiple of its floor.
        peers: by implementation, how many times faster than its fastest row this one is to be.
        peak_mb: the largest memory beyond the table and the batch.
    """

    op: str
    shape: str
    phase: str
    dtype: str
    floor: float
    peers: Mapping[str, float] = field(default_factory=dict)
    peak_mb: float | None = None


GOALS = (
    Goal("bce_step", "B128-L2.8M-D768", "sgd", "bf16", 1.7, {"elmo": 2, "renee": 5}, 256),
    Goal("bce_step", "B512-L1.3M-D768", "sgd", "bf16", 1.8, {}, 256),
    Goal("bce_step", "B128-L8.6M-D768", "sgd", "fp8", 2.0, {}, 256),
    Goal("cluster_step", "B64-K400-L670k-D768", "adam", "bf16", 1.8, {"eager": 5}),
    Goal("sparse_update", "N100k-L670k-D768", "adam", "bf16", 1.25, {"torch": 4}),
    Goal("matmul_topk", "B512-L2.8M-D768", "topk", "bf16", 1.6, {"eager": 3}),
)


def number(row: Row, column: str) -> float:
    """Return a column as a number; rows read from a file hold text."""
    return float(str(row[column]))


def plain(phase: object) -> str:
    """Return the phase without the mark of a graph."""
    return str(phase).removesuffix(GRAPH)


@dataclass
class Ceilings:
    """What the device reached in one run.

    Attributes:
        gbps: 10⁹ bytes per second read and written by a large copy.
        tflops: 10¹² operations per second of torch.mm, by format.
    """

    gbps: float | None = None
    tflops: dict[str, float] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Take the row of a copy or of a torch.mm."""
        if row["impl"] == "copy":
            self.gbps = number(row, "gbps")
        else:
            self.tflops[str(row["dtype"])] = number(row, "tflops")

    def times_floor(self, row: Row) -> float | None:
        """Return the row's median over its floor; None where a ceiling was not measured."""
        shares = self.shares(row)
        return 1 / max(shares) if shares and max(shares) else None

    def shares(self, row: Row) -> tuple[float, float] | None:
        """Return what the row reaches of the copy rate and of the torch.mm rate."""
        name = str(row["dtype"])
        rate = self.tflops.get(PRODUCTS.get(name, name))
        if self.gbps is None or rate is None:
            return None
        return number(row, "gbps") / self.gbps, number(row, "tflops") / rate

    def modelled(self, row: Row, memory: int | None) -> float | None:
        """Return the floor of a step that moves `memory` bytes, over the row's own floor.

        None where either is not known.
        """
        shares = self.shares(row)
        if shares is None or memory is None or not max(shares):
            return None
        useful = number(row, "gbps") * number(row, "ms_p50") * 1e6
        return max(shares[0] * memory / useful, shares[1]) / max(shares)


def goal_row(rows: Sequence[Row], goal: Goal) -> Row | None:
    """Return this package's row that a figure to reach is about."""
    aim = (goal.op, goal.shape, "xmlkernels", goal.phase, goal.dtype)

    def matches(row: Row) -> bool:
        return (row["op"], row["shape"], row["impl"], plain(row["phase"]), row["dtype"]) == aim

    return next(filter(matches, rows), None)


def own_row(rows: Sequence[Row], peer: Row) -> Row | None:
    """Return the row of this package that a peer's is held against.

    It is that of a figure to reach which names the peer, else the fastest of the same phase and
    format, of the same phase, of the shape.
    """
    for goal in GOALS:
        named = (goal.op, goal.shape) == (peer["op"], peer["shape"]) and peer["impl"] in goal.peers
        if named and (found := goal_row(rows, goal)) is not None:
            return found

    def unlike(row: Row) -> tuple[bool, bool, float]:
        other = plain(row["phase"]) != plain(peer["phase"])
        return other, other or row["dtype"] != peer["dtype"], number(row, "ms_p50")

    place = (peer["op"], peer["shape"], "xmlkernels")
    own = [row for row in rows if (row["op"], row["shape"], row["impl"]) == place]
    return min(own, key=unlike, default=None)


def modelled_bytes(row: Row, model: ModuleType | None) -> dict[str, int] | None:
    """Return the bytes that the schedule of this package's kernel moves: "memory" and "cache".

    Between memory and L2, and between L2 and the processors. None where `benchmarks/model.py` does
    not count them.
    """
    if model is None or row["impl"] != "xmlkernels":
        return None
    element = {"fp32": 4, "fp8": 1}.get(str(row["dtype"]), 2)
    phase, op = plain(row["phase"]), row["op"]
    B, L, D = (int(number(row, letter)) for letter in "BLD")
    S, K = (int(str(row[letter])) if row[letter] not in (None, "") else 0 for letter in "SK")
    if op == "bce_step" and phase != "skip":  # what is skipped depends on the positives
        options = {"element": element, "state_element": element, "loss": phase == "loss"}
        options["states"] = int(phase == "momentum")
        found = model.bce_step_bytes(B, L, D, **options)
        return {"memory": found["memory"], "cache": found["cache"]}
    if op == "matmul_topk":
        memory = model.matmul_topk_memory(B, L, D, K or 1, element=element)
        of = model.matmul_topk_accesses(B, L, D, [L])
        return {"memory": memory, "cache": _bytes(of, {"weight": element, "x": element})}
    # Most of a step is autograd and the optimizer's own op.
    if op == "shortlist_matmul" and phase != "step":
        shared = phase == "shared"
        memory = model.shortlist_memory(B, S, D, shared=shared, element=element)
        block_s, block_b = (64, 64) if shared else (64, 1)
        options = {"shared": shared, "block_s": block_s, "block_b": block_b}
        of = model.shortlist_accesses(B, S, D, S if shared else B * S, **options)["forward"]
        return {"memory": memory, "cache": _bytes(of, {"weight": element, "x": 4})}
    if op == "cluster_step":
        # Rows of a cluster, as benchmarks/cases_cluster_step.py makes them.
        K = K or 1
        rows, states = (S or L) // K, 2 if phase == "adam" else 0
        count = L // rows
        options = {"element": element, "state_element": element, "states": states}
        memory = model.cluster_step_memory(B, D, K, rows, count, **options)
        # The clusters that some sample selects, with the samples of all spread evenly over them.
        touched = max(1, round(count * (1 - (1 - K / count) ** B)))
        pairs = [B * K * (i + 1) // touched - B * K * i // touched for i in range(touched)]
        if model.PAIRS * count >= B * K:
            sides = {"element": element, "states": states}
            of = model.cluster_pairs_accesses(B, D, K, rows, [rows] * touched, pairs, **sides)
        else:
            block_r = min(64, max(16, 1 << (rows - 1).bit_length()))
            sides = {"block_r": block_r, "block_p": 16, "states": states}
            of = model.cluster_step_accesses(B, D, [rows] * touched, pairs, **sides)
        return {
            "memory": memory,
            "cache": _bytes(of, {"weight": element, "state": element, "x": 4}),
        }
    return None


def _bytes(accesses: Mapping[str, tuple[int, int]], size: Mapping[str, int]) -> int:
    return sum((loads + stores) * size[name] for name, (loads, stores) in accesses.items())


def table(rows: Sequence[Row], ceilings: Ceilings, model: ModuleType | None) -> list[str]:
    """Return one line per row, widths fitted.

    Args:
        rows: of one run, ceilings left out.
        ceilings: of the same run.
        model: the module that counts what this package's kernels must move, where the tree has one.
    """
    names, times = ("op", "shape", "impl", "phase", "dtype"), ("ms_p50", "ms_p20", "ms_p80")
    lines = [[*names, "ms p50", "p20", "p80", "peak MB", "x floor", "ours faster"]]
    lines[0] += ["model x floor", "model GB memory", "GB L2"]
    for row in rows:
        own, over = own_row(rows, row), ceilings.times_floor(row)
        ratio = None
        if own is not None and row["impl"] not in OWN:
            ratio = number(row, "ms_p50") / number(own, "ms_p50")
        moved = modelled_bytes(row, model)
        modelled = ceilings.modelled(row, moved and moved["memory"])
        lines.append(
            [
                *(str(row[name]) for name in names),
                *(f"{number(row, name):.3f}" for name in times),
                "-" if row["peak_mb"] in (None, "") else f"{number(row, 'peak_mb'):.1f}",
                _shown(over),
                _shown(ratio, "x"),
                _shown(modelled),
                *(_shown(moved and moved[level] / 1e9) for level in ("memory", "cache")),
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _shown(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.2f}{unit}"


def verdicts(rows: Sequence[Row], ceilings: Ceilings) -> list[str]:
    """Return one line per figure to reach: reached, missed, or not measured.

    Beside a multiple of the floor that was not measured stands the committed one of the model.
    """
    lines, figures = [], modelled.read()

    def judge(
        what: str, found: float | None, limit: float, at_least: bool = False, model: str = ""
    ) -> None:
        if found is None:
            lines.append(f"{what}: not measured{model}")
        else:
            reached = found >= limit if at_least else found <= limit
            lines.append(f"{what}: {found:.2f}, {'reached' if reached else 'MISSED'}")

    for goal in GOALS:
        where = f"{goal.op} {goal.shape} {goal.phase} {goal.dtype}"
        own = goal_row(rows, goal)
        over = None if own is None else ceilings.times_floor(own)
        told = modelled.find(figures, goal.op, goal.shape, goal.phase, goal.dtype)
        model = f"; model, {told.card}: {told.over:.1f} x floor" if told is not None else ""
        judge(f"{where}, at most {goal.floor} x floor", over, goal.floor, model=model)
        for impl, least in goal.peers.items():
            place = (goal.op, goal.shape, impl)
            here = [r for r in rows if (r["op"], r["shape"], r["impl"]) == place]
            # The peer's own form of the step where it has one: its other phases are other work.
            same = [r for r in here if plain(r["phase"]) == goal.phase] or here
            best = min((number(r, "ms_p50") for r in same), default=None)
            ratio = None if best is None or own is None else best / number(own, "ms_p50")
            judge(f"{where}, at least {least} x faster than {impl}", ratio, least, at_least=True)
        if goal.peak_mb is not None:
            peak = None if own is None or own["peak_mb"] in (None, "") else number(own, "peak_mb")
            judge(f"{where}, at most {goal.peak_mb} MB beyond the table", peak, goal.peak_mb)
    return lines
