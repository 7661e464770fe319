"""The full head: one table row per label, all of them scored and trained at every step."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from xmlkernels import dist
from xmlkernels.errors import InputError
from xmlkernels.nn.shard import Shard, own_positives
from xmlkernels.nn.table import RowOptimizer, Table, blocks, fill_rows, normal
from xmlkernels.ops import bce_step_
from xmlkernels.ops.hyper import DX_SCALE, LR


class FullHead(Table):
    """A table with a row per label, and the step that trains it (Renee, MLSys 2023, section 3).

    `step` is the whole of its training. The embeddings may come from any encoder:

        head = FullHead(labels=131_072, width=384, dtype="bf16")
        dx, loss = head.step(x.detach(), pos_row, pos_sample, lr=0.05, need_loss=True)
        x.backward(dx)

    Attributes:
        config: what prediction needs to build it again: FullHead(**config, std=0).
        skipped: int64 [2] with `skip_units`: groups of labels skipped and seen since it was built;
            else None. The other buffers are those of `Table`.

    Args:
        labels: L.
        width: D, of the embedding.
        dtype: of the table: "fp32", "bf16", "fp16" or "fp8".
        bias: keep one fp32 bias per label (off in Renee).
        optimizer: "sgd" (Renee) or "adam", by name or as a RowOptimizer with its settings.
        skip_units: above 0, groups of labels without positives whose weights a step would change by
            less than so many units are skipped (`bce_step_`, Skipping). A unit is the spacing of
            the table's format at 2^-6 (bf16 2^-13, fp16 2^-16, fp8 2^-9, fp32 2^-29). With
            stochastic rounding, a change of 0.01 units moves one weight in a hundred.
        std: standard deviation of the initial N(0, std²); 0 for a table that is filled from a
            checkpoint.
        seed: of the initial table and of the stochastic rounding.
        shard: the labels to hold, where several processes share the table; None holds all.

    Raises:
        InputError: an option is out of range.
    """

    NAME: ClassVar[str] = "label table"
    OPTIMIZERS: ClassVar[tuple[str, ...]] = ("sgd", "adam")
    WITHOUT_SKIPS: ClassVar[str] = ""  # why a kind of head takes no skip_units; empty: it does

    skipped: Tensor | None

    def __init__(
        self,
        labels: int,
        width: int,
        *,
        dtype: str = "fp32",
        bias: bool = False,
        optimizer: RowOptimizer | str = "sgd",
        skip_units: float = 0.0,
        std: float = 0.02,
        seed: int = 0,
        shard: Shard | None = None,
    ) -> None:
        if skip_units > 0 and self.WITHOUT_SKIPS:
            mend = f"leave it out: {self.WITHOUT_SKIPS}"
            raise InputError(f"{self.NAME}: skip_units", "0", str(skip_units), mend)
        super().__init__(
            labels,
            width,
            dtype=dtype,
            bias=bias,
            optimizer=optimizer,
            draw=normal(std),
            seed=seed,
            shard=shard,
        )
        self.config: dict[str, Any] = {
            "labels": labels,
            "width": width,
            "dtype": dtype,
            "bias": bias,
        }
        self.skip_below = skip_units * 2.0**-6 * torch.finfo(self.weight.dtype).eps
        skipped = torch.zeros(2, dtype=torch.int64) if skip_units > 0 else None
        self.register_buffer("skipped", skipped, persistent=False)

    @classmethod
    def check_options(cls, dtype: str, optimizer: RowOptimizer) -> None:
        """Raise InputError unless `bce_step_` takes the format and the optimizer."""
        super().check_options(dtype, optimizer)
        if optimizer.row_wise:
            mend = "leave it out: a full head's Adam has a second moment for every weight"
            raise InputError(f"{cls.NAME}: row_wise", "False", "True", mend)

    @property
    def labels(self) -> int:
        """L, also where this is a shard of the table."""
        return self.shard.rows

    @torch.no_grad()
    def start_at_frequencies(self, positives: Tensor, documents: int) -> None:
        """Set each bias to the logit of its label's frequency, before training.

        From biases of 0 all rows first learn, together, that labels are rare. Those steps are lost,
        and their gradients are so large that Adam's second moment holds its steps down for hundreds
        of batches after them. Source: Lin et al., ICCV 2017, section 3.3.

        Args:
            positives: [L], training documents of each label; half a document is added.
            documents: number of training documents.

        Raises:
            InputError: the table has no bias, or there is not one number per label.
        """
        self._check_frequencies(positives)
        assert self.bias is not None
        positives = positives[self.shard.first : self.shard.end]
        share = (positives.double() + 0.5) / (documents + 1)
        self.bias.copy_(torch.logit(share))

    def _check_frequencies(self, positives: Tensor) -> None:
        if self.bias is None:
            raise InputError("label table", "a bias", "none", "build it with bias=True")
        if positives.shape != (self.labels,):
            expected = f"{self.labels} numbers, one for each label"
            got = str(list(positives.shape))
            raise InputError("positives", expected, got, "count this dataset's labels")

    @torch.no_grad()
    def start_at_centroids(
        self, vectors: Iterable[tuple[Tensor, Tensor, Tensor]], norm: float
    ) -> None:
        """Point each row from the mean of all documents to its label's mean, before training.

        A label of two or three documents then begins as a nearest-centroid classifier; a random row
        would see them too seldom. Rows without a document stay as drawn. One fp32 table of the rows
        here is held meanwhile. Source: "imprinting" (Qi, Brown, Lowe, CVPR 2018, section 3.2). The
        common mean is subtracted because vectors behind a ReLU all lie in one corner.

        Args:
            vectors: (x [B, D], pos_row int64 [P], pos_sample int32 [P]) of every batch of training
                documents, untrained. With several processes, each passes its own batches, and those
                with a shard pass all batches.
            norm: of every row.

        Raises:
            InputError: norm is not above 0, or there is no document at all.
        """
        self._check_norm(norm)
        device = self.weight.device
        total = torch.zeros(self.shard.count, self.width, device=device)
        count = torch.zeros(self.shard.count, 1, device=device)
        mean = torch.zeros(self.width, device=device)
        counted = torch.zeros(1, dtype=torch.int64, device=device)
        for x, pos_row, pos_sample in vectors:
            row, sample = own_positives(pos_row, pos_sample, self.shard)
            total.index_add_(0, row, x.float()[sample.long()])
            count.index_add_(0, row, torch.ones(len(row), 1, device=device))
            mean += x.float().sum(0)
            counted += len(x)
        if not self.shared:
            for part in (total, count, mean, counted):
                dist.sum_(part)
        documents = int(counted)
        if documents == 0:
            raise self._no_documents()
        mean /= documents
        for start, end in blocks(self.weight):
            seen, rows = count[start:end], total[start:end]  # in place: copies add to the peak
            rows /= seen.clamp(min=1)
            rows -= mean
            rows /= rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
            rows *= norm
            fill_rows(
                self.weight,
                self.row_scale,
                start,
                torch.where(seen > 0, rows, self.rows(start, end)),
            )

    @staticmethod
    def _check_norm(norm: float) -> None:
        if not norm > 0:
            where = "norm of the first label rows"
            raise InputError(where, "a number above 0", str(norm), "correct it")

    @staticmethod
    def _no_documents() -> InputError:
        mend = "give the batches of the training split"
        return InputError("first label rows", "training documents", "none", mend)

    @torch.no_grad()
    def topk_and_loss(
        self, x: Tensor, k: int, exclude: Tensor | None, pos_row: Tensor, pos_sample: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Do what `topk` and `loss` do, without a gradient."""
        return self.topk(x, k, exclude), self.loss(x, pos_row, pos_sample)

    def step(
        self,
        x: Tensor,
        pos_row: Tensor,
        pos_sample: Tensor,
        *,
        lr: float | Tensor,
        dx_scale: Tensor | float = 1.0,
        need_loss: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Train the table on one batch.

        Args:
            x: [B, D] embeddings; a non-finite value leaves the table as it was.
            pos_row, pos_sample: the positives, as `bce_step_` takes them; a shard takes those of
                all labels, too, and cuts out its own.
            lr: learning rate of this step. The loss is a sum, so it belongs to a batch size.
            dx_scale: multiplies the returned gradient alone (a loss scaler's scale).
            need_loss: also return the loss.

        Returns:
            dx: fp32 [B, D], the gradient of the summed loss; of a shard, its summand.
            loss: fp32 [1], summed over samples and labels; [0] when not asked. Of a shard, its
                summand.
        """
        options: dict[str, Any] = {"lr": lr, "dx_scale": dx_scale, "need_loss": need_loss}
        out = self.update(x, pos_row, pos_sample, **options)
        self.after_step()
        return out

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
        """Do what `step` does but for `after_step`, which the caller does once dx is on its way."""
        pos_row, pos_sample = own_positives(pos_row, pos_sample, self.shard)
        self.hyper[LR] = lr
        self.hyper[DX_SCALE] = dx_scale
        return bce_step_(
            self.weight,
            x,
            pos_row,
            pos_sample,
            self.hyper,
            self.counter,
            bias=self.bias,
            momentum=self.momentum,
            second=self.second,
            kahan=self.kahan,
            row_scale=self.row_scale,
            row_offset=self.shard.first,
            decoupled=self.optimizer.decoupled,
            need_loss=need_loss,
            skip_below=self.skip_below,
            skipped=self.skipped,
        )
