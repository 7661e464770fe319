"""The end-to-end model: encoder and full label table, trained together in one step (Renee, MLSys
2023).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xmlkernels.checkpoint import load_optimizer_tensors, optimizer_tensors
from xmlkernels.models.base import Documents, check_tensors
from xmlkernels.models.gradient_caching import EncoderPass
from xmlkernels.models.running_mean import (
    PREFIX,
    MeanSettings,
    RunningMean,
    averaged,
    begun,
    check_means,
    evaluating,
    for_prediction,
)
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.table import without_states
from xmlkernels.optim import (
    LossScaler,
    encoder_optimizer,
    scaled_step,
    set_learning_rate,
    warmup_cosine,
)


@dataclass(frozen=True)
class Training:
    """How both parts are trained.

    Attributes:
        encoder_lr, head_lr: peak learning rates. The loss is a sum over the batch, so head_lr
            belongs to a batch size.
        encoder_decay: AdamW's, on matrices alone.
        warmup, total: steps of the linear warm-up, and of the whole run; the cosine ends at
            `total`.
        clip: largest norm of the encoder's gradient; 0 is off.
        micro_batch: documents per encoder pass (gradient caching); 0 passes the whole batch at
            once.
        mean: the running mean of the encoder, and of the label table where it says so.
        encoder_epsilon: of its AdamW.
    """

    encoder_lr: float
    head_lr: float
    encoder_decay: float
    warmup: int
    total: int
    clip: float = 0.0
    micro_batch: int = 0
    mean: MeanSettings = MeanSettings()
    encoder_epsilon: float = 1e-6


class EndToEnd(nn.Module):
    """Encoder, label table, and the step that trains both.

    A step is embedding → head step (gradient of the embedding, table updated in place) →
    `embedding.backward` → AdamW. A non-finite embedding skips both updates, decided before the
    table is touched; a gradient that overflows in the encoder's own backward (fp16 autocast) skips
    the encoder's alone. Both are counted on the device, without a host sync.

    Args:
        encoder: any module of fp32 [B, D] with `width`, `autocast` and `encoder_config()`, called
            with `batch.inputs`. One that trains a table of its own has `update(lr)`, called after
            every backward.
    """

    sums_loss = True
    skipped_steps: Tensor
    skipped_encoder_steps: Tensor

    def __init__(
        self, encoder: nn.Module, head: FullHead, training: Training | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.training_settings = encoder, head, training
        self.steps = 0
        self.average: RunningMean | None = None
        self.register_buffer("skipped_steps", torch.zeros(1))
        self.register_buffer("skipped_encoder_steps", torch.zeros(1))
        if training is not None:
            rate, decay, epsilon = (
                training.encoder_lr,
                training.encoder_decay,
                training.encoder_epsilon,
            )
            self.optimizer = encoder_optimizer(encoder, rate, decay, eps=epsilon)
            device = head.weight.device
            # Only fp16 needs a scale; elsewhere it stays 1 and the scaler is the check for
            # non-finite gradients.
            half = encoder.autocast == torch.float16
            self.scaler = (
                LossScaler(device)
                if half
                else LossScaler(device, init_scale=1.0, growth=1.0, backoff=1.0)
            )
            self.average = begun(encoder, self._averaged(), training.mean)

    def _averaged(self) -> dict[str, Tensor]:
        settings = self.training_settings
        return averaged(
            self, {"head": self.head} if settings is not None and settings.mean.tables else {}
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EndToEnd":
        # `.to(device)` must take the loss scaler and the mean weights along; they are no modules.
        super()._apply(fn, recurse)
        if self.training_settings is not None:
            self.scaler.move(fn)
        if self.average is not None:
            self.average.follow(self._averaged())
        return self

    @property
    def labels(self) -> int:
        return self.head.labels

    @property
    def width(self) -> int:
        return self.head.weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def config(self) -> dict[str, Any]:
        """What prediction needs to build the model again; see `restored`."""
        return {
            "kind": "end_to_end",
            "encoder": self.encoder.encoder_config(),  # type: ignore[operator]
            "head": self.head.config,
        }

    def step(self, batch: Documents, *, need_loss: bool = False) -> Tensor:
        """Trains on one batch.

        Returns:
            The loss [1], summed over documents and labels, or [0] when not asked.
        """
        settings = self.training_settings
        assert settings is not None, "this model was built without training settings"
        factor = warmup_cosine(self.steps, settings.warmup, settings.total)
        set_learning_rate(
            self.optimizer, [settings.encoder_lr] * len(self.optimizer.param_groups), factor
        )
        self.optimizer.zero_grad(set_to_none=True)

        held = EncoderPass(
            lambda *inputs: [self.encoder(*inputs)], batch.inputs, len(batch), settings.micro_batch
        )
        (x,) = held.x
        overflow = (~torch.isfinite(x).all()).float().reshape(1)
        dx, loss = self.head.step(
            x,
            batch.pos_row,
            batch.pos_sample,
            lr=settings.head_lr * factor,
            dx_scale=self.scaler.scale[0],
            need_loss=need_loss,
        )
        held.backward([dx])
        self.skipped_encoder_steps += scaled_step(
            self.optimizer, self.scaler, overflow, clip=settings.clip
        )
        self.skipped_steps += overflow
        if update := getattr(self.encoder, "update", None):
            update(settings.encoder_lr * factor)
        if self.average is not None:
            self.average.step(self.steps)
        self.steps += 1
        return loss

    def tensors(self) -> dict[str, Tensor]:
        """Everything that must survive a stop, by name: weights, optimizer states, counters, loss
        scale, mean weights.
        """
        out = {name: value.detach() for name, value in self.state_dict().items()}
        if self.training_settings is not None:
            out |= {
                f"optimizer.{k}": v
                for k, v in optimizer_tensors(
                    self.optimizer, self.encoder.named_parameters()
                ).items()
            }
            out |= {f"scaler.{name}": value for name, value in self.scaler.tensors().items()}
        if self.average is not None:
            out |= self.average.tensors()
        return out

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `tensors` gave; a model without training takes the share that prediction
        needs (where there are mean weights, those).

        Raises:
            InputError: a name is missing or left over, or a shape differs.
        """
        optimizer, scaler, means = (
            _without_prefix(tensors, prefix) for prefix in ("optimizer.", "scaler.", PREFIX)
        )
        rest = {
            k: v for k, v in tensors.items() if not k.startswith(("optimizer.", "scaler.", PREFIX))
        }
        if self.training_settings is None:
            rest = for_prediction(rest, means)
            rest = without_states(rest, self.state_dict())
        check_tensors(self.state_dict(), rest)
        if self.training_settings is not None:
            check_means(self.average, means)
        self.load_state_dict(rest)
        self.steps = int(self.head.counter[1])
        if self.training_settings is not None:
            load_optimizer_tensors(self.optimizer, self.encoder.named_parameters(), optimizer)
            self.scaler.load_tensors(scaler)
        if self.average is not None:
            self.average.load_tensors(means)

    @evaluating
    def embed(self, batch: Documents) -> Tensor:
        """fp32 [B, D]: what the label table meets of each document."""
        return self.encoder(*batch.inputs)

    @evaluating
    def predict(
        self, batch: Documents, k: int, exclude: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits fp32 [B, k] and labels int64 [B, k] of the k best labels of each document, best
        first.
        """
        return self.head.topk(self.encoder(*batch.inputs), k, exclude)

    @evaluating
    def predict_and_embed(
        self, batch: Documents, k: int, exclude: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`predict` and `embed` for one pass of the encoder."""
        x = self.encoder(*batch.inputs)
        return *self.head.topk(x, k, exclude), x

    @evaluating
    def predict_and_loss(
        self, batch: Documents, k: int, exclude: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`predict` and `loss` for one pass of the encoder."""
        x = self.encoder(*batch.inputs)
        values, labels = self.head.topk(x, k, exclude)
        return values, labels, self.head.loss(x, batch.pos_row, batch.pos_sample)

    @evaluating
    def loss(self, batch: Documents) -> Tensor:
        """Summed loss [1] of a batch, without training."""
        return self.head.loss(self.encoder(*batch.inputs), batch.pos_row, batch.pos_sample)


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
