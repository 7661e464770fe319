"""The levels of a cascade: a table with a row per node, and the steps that train it in place.

`CascadeLevel` trains the rows that are candidates of a batch, `DenseLevel` all of them. A level may
be placed on a device of its own; `moved` takes a step's tensors there and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from xmlkernels.errors import InputError
from xmlkernels.nn.cluster_shard import OwnClusters, clusters_of
from xmlkernels.nn.shard import Shard, own_positives
from xmlkernels.nn.shortlist import candidates, locate
from xmlkernels.nn.table import RowOptimizer, Table, check_choice, xavier
from xmlkernels.ops import cluster_step_, shortlist_matmul, sparse_adam_
from xmlkernels.ops.hyper import BETA1, DECAY, DX_SCALE, EPSILON, LR, SCALE

LEVEL_OPTIMIZERS = ("adam", "sgd", "adamw_dense")  # of both kinds of level
_BATCH = 64  # the batch size that biases are tuned to; see `CascadeLevel`


class CascadeLevel(Table):
    """The table of one level, whose candidates alone are trained. `step` is all of its training.

    Biases follow plain SGD while the table follows Adam, and the mean over candidates makes their
    gradient about 1e-5 of what SGD needs. Adam does not see a constant factor of the gradient
    (epsilon is multiplied by it too). So the whole step runs on a gradient `gain` times as large,
    and dx and loss are divided by it: a bias then moves by lr * rw_loss * 64 * the batch's mean of
    (σ - y), the table's weights by exactly what they would without. With SGD, gain is 1.

    A level may live on its own device (`place_on`): the host, or a second card. A step then sends
    there what it needs and takes the results back: B D floats, the numbers of B K clusters and the
    positives one way, dx and the scores the other. The table and its states never move. Moving the
    active rows would save nothing: 64 documents with 400 to 1,000 of 65,536 clusters each, drawn at
    random, hold a third to two thirds of the table between them. Those would go there and back in
    every step with their momentum, while the host's own kernel updates them in place, at the rate
    of its memory.

    A level may be one shard of whole clusters of a larger one (`tree_shards`), or of rows of the
    coarsest. It is told all of a step as the whole level would be, and takes the part of its own
    clusters: of dx and loss it gives its summands, and its rows are those of the whole table.

    Args:
        nodes: rows of the table, of all its shards together.
        width: D.
        per_sample: candidates that a sample typically has; decides `gain`.
        dtype: "fp32", "bf16", "fp16" or "fp8", as of `Table`.
        optimizer: "adam" or "sgd"; `DenseLevel` has another one. Adam's epsilon belongs to the
            gradient of the mean loss.
        seed: of the initial table and of the rounding.
        fill: draw the initial table, Xavier uniform; False for one that is filled from a
            checkpoint.
        shard: the rows to hold, those of whole clusters; None holds all.
    """

    NAME: ClassVar[str] = "cascade table"
    OPTIMIZERS: ClassVar[tuple[str, ...]] = ("adam", "sgd")

    bias: Tensor

    def __init__(
        self,
        nodes: int,
        width: int,
        per_sample: int,
        *,
        dtype: str,
        optimizer: RowOptimizer,
        seed: int,
        fill: bool,
        shard: Shard | None = None,
    ) -> None:
        super().__init__(
            nodes,
            width,
            dtype=dtype,
            bias=True,
            optimizer=optimizer,
            draw=xavier(nodes) if fill else None,
            seed=seed,
            shard=shard,
        )
        self.per_sample, self.gain = per_sample, 1.0
        if optimizer.kind == "adam":
            # A power of two, so that multiplying by it rounds nothing.
            self.gain = 2.0 ** round(math.log2(_BATCH * max(1, per_sample)))
        self.hyper[EPSILON] = optimizer.epsilon * self.gain
        self._placed = False
        # The tree's own tensor, the clusters of it that are here, and their rows on the table's
        # device.
        self._tree: tuple[Tensor, OwnClusters, Tensor] | None = None
        self._chosen: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def check_options(cls, dtype: str, optimizer: RowOptimizer) -> None:
        """Raise InputError unless a level takes the format and the optimizer."""
        check_choice(f"{cls.NAME}: optimizer", optimizer.kind, LEVEL_OPTIMIZERS)
        super().check_options(dtype, optimizer)
        if optimizer.decay > 0 and not optimizer.decoupled:
            mend = "say decoupled=True"
            raise InputError(f"{cls.NAME}: decay", "a decoupled one", "L2 in the gradient", mend)

    def set_decay(self, decay: float) -> None:
        """Set the decoupled decay of the rows that are anybody's candidate: w -= lr decay w."""
        self.hyper[DECAY] = decay

    @property
    def nodes(self) -> int:
        """n, rows that are here."""
        return self.weight.shape[0]

    def place_on(self, device: torch.device) -> None:
        """Move the level to a device of its own, where it stays: a model's `.to` passes it by.

        Raises:
            InputError: no device of that name, or none in this machine.
        """
        try:
            super()._apply(lambda tensor: tensor.to(device))  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:
            # Torch's message has one sentence or several, depending on which part is missing.
            got = f"{device} ({str(error).splitlines()[0]})"
            where, expected = "device of the label table", "a device of this machine"
            raise InputError(where, expected, got, "choose cpu or a card") from error
        self._placed = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CascadeLevel:
        return self if self._placed else super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def step(
        self,
        x: Tensor,
        clusters: Tensor,
        row_ptr: Tensor,
        most: int,
        positives: tuple[Tensor, Tensor],
        *,
        lr: float | Tensor,
        beta1: float | Tensor | None,
        scale: Tensor,
        dx_scale: Tensor | float,
        need_loss: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Train the rows of each sample's clusters.

        Args:
            x: [B, D]; a non-finite value leaves the table as it was. The results are returned on
                its device.
            clusters: int64 [B, K], -1 pads; row_ptr: int64 [C + 1]; most: M. See `cluster_step_`.
                A shard takes those of the whole level, too, ascending, pads last.
            positives: (node, sample), sorted by both; of the whole level.
            lr: of this step.
            beta1: of this step, where the table has Adam; None keeps the last one.
            scale: fp32 [1] or [], factor of the loss and its gradient: rw_loss over the number of
                candidates.
            dx_scale: multiplies dx alone.

        Returns:
            dx: fp32 [B, D]. scores: fp32 [B, K, M], before the update; of a shard [B, K', M'], of
            its own clusters (`OwnClusters.chosen`, `most`). loss: fp32 [1], or [0].
        """
        options: dict[str, Any] = {"lr": lr, "beta1": beta1, "scale": scale, "dx_scale": dx_scale}
        out = self.update(x, clusters, row_ptr, most, positives, **options, need_loss=need_loss)
        self.after_step()
        return out

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        clusters: Tensor,
        row_ptr: Tensor,
        most: int,
        positives: tuple[Tensor, Tensor],
        *,
        lr: float | Tensor,
        beta1: float | Tensor | None,
        scale: Tensor,
        dx_scale: Tensor | float,
        need_loss: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do what `step` does but for `after_step`, which the caller does once dx is on its way."""
        self.hyper[LR] = lr
        if beta1 is not None and self.second is not None:
            # The cycle of beta1 is Adam's: SGD keeps its own momentum.
            self.hyper[BETA1] = beta1
        here = self.weight.device
        if not isinstance(dx_scale, Tensor):
            dx_scale = torch.full((1,), dx_scale, device=here)
        own, rows_here = self._tree_here(row_ptr)
        if not self.shard.whole:
            chosen, _ = self.chosen(clusters, row_ptr)
            clusters = torch.where(chosen >= 0, chosen - own.first, -1)
            most = own.most(most)
            positives = own_positives(*positives, self.shard)
        held = moved(here, x, clusters, *positives, scale, dx_scale)
        train = self._train if self.nodes else self._nothing
        out = train(held, rows_here, most, need_loss)
        dx, scores, loss = moved(x.device, *out)
        return dx, scores, loss

    def _train(
        self, held: list[Tensor], row_ptr: Tensor, most: int, need_loss: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take a step whose tensors are all on the table's device.

        Args:
            held: x, clusters, the positives' nodes and samples, scale, dx_scale.
        """
        x, clusters, node, sample, scale, dx_scale = held
        self.hyper[SCALE] = scale * self.gain
        self.hyper[DX_SCALE] = dx_scale / self.gain
        dx, scores, loss = cluster_step_(
            self.weight,
            x,
            clusters,
            row_ptr,
            most,
            node,
            sample,
            self.hyper,
            self.counter,
            bias=self.bias,
            momentum=self.momentum,
            second=self.second,
            kahan=self.kahan,
            row_scale=self.row_scale,
            row_offset=self.shard.first,
            decoupled=True,
            need_loss=need_loss,
        )
        return dx, scores, loss / self.gain

    def _nothing(
        self, held: list[Tensor], row_ptr: Tensor, most: int, need_loss: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take the step of a shard without rows, as `_train`."""
        x, clusters, *_ = held
        finite = torch.isfinite(self.operand(x)).all()
        zero = torch.where(finite, 0.0, torch.nan)
        scores = torch.where(finite, -torch.inf, torch.nan).repeat(*clusters.shape, most)
        return zero.repeat(*x.shape), scores, zero.repeat(int(need_loss))

    def own(self, row_ptr: Tensor) -> OwnClusters:
        """Find the clusters that are here; row_ptr is that of the whole level.

        Raises:
            InputError: a border of the shard lies within a cluster.
        """
        return self._tree_here(row_ptr)[0]

    def chosen(self, clusters: Tensor, row_ptr: Tensor) -> tuple[Tensor, Tensor]:
        """Pick from each sample's clusters those that are here, with their columns.

        A step asks for them twice; they are found once.

        Args:
            clusters: int64 [B, K], ascending, -1 pads last.
            row_ptr: int64 [C + 1], of the whole level.

        Returns:
            What `OwnClusters.chosen` gives; of the whole level, all.
        """
        if self._chosen is None or self._chosen[0] is not clusters:
            if self.shard.whole:
                column = torch.arange(clusters.shape[1], device=clusters.device)
                found = clusters, column.expand_as(clusters)
            else:
                found = self.own(row_ptr).chosen(clusters)
            self._chosen = clusters, *found
        return self._chosen[1:]

    def _tree_here(self, row_ptr: Tensor) -> tuple[OwnClusters, Tensor]:
        """Give the clusters that are here and their rows, on the table's device.

        As long as the tree's tensor is the same, they are found and copied once.
        """
        if self._tree is None or self._tree[0] is not row_ptr:
            if self.shard.whole:
                own = OwnClusters(0, row_ptr.shape[0] - 1, row_ptr)
            else:
                own = clusters_of(self.shard, row_ptr)
            self._tree = row_ptr, own, moved(self.weight.device, own.row_ptr)[0]
        return self._tree[1:]

    @torch.no_grad()
    def scores(self, x: Tensor, index: Tensor) -> Tensor:
        """Score chosen rows, as `Table.scores`; the result is on the device of x.

        A shard counts them from its first.
        """
        held = moved(self.weight.device, x, index)
        return moved(x.device, super().scores(*held))[0]


class DenseLevel(CascadeLevel):
    """A level whose every row is trained in every step, for small numbers of labels.

    This is CascadeXML without its `--sparse`: AdamW (Loshchilov & Hutter, ICLR 2019) on the whole
    table. Candidates, loss and dx are those of `CascadeLevel`. What differs: rows that are nobody's
    candidate decay too and go on moving by their momentum; the second moment is always [n, D];
    biases follow Adam as well, without decay; and there is no gain. The price is the gradient
    [n, D], the gradient of the logits [B, n], and two moments and weights that are read and written
    whole in every step.

    The arguments are those of `CascadeLevel`, with optimizer "adamw_dense" and without "fp8".
    """

    OPTIMIZERS: ClassVar[tuple[str, ...]] = ("adamw_dense",)

    bias_momentum: Tensor
    bias_second: Tensor

    @classmethod
    def check_options(cls, dtype: str, optimizer: RowOptimizer) -> None:
        """Raise InputError unless a level takes the format and the optimizer."""
        if dtype == "fp8":
            expected = "fp32, bf16 or fp16 for optimizer adamw_dense"
            mend = "choose one of them, or the row-sparse adam"
            raise InputError("cascade table: dtype", expected, dtype, mend)
        super().check_options(dtype, optimizer)

    def step_bytes(self, documents: int) -> int:
        """Bytes of the gradients of the weights and, of B documents, of the logits."""
        return 4 * self.nodes * (self.width + documents)

    def _train(
        self, held: list[Tensor], row_ptr: Tensor, most: int, need_loss: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, clusters, node, sample, scale, dx_scale = held
        listed, real = candidates(clusters, row_ptr, most)
        finite = torch.isfinite(x).all()
        x = torch.where(finite, x.float(), torch.nan).requires_grad_()
        index = torch.where(real, listed, -1).flatten(1)
        with torch.enable_grad():
            z = shortlist_matmul(x, self.weight, self.bias, index)
        scores = torch.where(finite, z.detach().view(real.shape), torch.nan)
        y = targets(node, sample, clusters, row_ptr, most, real)
        g = torch.where(real, scale * (torch.sigmoid(scores) - y), 0)
        (dx,) = torch.autograd.grad(z, x, (dx_scale * g).flatten(1))
        loss = x.new_empty(0)
        if need_loss:
            total = torch.where(real, softplus(scores) - y * scores, 0).sum()
            loss = torch.where(finite, scale * total, torch.nan).reshape(1)
        self._adamw(x.detach(), g, torch.where(real, listed, self.nodes), finite)
        return torch.where(finite, dx, torch.nan), scores, loss

    def _adamw(self, x: Tensor, g: Tensor, listed: Tensor, finite: Tensor) -> None:
        """Update every row, unless x was not finite: the op then leaves all as it was.

        Args:
            x: [B, D].
            g: [B, K, M], gradient of the logits, 0 at pads.
            listed: int64 [B, K, M], their rows; n at pads.
        """
        # The last column takes the pads.
        whole = torch.zeros(x.shape[0], self.nodes + 1, device=x.device)
        whole.scatter_(1, listed.flatten(1), g.flatten(1))
        g, rows = whole[:, : self.nodes], torch.arange(self.nodes, device=x.device)
        assert self.momentum is not None and self.second is not None
        sparse_adam_(
            self.weight,
            self.momentum,
            self.second,
            rows,
            g.T @ x,
            self.hyper,
            self.counter,
            kahan=self.kahan,
            row_offset=self.shard.first,
            decoupled=True,
        )
        plain = self.hyper.clone()
        plain[DECAY] = 0  # biases do not decay
        grad = torch.where(finite, g.sum(0), torch.nan)[:, None]
        bias = self.bias.view(-1, 1)
        sparse_adam_(bias, self.bias_momentum, self.bias_second, rows, grad, plain, self.counter)


def targets(
    node: Tensor, sample: Tensor, clusters: Tensor, row_ptr: Tensor, most: int, real: Tensor
) -> Tensor:
    """Give each candidate (`real`, of `candidates`) its target: fp32 [B, K, M], 1 at positives."""
    # One more element takes the positives that are no candidates.
    target = torch.zeros(real.numel() + 1, device=real.device)
    place, found = locate(node, sample, clusters, row_ptr, most)
    target[torch.where(found, place, real.numel())] = 1
    return target[:-1].view(real.shape)


def moved(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Take tensors to a device; one that is there already is handed on as it is.

    Between host and card the copies are asynchronous and go through page-locked memory, which
    torch's allocator keeps until they are done. The host waits once, for all of them together, and
    only where it reads them next.

    Args:
        device: with its number, as a tensor's `.device` has it.
        tensors: of any shapes and devices.
    """
    sources = {t.device for t in tensors if t.device != device}
    if not sources:
        return list(tensors)
    if device.type == "cuda":
        tensors = tuple(t.pin_memory() if t.device.type == "cpu" else t for t in tensors)
    out = [t.to(device, non_blocking=True) for t in tensors]
    if device.type == "cpu":
        for source in sources:
            wait_for(source)
    return out


def wait_for(device: torch.device) -> None:
    """Wait until all that was asked of a card's current stream is done."""
    torch.cuda.current_stream(device).synchronize()
