"""Tables of rows that are trained in place: their optimizer, their buffers, what all of them do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from xmlkernels.errors import InputError
from xmlkernels.nn.shard import Shard, own_positives, whole
from xmlkernels.ops import Hyper, bce_loss, matmul_topk, rescale_rows_, shortlist_matmul
from xmlkernels.precision import DTYPES, TABLE_DTYPES
from xmlkernels.rows import Rows

KINDS = ("sgd", "adagrad", "adam", "adamw_dense")
STATES = ("momentum", "second", "kahan", "bias_momentum", "bias_second")
FIRST_SCALE = 2.0**-8  # of each row of an fp8 table: values up to 1.75
_BLOCK = 1 << 22  # values at a time: a table below fp32 is never held in fp32 as a whole

Draw = Callable[[int, int, torch.Generator], Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class RowOptimizer:
    """How the rows of a table are updated, and which state that needs.

    Attributes:
        kind: "sgd", "adagrad" (bags of words alone), "adam", or "adamw_dense" (cascades alone:
            every row in every step).
        momentum: of SGD; 0 keeps no state.
        betas, epsilon: of Adam; Adagrad takes epsilon alone.
        state_dtype: number format of the states [n, D]; below fp32 they round stochastically.
        row_wise: keep one fp32 second moment per row, from the mean over D, in place of [n, D].
            Adam and Adagrad alone; "adamw_dense" always keeps [n, D].
        decay: weight decay.
        decoupled: let the decay shrink the weights; otherwise it enters the gradient (L2).
        kahan: keep what rounding leaves over (bf16 and fp16 tables; fp32 needs none).

    Raises:
        InputError: a value is out of range.
    """

    kind: str = "sgd"
    _: KW_ONLY
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    state_dtype: str = "fp32"
    row_wise: bool = False
    decay: float = 0.0
    decoupled: bool = False
    kahan: bool = False

    def __post_init__(self) -> None:
        check_choice("table optimizer", self.kind, KINDS)
        check_choice("table optimizer: state_dtype", self.state_dtype, DTYPES)
        for name, value in (
            ("momentum", self.momentum),
            ("betas[0]", self.betas[0]),
            ("betas[1]", self.betas[1]),
        ):
            if not 0 <= value < 1:
                where = f"table optimizer: {name}"
                raise InputError(where, "a number in [0, 1)", str(value), "correct it")
        for name, value in (("epsilon", self.epsilon), ("decay", self.decay)):
            if not 0 <= value < math.inf:
                where = f"table optimizer: {name}"
                raise InputError(where, "a number of 0 or more", str(value), "correct it")

    @property
    def first(self) -> float:
        """SGD's momentum, or Adam's beta1."""
        return self.momentum if self.kind == "sgd" else self.betas[0]

    def states(
        self, shape: tuple[int, int], dtype: str = "fp32", *, bias: bool = False
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype of each state, by the name of its buffer.

        Args:
            shape: (n, D) of the table.
            dtype: of the table, by name.
            bias: the table has biases. "adamw_dense" keeps moments of them too.
        """
        state, dense = DTYPES[self.state_dtype], self.kind == "adamw_dense"
        found: dict[str, tuple[Shape, torch.dtype]] = {}
        if self.kind in ("adam", "adamw_dense") or (self.kind == "sgd" and self.momentum > 0):
            found["momentum"] = shape, state
        if self.kind != "sgd":
            whole = dense or not self.row_wise
            found["second"] = (shape, state) if whole else (shape[:1], torch.float32)
        if self.kahan and dtype != "fp32":
            found["kahan"] = shape, TABLE_DTYPES[dtype]
        if dense and bias:
            found |= dict.fromkeys(("bias_momentum", "bias_second"), ((shape[0], 1), torch.float32))
        return found


