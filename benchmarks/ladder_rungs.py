"""The rungs of the speed ladder (ladder.py): the table's part of a training step, step by step.

Each is made for the same encoder, batch and table with momentum (`Held`).
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from benchmarks import head
from benchmarks.case import DTYPES, LR
from benchmarks.shapes import Shape
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.mixed import MixedHead
from xmlkernels.nn.table import RowOptimizer
from xmlkernels.optim import encoder_optimizer
from xmlkernels.precision import default_autocast

PIECES, LOSS_EVERY = 4, 100
MIXED = "fp32 master, fp16 products"
MOMENTUM, DECAY = 0.9, 1e-4
VOCABULARY = 4096


class Setting(NamedTuple):
    """A shape of the table, and the encoder in front of it: layers and tokens of a document."""

    shape: Shape
    layers: int
    tokens: int


SETTINGS = {
    "cpu": (Setting(Shape("64k-L3-t16", 64, 65_536, 384), 3, 16),),
    # AmazonTitles-3M with MiniLM-L6, the first of table 8, at the batch of its baseline.
    "cuda": (Setting(Shape("3m-L6-t32", 128, 2_812_281, 384), 6, 32),),
}
TINY = Setting(Shape("tiny", 8, 37, 16), 1, 4)


@dataclass
class Held:
    """What all rungs share: an encoder, a batch, and a table with momentum for each format."""

    setting: Setting
    encoder: Encoder
    optimizer: torch.optim.Optimizer
    inputs: tuple[Tensor, Tensor]
    pos_row: Tensor
    pos_sample: Tensor
    tables: dict[str, FullHead] = field(default_factory=dict)

    def table(self, dtype: str) -> FullHead:
        """Return the table of a format, made on first use."""
        if dtype not in self.tables:
            shape, rule = self.setting.shape, RowOptimizer(momentum=MOMENTUM, decay=DECAY)
            if dtype == MIXED:
                made: FullHead = MixedHead(shape.L, shape.D, compute="fp16", optimizer=rule)
            else:
                made = FullHead(shape.L, shape.D, dtype=dtype, optimizer=rule)
            self.tables[dtype] = made.to(self.pos_row.device)
        return self.tables[dtype]


class TableStep(NamedTuple):
    """The table's part of a step.

    Attributes:
        gradients: x [B, D] → its gradient, and the loss or None.
        update: applies the table's own gradient; does nothing where `gradients` has done it.
    """

    gradients: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    update: Callable[[], object]


@dataclass(frozen=True)
class Rung:
    """One implementation.

    Attributes:
        name: in the column `impl`.
        dtype: in the column `dtype`: of the table, or of a peer's products.
        make: its step, with state of its own.
        table: format of the table that it trains.
        timed: whether it is run, not derived.
    """

    name: str
    dtype: str
    make: Callable[[Held], TableStep]
    table: str = "fp32"
    timed: bool = True

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from the others."""
        return self.name, self.dtype


def make_held(setting: Setting, device: str, tables: Iterable[str] = ()) -> Held:
    """Make the same encoder, batch and tables in every process.

    The encoder has taken one step, so that its moments are there.
    """
    shape, g = setting.shape, torch.Generator().manual_seed(2)
    torch.manual_seed(0)  # of the encoder's dropout
    encoder = Encoder.tiny(
        VOCABULARY, shape.D, setting.layers, autocast=default_autocast(device)
    ).to(device)
    ids = torch.randint(VOCABULARY, (shape.B, setting.tokens), generator=g).to(device)
    batch = head.make_positives(shape, g)
    optimizer = encoder_optimizer(encoder, LR, 0.01)
    row, sample = (t.to(device) for t in batch)
    held = Held(setting, encoder, optimizer, (ids, torch.ones_like(ids)), row, sample)
    encoder(*held.inputs).sum().backward()
    optimizer.step()
    for dtype in tables:
        held.table(dtype)
    return held


