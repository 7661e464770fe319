"""Mixed precision of the tables: an fp32 master, products in fp16 or bf16.

Source: Micikevicius et al., "Mixed Precision Training" (ICLR 2018); Renee (MLSys 2023), its
`--fp16xfc`. There the whole table is copied in every step; here only the rows at work are, rounded
to nearest, so that a weight takes 4 bytes as in an fp32 table. Gradients and updates are fp32.
Prediction reads the master: to a checkpoint, an export or a predictor this is an fp32 table.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from xmlkernels.errors import InputError
from xmlkernels.nn.cascade_level import CascadeLevel, targets
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.shard import own_positives
from xmlkernels.nn.shortlist import candidates
from xmlkernels.nn.table import RowOptimizer, Table, check_choice
from xmlkernels.ops import (
    bce_loss,
    shortlist_backward,
    shortlist_matmul,
    sparse_adam_,
    sparse_sgd_,
)
from xmlkernels.ops.hyper import DX_SCALE, LR, SCALE
from xmlkernels.precision import DTYPES

COMPUTE = ("fp16", "bf16")
_PIECE = 1 << 25  # weights at a time: 200 MB of their copy and gradient, whatever the table


class MixedProducts(Table):
    """What every table of mixed precision has; stands before the kind of table among its bases.

    Args:
        options: of that kind, by place and by name; dtype "fp32" alone.
        compute: "fp16" or "bf16", the format of products.
    """

    def __init__(self, *options: Any, compute: str, **named: Any) -> None:
        check_choice(f"{self.NAME}: compute", compute, COMPUTE)
        super().__init__(*options, **named)
        self.compute = compute

    @classmethod
    def check_options(cls, dtype: str, optimizer: RowOptimizer) -> None:
        """Raise InputError unless the table is fp32: only that is a master copy."""
        super().check_options(dtype, optimizer)
        if dtype != "fp32":
            mend = "choose fp32, or leave compute out"
            raise InputError(f"{cls.NAME}: dtype", "fp32 for mixed precision", dtype, mend)

    def operand(self, x: Tensor) -> Tensor:
        """Round embeddings to the format of products; beyond fp16's range they become infinite."""
        return x.detach().to(DTYPES[self.compute])


