"""One level of a cascade: a table with a row per node, its optimizer's state, and the step that
trains it in place.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from xmlkernels.errors import InputError
from xmlkernels.nn.placement import moved
from xmlkernels.nn.table import DTYPES, TABLE_DTYPES, new_table, rows_of, xavier
from xmlkernels.ops import cluster_step_, rescale_rows_, shortlist_matmul

_KNOWN = ("adam", "sgd", "adamw_dense")  # the last one is `DenseLevel`'s
_BATCH = 64  # the batch size that biases are tuned to; see `CascadeLevel`


class CascadeLevel(nn.Module):
    """Table of one level. Nothing here requires a gradient or stands in a torch optimizer: `step`
    is all of its training.

    Biases follow plain SGD beside the table's Adam, and the mean over candidates makes their
    gradient about 1e-5 of what SGD needs. Adam does not see a constant factor of the gradient
    (epsilon is multiplied by it too), so the whole step runs on a gradient `gain` times as large
    and dx and loss are divided by it: a bias then moves by lr * rw_loss * 64 * the batch's mean of
    (σ - y), a table's weights by exactly what they would without. With optimizer "sgd" gain is 1.

    A level may stand on a device of its own (`place`): the host, a second card. What a step needs
    then goes there and its results come back: B D floats, the numbers of B K clusters and the
    positives one way, dx and the scores the other. The table and its states never move. To move the
    active rows would be no saving: 64 documents with 400 to 1,000 of 65,536 clusters each, drawn at
    random, hold a third to two thirds of the table between them, which would go there and back in
    every step with its momentum, while the host's own kernel updates it where it is, at the rate of
    its memory.

    Args:
        nodes: n, rows of the table.
        width: D.
        per_sample: candidates that a sample typically has; decides `gain` alone.
        dtype: "fp32", "bf16", "fp16" or "fp8" (e4m3 with a power-of-two scale per row); below fp32
            updates round stochastically, without bias.
        optimizer: "adam" or "sgd"; `DenseLevel` has another one.
        row_wise: Adam's second moment once for a row, from the mean over D, in place of [n, D].
        betas, epsilon: Adam's; betas[0] is SGD's momentum (0: no state). Epsilon belongs to the
            gradient of the mean loss.
        state_dtype: of the [n, D] states; a row-wise second moment is fp32.
        seed: of the initial table and of the rounding.
        fill: draw the initial table, Xavier uniform; False for one that is filled from a
            checkpoint.
    """

    OPTIMIZERS: tuple[str, ...] = ("adam", "sgd")

    weight: Tensor
    bias: Tensor
    momentum: Tensor | None
    second: Tensor | None
    row_scale: Tensor | None
    rescaled: Tensor | None
    hyper: Tensor
    counter: Tensor

    def __init__(
        self,
        nodes: int,
        width: int,
        per_sample: int,
        *,
        dtype: str,
        optimizer: str,
        row_wise: bool,
        betas: tuple[float, float],
        epsilon: float,
        state_dtype: str,
        seed: int,
        fill: bool,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("dtype", dtype, TABLE_DTYPES),
            ("state_dtype", state_dtype, DTYPES),
        ):
            if value not in known:
                raise InputError(
                    f"cascade table: {name}",
                    f"one of {', '.join(known)}",
                    repr(value),
                    "choose one of them",
                )
        if optimizer not in self.OPTIMIZERS:
            names = ", ".join(_KNOWN)
            raise InputError(
                "cascade table: optimizer", f"one of {names}", repr(optimizer), "choose one of them"
            )
        adam, shape, state = optimizer != "sgd", (nodes, width), DTYPES[state_dtype]
        # A power of two, so that multiplying by it rounds nothing.
        self.gain = (
            2.0 ** round(math.log2(_BATCH * max(1, per_sample))) if optimizer == "adam" else 1.0
        )
        self._placed = False
        self._row_ptr: tuple[Tensor, Tensor] | None = (
            None  # the tree's, and the same beside the table
        )
        weight, row_scale = new_table(
            nodes, width, TABLE_DTYPES[dtype], seed, xavier(nodes) if fill else None
        )
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.zeros(nodes))
        self.register_buffer("row_scale", row_scale)
        self.register_buffer(
            "rescaled", None if row_scale is None else torch.zeros(1, dtype=torch.int64)
        )
        self.register_buffer(
            "momentum", torch.zeros(shape, dtype=state) if adam or betas[0] > 0 else None
        )
        second = (
            torch.zeros(nodes)
            if row_wise and optimizer == "adam"
            else torch.zeros(shape, dtype=state)
        )
        self.register_buffer("second", second if adam else None)
        hyper = [0.0, 0.0, betas[0], betas[1], epsilon * self.gain, 1.0, 1.0]
        self.register_buffer("hyper", torch.tensor(hyper), persistent=False)
        self.register_buffer("counter", torch.tensor([seed, 0]))

    def set_decay(self, decay: float) -> None:
        """Decoupled decay of the rows that are anybody's candidate: w -= lr decay w."""
        self.hyper[1] = decay

    @property
    def nodes(self) -> int:
        return self.weight.shape[0]

    def place(self, device: torch.device) -> None:
        """Moves the level to a device of its own, where it stays: `.to` of the model passes it by.

        Raises:
            InputError: no device of that name, or not in this machine.
        """
        try:
            super()._apply(lambda tensor: tensor.to(device))
        except torch.OutOfMemoryError:
            raise
        except (
            RuntimeError,
            AssertionError,
        ) as error:  # torch says so, in a sentence or several, whichever part is missing
            got = f"{device} ({str(error).splitlines()[0]})"
            raise InputError(
                "device of the label table", "a device of this machine", got, "choose cpu or a card"
            ) from error
        self._placed = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CascadeLevel":
        return self if self._placed else super()._apply(fn, recurse)

    @torch.no_grad()
    def step(
        self,
        x: Tensor,
        clusters: Tensor,
        row_ptr: Tensor,
        most: int,
        positives: tuple[Tensor, Tensor],
        *,
        lr: float,
        beta1: float | None,
        scale: Tensor,
        dx_scale: Tensor | float,
        need_loss: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Trains the rows of each sample's clusters.

        Args:
            x: [B, D]; a non-finite value leaves the table as it was. Wherever it is, the results
                are too.
            clusters: int64 [B, K], -1 pads; row_ptr: int64 [C + 1]; most: M. See `cluster_step_`.
            positives: (node, sample), sorted by both.
            lr: of this step.
            beta1: of this step, where the table has Adam; None leaves what it was.
            scale: fp32 [1] or [], factor of the loss and its gradient: rw_loss over the number of
                candidates.
            dx_scale: multiplies dx alone.

        Returns:
            dx: fp32 [B, D]. scores: fp32 [B, K, M], before the update. loss: fp32 [1], or [0].
        """
        self.hyper[0] = lr
        if (
            beta1 is not None and self.second is not None
        ):  # the cycle is Adam's: SGD keeps its own momentum
            self.hyper[2] = beta1
        here = self.weight.device
        if not isinstance(dx_scale, Tensor):
            dx_scale = torch.full((1,), dx_scale, device=here)
        held = moved(here, x, clusters, *positives, scale, dx_scale)
        out = self._train(held, self._beside(row_ptr), most, need_loss)
        self.counter[1] += 1
        dx, scores, loss = moved(x.device, *out)
        return dx, scores, loss

    def _train(
        self, held: list[Tensor], row_ptr: Tensor, most: int, need_loss: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`step` with everything beside the table: x, clusters, positives' nodes and samples,
        scale, dx_scale.
        """
        x, clusters, node, sample, scale, dx_scale = held
        self.hyper[5:6] = scale * self.gain
        self.hyper[6:7] = dx_scale / self.gain
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
            row_scale=self.row_scale,
            decoupled=True,
            need_loss=need_loss,
        )
        if self.row_scale is not None and self.rescaled is not None:
            self.rescaled += rescale_rows_(self.weight, self.row_scale, self.counter)
        return dx, scores, loss / self.gain

    def _beside(self, row_ptr: Tensor) -> Tensor:
        """The tree's tensor on the table's device; while it is the same one it is copied once, not
        in every step.
        """
        if row_ptr.device == self.weight.device:
            return row_ptr
        if self._row_ptr is None or self._row_ptr[0] is not row_ptr:
            self._row_ptr = row_ptr, moved(self.weight.device, row_ptr)[0]
        return self._row_ptr[1]

    @torch.no_grad()
    def scores(self, x: Tensor, index: Tensor) -> Tensor:
        """Logits fp32 [B, S] of the rows index int64 [B, S] (or [S], the same for all), -1 pads
        (-inf); nothing is trained.
        """
        held = moved(self.weight.device, x, index)
        return moved(
            x.device, shortlist_matmul(held[0], self.weight, self.bias, held[1], self.row_scale)
        )[0]

    def rows(self, start: int, end: int) -> Tensor:
        """Table rows start:end in fp32 [end - start, D], a copy."""
        return rows_of(self.weight, self.row_scale, start, end)