class Table(nn.Module):
    """A table [n, D] that its owner's step trains in place, with its optimizer's state.

    Everything is a buffer: nothing here requires a gradient or belongs to a torch optimizer. A
    table that is one shard of a larger one holds rows `shard.first` to `shard.end` - 1 of that; n
    is then their number, and first values and rounding are those of the whole table.

    Attributes:
        weight: [n, D].
        bias: fp32 [n], or None.
        row_scale: fp32 [n, 2] of an fp8 table, as `bce_step_` takes it; else None.
        rescaled: int64 [1] of an fp8 table: how often a row has outgrown its scale; else None.
        momentum, second, kahan, bias_momentum, bias_second: the optimizer's state, each None where
            it keeps none; see `RowOptimizer.states`.
        hyper: fp32 [7], see `xmlkernels.ops.Hyper`.
        counter: int64 [2], seed and step.
        optimizer: a RowOptimizer.
        shard: the rows that it holds.
        shared: whether it was built as one shard of several; so may be the only one with rows.

    Args:
        rows: of the whole table.
        width: D.
        dtype: "fp32", "bf16", "fp16", or "fp8" (e4m3 with a power-of-two scale per row). Below fp32
            updates round stochastically, without bias.
        bias: keep one fp32 bias per row.
        optimizer: a RowOptimizer, or the name of its kind.
        draw: gives the first values; None leaves zeros, to be filled from a checkpoint.
        seed: of the first values and of stochastic rounding.
        shard: the rows to hold; None holds all.

    Raises:
        InputError: an option is out of range, or this kind of table does not take the optimizer.
    """

    NAME: ClassVar[str] = "table"  # in messages
    OPTIMIZERS: ClassVar[tuple[str, ...]] = ("sgd", "adagrad", "adam")
    TRAINING_ONLY: ClassVar[tuple[str, ...]] = STATES  # buffers that prediction does without
    WAITS: ClassVar[bool] = False  # a step reads the device: it cannot be captured in a CUDA graph

    weight: Tensor
    bias: Tensor | None
    row_scale: Tensor | None
    rescaled: Tensor | None
    momentum: Tensor | None
    second: Tensor | None
    kahan: Tensor | None
    bias_momentum: Tensor | None
    bias_second: Tensor | None
    hyper: Tensor
    counter: Tensor

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        dtype: str = "fp32",
        bias: bool = False,
        optimizer: RowOptimizer | str = "sgd",
        draw: Draw | None = None,
        seed: int = 0,
        shard: Shard | None = None,
    ) -> None:
        super().__init__()
        if isinstance(optimizer, str):
            check_choice(f"{self.NAME}: optimizer", optimizer, self.OPTIMIZERS)
            optimizer = RowOptimizer(optimizer)
        self.check_options(dtype, optimizer)
        self.optimizer = optimizer
        self.shared = shard is not None
        self.shard = whole(rows) if shard is None else shard
        rows = self.shard.count
        weight, row_scale = new_table(self.shard, width, TABLE_DTYPES[dtype], seed, draw)
        rescaled = None if row_scale is None else torch.zeros(1, dtype=torch.int64)
        self.register_buffer("weight", weight)
        self.register_buffer("row_scale", row_scale)
        self.register_buffer("rescaled", rescaled)
        self.register_buffer("bias", torch.zeros(rows) if bias else None)
        states = optimizer.states((rows, width), dtype, bias=bias)
        for name in STATES:
            zeros = torch.zeros(states[name][0], dtype=states[name][1]) if name in states else None
            self.register_buffer(name, zeros)
        beta1, beta2 = optimizer.first, optimizer.betas[1]
        hyper = Hyper(0.0, optimizer.decay, beta1, beta2, optimizer.epsilon)
        self.register_buffer("hyper", hyper.tensor(), persistent=False)
        self.register_buffer("counter", torch.tensor([seed, 0]))

    @classmethod
    def check_options(cls, dtype: str, optimizer: RowOptimizer) -> None:
        """Raise InputError unless this kind of table takes the format and the optimizer."""
        check_choice(f"{cls.NAME}: dtype", dtype, TABLE_DTYPES)
        check_choice(f"{cls.NAME}: optimizer", optimizer.kind, cls.OPTIMIZERS)
        if optimizer.kahan and dtype == "fp8":
            mend = "leave it out: fp8 stores round stochastically"
            raise InputError(f"{cls.NAME}: kahan", "False for fp8", "True", mend)

    @property
    def width(self) -> int:
        """D."""
        return self.weight.shape[1]

    def bytes(self) -> dict[str, int]:
        """Bytes of each buffer, by name.

        A table that was built under `torch.device("meta")` holds no memory and says what a real one
        would take.
        """
        return {name: held.numel() * held.element_size() for name, held in self.named_buffers()}

    def stored(self) -> dict[str, Rows]:
        """Give the rows of each buffer that no memory of the device holds, by its name; see `Rows`.

        Such buffers are on the meta device.
        """
        return {}

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of each of these, wherever they are; `bytes` counts what stands for them."""
        return {}

    def row_buffers(self) -> dict[str, Tensor]:
        """Name the buffers that have a row per row of the table: its shards, where it is one."""
        names = ("weight", "bias", "row_scale", *STATES)
        held = dict(self.named_buffers(recurse=False))
        return {name: held[name] for name in names if name in held}

    def operand(self, x: Tensor) -> Tensor:
        """Give embeddings as a step's products take them; a narrower range may make infinity."""
        return x

    def step_bytes(self, documents: int) -> int:
        """Bytes that a step of B documents holds for this table alone, beside its buffers."""
        return 0

    def rows(self, start: int, end: int) -> Tensor:
        """Copy the rows start:end to fp32 [end - start, D]."""
        return rows_of(self.weight, self.row_scale, start, end)

    @torch.no_grad()
    def scores(self, x: Tensor, index: Tensor) -> Tensor:
        """Score chosen rows, without training: logits fp32 [B, S].

        Args:
            x: [B, D].
            index: rows, int64 [B, S], or [S] for the same ones in every sample; -1 pads (-inf).
        """
        return shortlist_matmul(x, self.weight, self.bias, index, self.row_scale)

    @torch.no_grad()
    def topk(self, x: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the k best rows of all: logits fp32 [B, k] and rows int64 [B, k], best first.

        Rows are numbered as in the whole table; a shard looks among its own.
        `exclude` is that of `matmul_topk`.
        """
        return matmul_topk(
            x,
            self.weight,
            self.bias,
            k,
            exclude=exclude,
            row_scale=self.row_scale,
            row_offset=self.shard.first,
        )

    def loss(self, x: Tensor, pos_row: Tensor, pos_sample: Tensor) -> Tensor:
        """Sum the loss [1] over samples and all rows, without training; differentiable in x.

        Of a shard, the summand of its rows; positives are those of the whole table.
        """
        pos_row, pos_sample = own_positives(pos_row, pos_sample, self.shard)
        return bce_loss(x, self.weight, self.bias, pos_row, pos_sample, row_scale=self.row_scale)

    def after_step(self) -> None:
        """Re-encode the rows of an fp8 table that outgrew their scale, then count the step.

        Every step calls it, so that no state of ours decides when: unless a row has grown, it reads
        eight bytes per row.
        """
        if self.row_scale is not None and self.rescaled is not None:
            first = self.shard.first
            self.rescaled += rescale_rows_(self.weight, self.row_scale, self.counter, first)
        self.counter[1] += 1


def without_states(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the optimizer states of tables, as prediction does.

    Args:
        tensors: of a checkpoint, by name.
        own: state dict of the model that will take them; what it holds itself stays.
    """
    ends = tuple(f".{name}" for name in Table.TRAINING_ONLY)
    return {name: t for name, t in tensors.items() if name in own or not name.endswith(ends)}


def check_choice(where: str, value: str, known: Mapping[str, object] | tuple[str, ...]) -> None:
    """Raise InputError unless the value is one of the known names."""
    if value not in known:
        raise InputError(where, f"one of {', '.join(known)}", repr(value), "choose one of them")


def normal(std: float) -> Draw | None:
    """N(0, std²); None for 0, a table that is filled from a checkpoint."""
    if std == 0:
        return None
    return lambda rows, width, generator: torch.randn(rows, width, generator=generator) * std


def xavier(nodes: int) -> Draw:
    """U(-a, a) with a = sqrt(6 / (n + D)) for a table of n rows (Glorot & Bengio, 2010)."""

    def draw(rows: int, width: int, generator: torch.Generator) -> Tensor:
        bound = math.sqrt(6 / (nodes + width))
        return torch.empty(rows, width).uniform_(-bound, bound, generator=generator)

    return draw


def new_table(
    shard: Shard, width: int, dtype: torch.dtype, seed: int, draw: Draw | None
) -> tuple[Tensor, Tensor | None]:
    """Make a shard [n, D] of first values, and the row_scale fp32 [n, 2] of an fp8 one.

    Without `draw`, and on the meta device, where there are no values, it is not filled.
    """
    table = torch.zeros(shard.count, width, dtype=dtype)
    row_scale = None
    if dtype == TABLE_DTYPES["fp8"]:
        row_scale = torch.tensor([[FIRST_SCALE, 0.0]]).repeat(shard.count, 1)
    if draw is not None and not table.is_meta:
        for first, values in first_values(shard, width, seed, draw):
            fill_rows(table, row_scale, first, values)
    return table, row_scale


def first_values(shard: Shard, width: int, seed: int, draw: Draw) -> Iterator[tuple[int, Tensor]]:
    """Draw the first values of a shard's rows: (the first of some, counted in it; fp32 [m, D])."""
    # A generator of its own: the table must not depend on what was drawn before it. It cannot skip,
    # so a shard draws what comes before its rows, too.
    generator = torch.Generator().manual_seed(seed)
    for start, end in _blocks(shard.end if shard.count else 0, width, shard.rows):
        values = draw(end - start, width, generator)
        first = max(start, shard.first)
        if first < min(end, shard.end):
            yield first - shard.first, values[first - start : shard.end - start]


def blocks(table: Tensor) -> Iterator[tuple[int, int]]:
    """(first, end) of its rows in turn, few enough to be held in fp32."""
    yield from _blocks(table.shape[0], table.shape[1], table.shape[0])


def _blocks(until: int, width: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yield the blocks of a table of `rows` rows that begin before row `until`."""
    step = max(1, _BLOCK // max(1, width))
    for start in range(0, until, step):
        yield start, min(start + step, rows)


def fill_rows(table: Tensor, row_scale: Tensor | None, start: int, values: Tensor) -> None:
    """Write rows from `start` on from fp32 values.

    An fp8 table takes them by its scales, and its row_scale their largest.
    """
    end = start + values.shape[0]
    if row_scale is None:
        table[start:end].copy_(values)
        return
    table[start:end].copy_((values / row_scale[start:end, :1]).clamp(-448, 448))
    row_scale[start:end, 1] = rows_of(table, row_scale, start, end).abs().amax(1)


def rows_of(table: Tensor, row_scale: Tensor | None, start: int, end: int) -> Tensor:
    """Copy rows start:end to fp32 [end - start, D]."""
    part = table[start:end].to(torch.float32, copy=True)
    return part if row_scale is None else part * row_scale[start:end, :1]


def scaled_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows fp32 [n, D] to e4m3, each by a power of two that brings its largest near 448.

    Returns:
        float8_e4m3fn [n, D], and row_scale fp32 [n, 2] as of a table of fp8: the scale, and the
        largest value.
    """
    largest = values.abs().amax(1)
    scale = torch.exp2(torch.ceil(torch.log2(largest.clamp(min=2.0**-100) / 448)))
    row_scale = torch.stack([scale, largest], 1)
    table = torch.empty_like(values, dtype=torch.float8_e4m3fn)
    fill_rows(table, row_scale, 0, values)
    return table, row_scale
