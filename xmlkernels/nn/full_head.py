"""The full head: one table row per label, all of them scored and trained at every step."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from xmlkernels import dist
from xmlkernels.errors import InputError
from xmlkernels.nn.encoder import default_autocast
from xmlkernels.nn.table import DTYPES, TABLE_DTYPES, blocks, fill_rows, new_table, normal, rows_of
from xmlkernels.ops import bce_loss, bce_step_, matmul_topk, rescale_rows_


def default_table_dtype(device: torch.device) -> str:
    """bf16 where the device multiplies it natively (what `default_autocast` finds for the encoder),
    else fp32.
    """
    return "bf16" if default_autocast(device) == torch.bfloat16 else "fp32"


class FullHead(nn.Module):
    """Label table, its optimizer's state, and the step that trains both in place (Renee, MLSys
    2023, sections 3 and 4).

    Nothing here requires a gradient or stands in a torch optimizer: `step` is the whole of its
        training.

    Attributes:
        config: what prediction needs to build it again: FullHead(**config, std=0).
        row_scale: fp32 [L, 2] of an fp8 table, as `bce_step_` takes it; else None.
        rescaled: int64 [1] of an fp8 table: how often a row has outgrown its scale; else None.
        skipped: int64 [2] with `skip_units`: groups of labels skipped and seen since it was built;
            else None.

    Args:
        labels: L.
        width: D, of the embedding.
        dtype: of the table; "fp32", "bf16", "fp16" or "fp8" (e4m3 with a power-of-two scale per
            row).
        bias: one fp32 bias per label (off in Renee).
        optimizer: "sgd" (Renee) or "adam".
        momentum: SGD momentum; 0 keeps no state. Adam's beta1 is `betas[0]`.
        betas, epsilon: Adam's.
        state_dtype: of the optimizer's state; below fp32 it rounds stochastically.
        decay: weight decay of the table; L2 in the gradient, or decoupled.
        kahan: keep what rounding leaves over (bf16 and fp16 tables).
        skip_units: above 0, groups of labels without positives whose weights a step would change by
            less than so many units are skipped (`bce_step_`, Skipping); a unit is the spacing of
            the table's format at 2^-6 (bf16 2^-13, fp16 2^-16, fp8 2^-9, fp32 2^-29). Of stochastic
            rounding, a change of 0.01 units moves one weight in a hundred.
        std: standard deviation of the initial N(0, std²); 0 for a table that is filled from a
            checkpoint.
        seed: of the initial table and of the stochastic rounding.
    """

    weight: Tensor
    bias: Tensor | None
    momentum: Tensor | None
    second: Tensor | None
    kahan: Tensor | None
    row_scale: Tensor | None
    rescaled: Tensor | None
    skipped: Tensor | None
    hyper: Tensor
    counter: Tensor

    def __init__(
        self,
        labels: int,
        width: int,
        *,
        dtype: str = "fp32",
        bias: bool = False,
        optimizer: str = "sgd",
        momentum: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        state_dtype: str = "fp32",
        decay: float = 0.0,
        decoupled: bool = False,
        kahan: bool = False,
        skip_units: float = 0.0,
        std: float = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("dtype", dtype, TABLE_DTYPES),
            ("state_dtype", state_dtype, DTYPES),
        ):
            if value not in known:
                raise InputError(
                    f"label table: {name}",
                    f"one of {', '.join(known)}",
                    repr(value),
                    "choose one of them",
                )
        if kahan and dtype == "fp8":
            raise InputError(
                "label table: kahan",
                "False for fp8",
                "True",
                "leave it out: fp8 stores round stochastically",
            )
        if optimizer not in ("sgd", "adam"):
            raise InputError(
                "label table: optimizer", "sgd or adam", repr(optimizer), "choose one of the two"
            )
        adam = optimizer == "adam"
        shape = (labels, width)
        self.decoupled = decoupled
        self.config = {"labels": labels, "width": width, "dtype": dtype, "bias": bias}
        weight, row_scale = new_table(labels, width, TABLE_DTYPES[dtype], seed, normal(std))
        self.register_buffer("weight", weight)
        self.register_buffer("row_scale", row_scale)
        self.register_buffer(
            "rescaled", None if row_scale is None else torch.zeros(1, dtype=torch.int64)
        )
        self.register_buffer("bias", torch.zeros(labels) if bias else None)
        state = DTYPES[state_dtype]
        self.register_buffer(
            "momentum", torch.zeros(shape, dtype=state) if adam or momentum > 0 else None
        )
        self.register_buffer("second", torch.zeros(shape, dtype=state) if adam else None)
        self.register_buffer(
            "kahan", torch.zeros_like(weight) if kahan and dtype != "fp32" else None
        )
        self.skip_below = skip_units * 2.0**-6 * torch.finfo(weight.dtype).eps
        self.register_buffer(
            "skipped",
            torch.zeros(2, dtype=torch.int64) if skip_units > 0 else None,
            persistent=False,
        )
        first = betas[0] if adam else momentum
        self.register_buffer(
            "hyper",
            torch.tensor([0.0, decay, first, betas[1], epsilon, 1.0, 1.0]),
            persistent=False,
        )
        self.register_buffer("counter", torch.tensor([seed, 0]))

    @property
    def labels(self) -> int:
        return self.weight.shape[0]

    @torch.no_grad()
    def start_at_frequencies(self, positives: Tensor, documents: int) -> None:
        """Puts each bias at the logit of its label's frequency, before training (Lin et al., ICCV
        2017, section 3.3).

        From biases of 0 all rows first learn, together, that labels are rare: steps that are lost,
        and gradients so large that Adam's second moment holds its steps down for hundreds of
        batches after them.

        Args:
            positives: [L], number of training documents of each label; half a document is added.
            documents: number of training documents.

        Raises:
            InputError: the table has no bias, or not one number for each label.
        """
        if self.bias is None:
            raise InputError("label table", "a bias", "none", "build it with bias=True")
        if positives.shape != (self.labels,):
            got = str(list(positives.shape))
            raise InputError(
                "positives",
                f"{self.labels} numbers, one for each label",
                got,
                "count this dataset's labels",
            )
        share = (positives.double() + 0.5) / (documents + 1)
        self.bias.copy_(torch.logit(share))

    @torch.no_grad()
    def start_at_centroids(
        self, vectors: Iterable[tuple[Tensor, Tensor, Tensor]], norm: float
    ) -> None:
        """Points each row from the mean of all documents to the mean of its label's, before
        training.

        A label of two or three documents then begins as a nearest-centroid classifier, where a
        random row would see them too seldom ("imprinting": Qi, Brown, Lowe, CVPR 2018, section 3.2;
        the common mean is taken off because vectors behind a ReLU all lie in one corner). Rows
        without a document stay as drawn. Takes one fp32 table of [L, D] for the moment.

        Args:
            vectors: (x [B, D], pos_row int64 [P], pos_sample int32 [P]) of every batch of training
                documents, untrained; of several processes each gives batches of its own.
            norm: of every row.

        Raises:
            InputError: norm is not above 0, or there is no document at all.
        """
        if not norm > 0:
            raise InputError(
                "norm of the first label rows", "a number above 0", str(norm), "correct it"
            )
        total = torch.zeros(self.labels, self.weight.shape[1], device=self.weight.device)
        count = torch.zeros(self.labels, 1, device=self.weight.device)
        mean, counted = (
            torch.zeros_like(total[0]),
            torch.zeros(1, dtype=torch.int64, device=total.device),
        )
        for x, row, sample in vectors:
            total.index_add_(0, row, x.float()[sample.long()])
            count.index_add_(0, row, torch.ones(len(row), 1, device=count.device))
            mean += x.float().sum(0)
            counted += len(x)
        for part in (total, count, mean, counted):
            dist.sum_(part)
        documents = int(counted)
        if documents == 0:
            raise InputError(
                "first label rows",
                "training documents",
                "none",
                "give the batches of the training split",
            )
        mean /= documents
        for start, end in blocks(self.weight):
            seen = count[start:end]
            rows = norm * nn.functional.normalize(total[start:end] / seen.clamp(min=1) - mean)
            fill_rows(
                self.weight,
                self.row_scale,
                start,
                torch.where(seen > 0, rows, self.rows(start, end)),
            )

    @torch.no_grad()
    def step(
        self,
        x: Tensor,
        pos_row: Tensor,
        pos_sample: Tensor,
        *,
        lr: float,
        dx_scale: Tensor | float = 1.0,
        need_loss: bool,
    ) -> tuple[Tensor, Tensor]:
        """Trains the table on one batch.

        Args:
            x: [B, D] embeddings; a non-finite value leaves the table as it was.
            pos_row, pos_sample: the positives, as `bce_step_` takes them.
            lr: learning rate of this step; the loss is a sum, so it belongs to a batch size.
            dx_scale: multiplies the returned gradient alone (a loss scaler's scale).
            need_loss: whether to return the loss.

        Returns:
            dx: fp32 [B, D], the gradient of the summed loss.
            loss: fp32 [1], summed over samples and labels, or [0].
        """
        self.hyper[0] = lr
        self.hyper[6] = dx_scale
        out = bce_step_(
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
            decoupled=self.decoupled,
            need_loss=need_loss,
            skip_below=self.skip_below,
            skipped=self.skipped,
        )
        if self.row_scale is not None and self.rescaled is not None:
            # After every step, so that no state of ours decides when: it reads eight bytes a row
            # unless a row has grown.
            self.rescaled += rescale_rows_(self.weight, self.row_scale, self.counter)
        self.counter[1] += 1
        return out

    def loss(self, x: Tensor, pos_row: Tensor, pos_sample: Tensor) -> Tensor:
        """Summed loss [1] without training; differentiable in x."""
        return bce_loss(x, self.weight, self.bias, pos_row, pos_sample, row_scale=self.row_scale)

    def rows(self, start: int, end: int) -> Tensor:
        """Table rows start:end in fp32 [end - start, D], a copy."""
        return rows_of(self.weight, self.row_scale, start, end)

    @torch.no_grad()
    def topk(self, x: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits fp32 [B, k] and labels int64 [B, k] of the k best labels, best first; see
        `matmul_topk`.
        """
        return matmul_topk(x, self.weight, self.bias, k, exclude=exclude, row_scale=self.row_scale)
