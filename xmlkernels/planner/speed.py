"""Seconds of a step: the floor of each of its parts, times how far above it the part runs.

The floor is the longer of two times: bytes that must move over the rate of a copy, and operations
over the rate of a matrix product. How many times the floor an op takes was measured or modelled,
once, at one shape (`FIGURES`); a sentence says which. What no figure is known of, is said too.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.table import Table
from xmlkernels.planner.cards import Card

_MODEL = "the model of machine code in benchmarks/modelled.csv"
_EPYC = "benchmarks/results/amd-epyc-2c-avx512bf16.csv"


class Figure(NamedTuple):
    """How far above its floor an op was seen, or is expected by a model.

    Attributes:
        op, dtype: of the row.
        device: "cpu" or a card.
        bound: "memory" or "products", whichever its floor is.
        ms, floor: milliseconds of the row, and of its floor.
        how: "measured" or "modelled", or "assumed".
        source: where the row is.
    """

    op: str
    dtype: str
    device: str
    bound: str
    ms: float
    floor: float
    how: str
    source: str

    @property
    def times(self) -> float:
        """Multiple of the floor."""
        return self.ms / self.floor


def _modelled(op: str, dtype: str, device: str, bound: str, ms: float, floor: float) -> Figure:
    return Figure(op, dtype, device, bound, ms, floor, "modelled", _MODEL)


def _epyc(op: str, dtype: str, ms: float, floor: float, commit: str) -> Figure:
    return Figure(op, dtype, "cpu", "products", ms, floor, "measured", f"{_EPYC}, {commit}")


# fmt: off
FIGURES = (
    _modelled("bce_step", "bf16", "h200", "memory", 4.953, 2.100),
    _modelled("bce_step", "bf16", "h200", "products", 7.380, 3.898),
    _modelled("bce_step", "fp8", "h200", "products", 15.253, 6.439),
    _modelled("cluster_step", "bf16", "h200", "memory", 0.620, 0.494),
    _modelled("sparse_update", "bf16", "h200", "memory", 0.359, 0.286),
    _modelled("matmul_topk", "bf16", "h200", "products", 7.086, 2.800),
    _modelled("bce_step", "bf16", "h100", "memory", 5.250, 2.880),
    _modelled("bce_step", "bf16", "h100", "products", 7.380, 3.898),
    _modelled("bce_step", "fp8", "h100", "products", 15.253, 6.439),
    _modelled("cluster_step", "bf16", "h100", "memory", 0.865, 0.709),
    _modelled("sparse_update", "bf16", "h100", "memory", 0.512, 0.410),
    _modelled("matmul_topk", "bf16", "h100", "products", 7.086, 2.800),
    _modelled("bce_step", "bf16", "a100", "products", 22.388, 6.635),
    _modelled("bce_step", "bf16", "a100", "products", 30.477, 12.318),
    _modelled("cluster_step", "bf16", "a100", "memory", 1.443, 1.181),
    _modelled("sparse_update", "bf16", "a100", "memory", 0.853, 0.683),
    _modelled("matmul_topk", "bf16", "a100", "products", 19.981, 8.847),
    # Floors by the torch.mm of the same run: 6 B L D operations, 2 B L D of a search.
    _epyc("bce_step", "fp32", 133.3972, 106.59, "92d119e2209e"),
    _epyc("bce_step", "bf16", 69.9444, 46.95, "92d119e2209e"),
    _epyc("bce_step", "fp16", 138.6963, 106.59, "92d119e2209e"),
    _epyc("matmul_topk", "fp32", 771.6062, 991.99, "d88be764f967"),
    _epyc("matmul_topk", "bf16", 404.3369, 375.0, "d88be764f967"),
    # 3 layers of width 384, 64 texts of 16 tokens; torch.mm in bf16 of another run: 0.41 TFLOP/s.
    _epyc("encoder", "bf16", 114.9705, 80.1, "60196eb0c9d4"),
    # Half of the rate of products, as published systems reach it.
    Figure("encoder", "bf16", "card", "products", 2.0, 1.0, "assumed", "half of the card's rate"),
)
# fmt: on


@dataclass(frozen=True)
class Work:
    """One part of a step.

    Attributes:
        what: to call it.
        op: whose figure it takes.
        dtype: number format of its products.
        bytes: that must move.
        operations: of products, an addition and a multiplication each.
    """

    what: str
    op: str
    dtype: str
    bytes: float
    operations: float


@dataclass(frozen=True)
class Timed:
    """Seconds of a part.

    Attributes:
        what: the part.
        floor, seconds: by the rates alone, and times the figure.
        how: "measured", "modelled" or "assumed", of which row; or that no figure is known.
    """

    what: str
    floor: float
    seconds: float
    how: str


def timed(work: Work, card: Card) -> Timed:
    """Tell how long a part takes on a device."""
    memory, products = work.bytes / card.copy, work.operations / card.rate(work.dtype)
    floor, bound = max((memory, "memory"), (products, "products"))
    figure = _figure(work, card, bound)
    if figure is None:
        return Timed(work.what, floor, floor, "the floor itself: no figure is known")
    where = "" if figure.device in (card.name, "card") else f", of {figure.device}"
    format_ = "" if figure.dtype == work.dtype else f", of {figure.dtype}"
    how = f"{figure.how}: {figure.times:.2f} x floor{where}{format_} ({figure.source})"
    return Timed(work.what, floor, floor * figure.times, how)


def _figure(work: Work, card: Card, bound: str) -> Figure | None:
    """Find the row most like a part: of its device, its bound, its format, in this order."""
    # A card without tensor memory accesses of its own runs the kernels of an A100.
    nearest = card.name if card.name in ("cpu", "h200", "h100") else "a100"
    known = [f for f in FIGURES if f.op == work.op and (f.device == "cpu") != card.cuda]

    def unlike(figure: Figure) -> tuple[bool, bool, bool]:
        return figure.device != nearest, figure.dtype != work.dtype, figure.bound != bound

    return min(known, key=unlike, default=None)


def full_table_work(table: Table, documents: int, *, what: str = "label table") -> Work:
    """Count the step of a table of all labels: 6 B n D operations; rows and states read, written.

    Args:
        table: its rows, or a shard's.
        documents: B.
        what: to call it.
    """
    rows, width = table.weight.shape
    moved = 2 * sum(t.numel() * t.element_size() for t in table.row_buffers().values())
    return Work(what, "bce_step", _name(table), moved, 6 * documents * rows * width)


def level_work(table: Table, documents: int, candidates: int, *, what: str) -> Work:
    """Count the step of a cascade's level.

    Of n rows, n (1 - exp(-B S / n)) are expected to be anybody's candidate; they are read and
    written with their states, once.

    Args:
        table: the level's, or a part of it.
        documents: B.
        candidates: S, of a document, among all rows; a shard has its share of them.
        what: to call it.
    """
    rows, width = table.weight.shape
    row = sum(t.numel() * t.element_size() for t in table.row_buffers().values()) / max(1, rows)
    own = candidates * rows / max(1, table.shard.rows)
    touched = rows * -math.expm1(-documents * own / max(1, rows))
    moved = 2 * touched * row + 4 * documents * (own + 2 * width)
    work = 6 * documents * own * width
    return Work(what, "cluster_step", _name(table), moved, work)


def search_work(table: Table, documents: int, *, with_loss: bool) -> Work:
    """Count an evaluation's pass over a table: its best rows and, where it is asked for, the loss.

    Args:
        table: its rows, or a shard's.
        documents: of a batch of evaluation.
        with_loss: each row is scored twice.
    """
    rows, width = table.weight.shape
    passes = 2 if with_loss else 1
    moved = passes * table.weight.numel() * table.weight.element_size()
    work = passes * 2 * documents * rows * width
    return Work("evaluation: label table", "matmul_topk", _name(table), moved, work)


def encoder_work(encoder: Encoder, documents: int, tokens: float, *, training: bool = True) -> Work:
    """Count an encoder's pass over documents: 2 operations per weight and token, and attention.

    Args:
        encoder: a transformer; its embeddings multiply nothing.
        documents: of a process.
        tokens: of a document, on average.
        training: forward and backward, three times the operations of a forward.
    """
    embedded = {id(p) for n, p in encoder.named_parameters() if "embedding" in n}
    weights = sum(p.numel() for p in encoder.parameters() if id(p) not in embedded)
    attention = 4 * encoder.layers * encoder.hidden * tokens
    passes = 3 if training else 1
    work = passes * documents * tokens * (2 * weights + attention)
    half = encoder.autocast is not None
    moved = passes * sum(p.numel() * p.element_size() for p in encoder.parameters())
    return Work("encoder", "encoder", "bf16" if half else "fp32", moved, work)


def words_work(table: Table, documents: int, words: float) -> Work:
    """Count a bag of words' step: its rows are read, and read and written with their states."""
    rows, width = table.weight.shape
    row = sum(t.numel() * t.element_size() for t in table.row_buffers().values()) / max(1, rows)
    count = documents * words
    touched = rows * -math.expm1(-count / max(1, rows))
    moved = 2 * touched * row + 2 * count * width * table.weight.element_size()
    return Work("bag of words", "sparse_update", _name(table), moved, 4 * count * width)


def seconds(parts: Iterable[Timed]) -> float:
    """Sum the seconds of parts that follow each other."""
    return sum(part.seconds for part in parts)


def _name(table: Table) -> str:
    name = str(table.weight.dtype).removeprefix("torch.")
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(name, "fp8")