def dense_loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Sum the loss as torch's own functions have it."""
    return bce(nn.functional.linear(x, weight), target, reduction="sum")


def autograd_step(held: Held, *, pieces: int = 1, compiled: bool = False) -> TableStep:
    """Make the plain step: dense targets, autograd, torch's SGD."""
    weight, update = _leaf(held.table("fp32"))
    loss_of = torch.compile(dense_loss) if compiled else dense_loss
    place = held.pos_sample.long(), held.pos_row

    def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.requires_grad_()
        target = torch.zeros(x.shape[0], weight.shape[0], device=x.device)
        target[place] = 1
        total = torch.zeros((), device=x.device)
        for part, own in zip(x.chunk(pieces), target.chunk(pieces), strict=True):
            loss = loss_of(part, weight, own)
            loss.backward()
            total += loss.detach()
        assert x.grad is not None
        return x.grad, total

    return TableStep(gradients, update)


def sparse_step(held: Held, *, loss: bool, products: str = "fp32") -> TableStep:
    """Make Renee's step: the logits become the gradient in place; loss from the logits, if asked.

    Args:
        held: table and batch.
        loss: compute its exact value before the logits are gone.
        products: format of the matrix products; below fp32, of a copy of the master made anew in
            every step.
    """
    weight, update = _leaf(held.table("fp32"))
    place, dtype = (held.pos_sample.long(), held.pos_row), DTYPES[products]

    @torch.no_grad()
    def gradients(x: Tensor) -> tuple[Tensor, Tensor | None]:
        x, narrow = x.to(dtype), weight.detach().to(dtype)
        z = x @ narrow.T
        total = None
        if loss:
            total = z.clamp(min=0).sum(dtype=torch.float32) - z[place].sum(dtype=torch.float32)
            total += z.abs().neg_().exp_().log1p_().sum(dtype=torch.float32)
        z.sigmoid_()
        z[place] -= 1
        dx = (z @ narrow).float()
        weight.grad = (z.T @ x).float()
        return dx, total

    return TableStep(gradients, update)


def fused_step(held: Held, *, dtype: str) -> TableStep:
    """Make this package's step on a table of a format."""
    table = held.table(dtype)

    def gradients(x: Tensor) -> tuple[Tensor, None]:
        return table.step(x, held.pos_row, held.pos_sample, lr=LR)[0], None

    return TableStep(gradients, lambda: None)


def _leaf(table: FullHead) -> tuple[Tensor, Callable[[], None]]:
    """Make the table a leaf of autograd, and its update by torch's SGD on the table's momentum."""
    weight = table.weight.detach().requires_grad_()
    optimizer = torch.optim.SGD([weight], LR, momentum=MOMENTUM, weight_decay=DECAY, fused=True)
    optimizer.state[weight] = {"momentum_buffer": table.momentum}

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return weight, update


def rungs_of(device: str, *, compiled: bool = True) -> list[Rung]:
    """List the rungs of a device, from the bottom."""
    part = functools.partial
    half = "fp16" if device == "cuda" else "fp32"
    rungs = [
        Rung("plain", "fp32", autograd_step),
        Rung("accumulated", "fp32", part(autograd_step, pieces=PIECES)),
        Rung("compiled", "fp32", part(autograd_step, pieces=PIECES, compiled=True)),
        Rung("sparse", half, part(sparse_step, loss=True, products=half)),
        Rung("sampled", half, part(sparse_step, loss=True, products=half), timed=False),
        Rung("none", half, part(sparse_step, loss=False, products=half)),
    ]
    if device == "cuda":
        rungs.append(Rung("mixed", "fp16", part(fused_step, dtype=MIXED), MIXED))
    fused = ("fp32", "bf16") if device == "cpu" else ("fp16", "bf16", "fp8")
    rungs += [Rung("fused", dtype, part(fused_step, dtype=dtype), dtype) for dtype in fused]
    return [rung for rung in rungs if compiled or rung.name != "compiled"]
