"""The end-to-end model: an encoder and a full label table, trained together.

Source: Jain et al., "Renee" (MLSys 2023).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, TypedDict

import torch
from torch import Tensor, nn

from xmlkernels import dist
from xmlkernels.errors import InputError
from xmlkernels.models.among import best_among
from xmlkernels.models.base import Documents, Model
from xmlkernels.models.saved import table_rows
from xmlkernels.models.scored import Answer
from xmlkernels.models.training import Training, no_training
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.quantized import INT8, QuantizedHead
from xmlkernels.nn.stored_head import StoredHead
from xmlkernels.optim import set_learning_rate
from xmlkernels.records import Positive


class FullHeadConfig(TypedDict):
    """`FullHead.config`, in a checkpoint."""

    labels: Positive
    width: Positive
    dtype: str
    bias: bool


class EndToEnd(Model):
    """Encoder, label table, and the step that trains both.

    A step is embedding → head step (gradient of the embedding, table updated in place) →
    `embedding.backward` → AdamW. A non-finite embedding skips both updates, decided before the
    table is touched; a gradient that overflows in the encoder's own backward (fp16 autocast) skips
    the encoder's alone. Both are counted on the device, without a host sync.

    Args:
        encoder: any module of fp32 [B, D] with `width`, `autocast` and `encoder_config()`, called
            with `batch.inputs`. One that trains a table of its own has `update(lr)`, called after
            every backward.
        head: the label table, of the width of `_features`: the encoder's, unless a subclass changes
            it.
        training: None for prediction alone.
        modules: of a subclass, by the attributes that they become. They are trained with the
            encoder: its rate, its decay, its optimizer.
    """

    kind = "end_to_end"
    head_config = FullHeadConfig
    training_settings: Training | None

    def __init__(
        self,
        encoder: nn.Module,
        head: FullHead,
        training: Training | None = None,
        **modules: nn.Module,
    ) -> None:
        super().__init__(encoder, training)
        self.head = head
        for name, module in modules.items():
            self.add_module(name, module)
        self._beside = tuple(modules)
        if training is not None:
            trained = nn.ModuleList([encoder, *modules.values()]) if modules else encoder
            self._start_training(training, training.make_optimizer(trained))

    @property
    def labels(self) -> int:
        """L."""
        return self.head.labels

    @property
    def width(self) -> int:
        """D, the width of an embedding."""
        return self.head.weight.shape[1]

    def tables(self) -> dict[str, nn.Module]:
        """Name the label table; see `Model.tables`."""
        return {"head": self.head}

    def counters(self) -> dict[str, float]:
        """Count skipped steps and, where tiles are skipped, their share; see `Model.counters`.

        Of a shared table all processes call it together.

        The share is that of the tiles since the start, or since the run was resumed.
        """
        found = super().counters()
        if self.head.skipped is None:
            return found
        skipped = self.head.skipped.clone()
        left_out, seen = (dist.sum_(skipped) if self.shared else skipped).tolist()
        return found | {"skipped_tiles": left_out / max(1, seen)}

    def label_rows(self, start: int, end: int) -> Tensor:
        """Copy the rows of labels start to end - 1, fp32; see `Model.label_rows`.

        Of a shared table all processes call it together, and each has the rows.
        """
        if self.head.bias is not None:
            mend = "an inner product cannot carry it; train end to end without --bias"
            got = "one with a bias for each label"
            raise InputError("model", "a label table without bias", got, mend)
        if not self.shared:
            return self.head.rows(start, end)
        shard = self.head.shard
        first, last = (min(max(row - shard.first, 0), shard.count) for row in (start, end))
        return dist.gather_ragged(self.head.rows(first, last))

    def start_at_frequencies(self, positives: Tensor, documents: int) -> None:
        """Set each label's bias so that the first predictions are the labels' frequencies."""
        self.head.start_at_frequencies(positives, documents)

    def start_at_centroids(
        self, vectors: Iterable[tuple[Tensor, Tensor, Tensor]], norm: float
    ) -> None:
        """Point each label's row to the mean embedding of its documents, off the mean of all."""
        self.head.start_at_centroids(vectors, norm)

    def traffic(
        self, documents: int, processes: int, *, need_loss: bool = False, terms: int = 0
    ) -> dict[str, int]:
        """Return the bytes that the first process receives in a step; see `dist.step_traffic`.

        Args:
            documents: B, of all processes together.
            processes: G.
            need_loss: of a step that reports its loss.
            terms: of a bag-of-words encoder, those in the bags of the process that has most.
        """
        return self._step_traffic(
            documents,
            [self.width],
            processes,
            need_loss=need_loss,
            terms=terms,
            scattered=self.shared,
        )

    def step(self, batch: Documents, *, need_loss: bool = False) -> Tensor:
        """Train on one batch.

        Returns:
            The loss [1], summed over documents and labels, or [0] when not asked for.

        Raises:
            InputError: the model was built without training settings.
        """
        settings = self.training_settings
        if settings is None:
            raise no_training()
        assert self.optimizer is not None
        factor = settings.factor(self.steps)
        rates = [settings.encoder_lr] * len(self.optimizer.param_groups)
        set_learning_rate(self.optimizer, rates, factor)
        loss, overflow = self._run_passes(batch, settings.head_lr * factor, None, need_loss)
        self._finish_step(overflow, settings.encoder_lr * factor)
        return loss

    def _passes(
        self, batch: Documents, lr: float | Tensor, beta1: float | Tensor | None, need_loss: bool
    ) -> tuple[Tensor, Tensor]:
        assert self.training_settings is not None and self.scaler is not None
        encoded = self._encode(batch, self.training_settings.micro_batch)
        (x,) = encoded.x
        overflow = (~torch.isfinite(self.head.operand(x)).all()).float().reshape(1)
        dx, loss = self.head.update(
            x,
            batch.pos_row,
            batch.pos_sample,
            lr=lr,
            dx_scale=self.scaler.scale[0],
            need_loss=need_loss,
        )
        # On their way while the table finishes its step.
        back = encoded.scatter(dx) if self.shared else dx
        self.head.after_step()
        if need_loss and self.shared:
            dist.sum_(loss)
        encoded.backward([back])
        return loss, overflow

    def _answer(self, x: list[Tensor], k: int, exclude: Tensor | None) -> Answer:
        return self._merged(self.head.topk(x[-1], k, exclude), k)

    def _answer_among(self, x: list[Tensor], k: int, allowed: Tensor) -> Answer:
        own = x[-1]
        return Answer(*best_among(lambda rows: self.head.scores(own, rows), allowed, len(own), k))

    def _loss(self, x: list[Tensor], batch: Documents) -> Tensor:
        loss = self.head.loss(x[-1], batch.pos_row, batch.pos_sample)
        return dist.sum_(loss) if self.shared else loss

    def _answers_and_loss(
        self,
        x: list[Tensor],
        k: int,
        exclude: Tensor | None,
        schemes: Sequence[str],
        batch: Documents,
    ) -> tuple[dict[str, Answer], Tensor]:
        best, loss = self.head.topk_and_loss(x[-1], k, exclude, batch.pos_row, batch.pos_sample)
        answer = self._merged(best, k)
        return dict.fromkeys(self.schemes, answer), dist.sum_(loss) if self.shared else loss

    def _merged(self, best: tuple[Tensor, Tensor], k: int) -> Answer:
        return Answer(*(dist.merge_topk(*best, k) if self.shared else best))

    def config(self) -> dict[str, Any]:
        """Describe the model as JSON; see `Model.config`."""
        return {
            "kind": self.kind,
            "encoder": self.encoder.encoder_config(),  # type: ignore[operator]
            "head": self.head.config,
        }

    @classmethod
    def table_shapes(cls, head: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Name the label table, with its shape; see `Model.table_shapes`."""
        return {"head.weight": (head["labels"], head["width"])}

    @classmethod
    def restore(
        cls, config: Mapping[str, Any], encoder: nn.Module, tensors: Mapping[str, Tensor]
    ) -> Self:
        """Build the model that a `config()` describes, for prediction; see `Model.restore`."""
        rows = table_rows(tensors, "head")
        if rows:
            return cls(encoder, StoredHead(**config["head"], store=rows))
        if config["head"]["dtype"] == INT8:
            return cls(encoder, QuantizedHead(**config["head"]))
        return cls(encoder, FullHead(**config["head"], std=0))

    def _optimized(self) -> Iterable[tuple[str, nn.Parameter]]:
        # A checkpoint of the plain model names the encoder's parameters without its attribute.
        return self.named_parameters() if self._beside else self.encoder.named_parameters()