class MixedHead(MixedProducts, FullHead):
    """A full head of fp32 weights whose products are in a narrower format.

    It works in pieces of rows: each is rounded, scored, and updated from its fp32 gradient, before
    the next. An embedding that is not finite, or not in fp16, leaves the table as it was, and dx
    and loss become NaN.

    Args:
        labels, width: L and D.
        compute: "fp16" or "bf16".
        options: of `FullHead`; dtype "fp32" alone, and no `skip_units`.

    Raises:
        InputError: an option is out of range.
    """

    WITHOUT_SKIPS: ClassVar[str] = "mixed precision trains every label"

    @property
    def piece(self) -> int:
        """Rows at a time: a number of the width alone, so that bits depend on no device."""
        return max(1, _PIECE // self.width)

    def step_bytes(self, documents: int) -> int:
        """Bytes of a piece in the narrower format and of its gradient."""
        return min(self.shard.count, self.piece) * self.width * (2 + 4)

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        pos_row: Tensor,
        pos_sample: Tensor,
        *,
        lr: float | Tensor,
        dx_scale: Tensor | float = 1.0,
        need_loss: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Train the table on one batch; see `FullHead.update`."""
        pos_row, pos_sample = own_positives(pos_row, pos_sample, self.shard)
        self.hyper[LR], self.hyper[DX_SCALE] = lr, dx_scale
        x = self.operand(x)
        finite = torch.isfinite(x).all()
        x = torch.where(finite, x, torch.nan)
        dx = torch.zeros(x.shape, device=x.device)
        loss = torch.zeros(int(need_loss), device=x.device)
        for start in range(0, self.shard.count, self.piece):
            part = slice(start, min(start + self.piece, self.shard.count))
            weight = rounded(self.weight[part], self.compute)
            bias = None if self.bias is None else self.bias[part]
            positives = _within(pos_row, pos_sample, part)
            if need_loss:
                loss += bce_loss(x, weight, bias, *positives)
            # The op itself: autograd would hand the gradient on in the copy's own format.
            own, grad, dbias = torch.ops.xmlkernels.bce_loss_backward(
                x, weight, bias, *positives, need_dweight=True, need_dbias=bias is not None
            )
            dx += own
            self._update(part, grad)
            if bias is not None:
                bias -= torch.where(finite, self.hyper[LR] * dbias, 0)
        return self.hyper[DX_SCALE] * dx, loss

    def _update(self, part: slice, grad: Tensor) -> None:
        rows = torch.arange(part.stop - part.start, device=grad.device)
        update_rows_(
            self,
            rows,
            grad,
            part=part,
            row_offset=self.shard.first + part.start,
            decoupled=self.optimizer.decoupled,
        )


class MixedLevel(MixedProducts, CascadeLevel):
    """A level of fp32 weights whose products are in a narrower format.

    The rows that a step touches are copied, rounded, scored, and updated from their fp32 gradient.
    Their number is read on the host. Rules and buffers are those of `CascadeLevel`.

    Args:
        nodes, width, per_sample: of `CascadeLevel`.
        compute: "fp16" or "bf16".
        options: of `CascadeLevel`; dtype "fp32" alone.
    """

    OPTIMIZERS: ClassVar[tuple[str, ...]] = ("adam", "sgd")
    WAITS: ClassVar[bool] = True

    def step_bytes(self, documents: int) -> int:
        """Bytes of the rows that a step touches at most, in the narrower format and as gradient."""
        return min(self.nodes, documents * self.per_sample) * self.width * (2 + 4)

    def _train(
        self, held: list[Tensor], row_ptr: Tensor, most: int, need_loss: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, clusters, node, sample, scale, dx_scale = held
        listed, real = candidates(clusters, row_ptr, most)
        x = self.operand(x)
        finite = torch.isfinite(x).all()
        x = torch.where(finite, x, torch.nan)
        rows, place = torch.unique(listed[real], return_inverse=True)
        index = torch.full_like(listed, -1)
        index[real] = place
        index = index.flatten(1)
        weight = rounded(self.weight[rows], self.compute)
        z = shortlist_matmul(x, weight, self.bias[rows], index).view(real.shape)
        y = targets(node, sample, clusters, row_ptr, most, real)
        g = torch.where(real, scale * (torch.sigmoid(z) - y), 0)
        own, _, grad, dbias = shortlist_backward(g.flatten(1), x, weight, index, need_dbias=True)
        loss = x.new_empty(0, dtype=torch.float32)
        if need_loss:
            loss = (scale * torch.where(real, softplus(z) - y * z, 0).sum()).reshape(1)
        # The gain is a power of two: what it multiplies is rounded as it would be without.
        self.hyper[SCALE] = self.gain
        update_rows_(self, rows, grad, row_offset=self.shard.first, decoupled=True)
        step = self.hyper[LR] * self.gain * dbias
        self.bias.index_add_(0, rows, torch.where(finite, -step, 0))
        # Also of samples without a candidate here.
        dx = torch.where(finite, dx_scale * own, torch.nan)
        return dx, torch.where(finite, z, torch.nan), loss


def update_rows_(
    table: Table,
    rows: Tensor,
    grad: Tensor,
    *,
    part: slice = slice(None),
    row_offset: int = 0,
    decoupled: bool,
) -> None:
    """Update rows [N] of a part of a table from their fp32 gradient [N, D], by its optimizer."""
    held = [None if t is None else t[part] for t in (table.weight, table.momentum, table.second)]
    weight, momentum, second = held
    assert weight is not None
    given = rows, grad, table.hyper, table.counter
    if second is None:
        sparse_sgd_(weight, momentum, *given, row_offset=row_offset, decoupled=decoupled)
    else:
        assert momentum is not None
        sparse_adam_(weight, momentum, second, *given, row_offset=row_offset, decoupled=decoupled)


def rounded(weight: Tensor, compute: str) -> Tensor:
    """Copy rows in the format of products, rounded to nearest, at most its largest value."""
    largest = torch.finfo(DTYPES[compute]).max
    return weight.clamp(-largest, largest).to(DTYPES[compute])


def _within(pos_row: Tensor, pos_sample: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Count the rows of positives from a piece's first; those outside become fill, at the end.

    Sorted on the device: a search for the ends would have to be read on the host.
    """
    count = part.stop - part.start
    inside = (pos_row >= part.start) & (pos_row < part.stop)
    row, order = torch.where(inside, pos_row - part.start, count).sort(stable=True)
    return row, pos_sample[order]
