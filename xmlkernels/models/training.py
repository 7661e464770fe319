"""How the models are trained: settings, learning rates, and the optimizer of what is no table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from xmlkernels.errors import InputError
from xmlkernels.models.running_mean import MeanSettings
from xmlkernels.optim import encoder_optimizer, parameter_groups, three_phase, warmup_cosine

SCHEDULES = ("three_phase", "warmup_cosine")

Schedule = Callable[[int], float]
"""Factor of every learning rate in step 0, 1, …"""

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""An optimizer of these parameter groups, each with `params` and `weight_decay`; the model sets
`lr` of every group in every step. State of the optimizer must be tensors, for it is saved."""


class TrainingSettings(Protocol):
    """What the settings of every kind of training have in common."""

    @property
    def clip(self) -> float:
        """Largest norm of the gradient; 0 is off."""

    @property
    def micro_batch(self) -> int:
        """Documents per encoder pass; 0 passes the whole batch at once."""

    @property
    def mean(self) -> MeanSettings:
        """Settings of the running mean of the weights."""

    def rates(self, step: int) -> tuple[float, float, float | None]:
        """Rates of encoder and tables in an update, and beta1 (None: as it is)."""


@dataclass(frozen=True)
class Training:
    """How the encoder and a full label table are trained (`EndToEnd`).

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
        schedule: factor of both rates in each step; None: `warmup_cosine`.
        optimizer: makes the encoder's optimizer in place of AdamW; `encoder_epsilon` is AdamW's
            alone.
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
    schedule: Schedule | None = None
    optimizer: MakeOptimizer | None = None

    def factor(self, step: int) -> float:
        """Factor of both learning rates in a step, from 0."""
        if self.schedule is not None:
            return self.schedule(step)
        return warmup_cosine(step, self.warmup, self.total)

    def rates(self, step: int) -> tuple[float, float, None]:
        """Rates of encoder and table in an update, and None: beta1 stays as it is."""
        factor = self.factor(step)
        return self.encoder_lr * factor, self.head_lr * factor, None

    def make_optimizer(self, encoder: nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer of the encoder.

        Raises:
            InputError: the encoder has nothing to train.
        """
        if self.optimizer is not None:
            return self.optimizer(parameter_groups(encoder, self.encoder_decay))
        return encoder_optimizer(
            encoder, self.encoder_lr, self.encoder_decay, eps=self.encoder_epsilon
        )


@dataclass(frozen=True)
class CascadeTraining:
    """How encoder and heads of a cascade are trained.

    The loss of a level is a mean over its candidates, times its weight.

    Attributes:
        encoder_lr: peak rate of the encoder.
        total: updates of the whole run.
        warmup: updates until the peak.
        head_lr: peak rate of tables and linear layer; None: ten times the encoder's.
        decay: AdamW's, on the encoder's matrices.
        head_decay: of the linear layer's weight and, decoupled, of the table rows that a step
            touches; None: a tenth of decay.
        schedule: "three_phase" (with its cycle of beta1), "warmup_cosine", or a function that gives
            the factor of every rate in each step and leaves beta1 as it is.
        cooldown: updates of the last phase; None: a fifth of `total`, the 3 of 15 epochs of
            CascadeXML.
        rw_loss: weight of each level's loss; empty: 1 everywhere.
        positives_bound: how many clusters beyond k a document with more than k positive ones may
            keep; those beyond that are lost for the step and counted in `Cascade.lost_positives`.
        micro_batch: documents per encoder pass (gradient caching); 0 passes the whole batch at
            once. An update, and so a step of the schedule, is always one batch.
        clip: largest norm of the gradient of encoder and linear layer; 0 is off.
        mean: the running mean of encoder and linear layers, and of the tables where it says so.
        reference_loss: count pads in the mean as CascadeXML's code does, for comparisons.
        encoder_epsilon: of the AdamW of encoder and linear layer. A mean over thousands of
            candidates makes the encoder's gradients about 1e-6, where the 1e-6 of
            `encoder_optimizer`, meant for sums, would damp them.
        optimizer: makes the optimizer of encoder and linear layer in place of AdamW;
            `encoder_epsilon` is AdamW's alone, and beta1 is set where a group has `betas`.
    """

    encoder_lr: float
    total: int
    warmup: int = 0
    head_lr: float | None = None
    decay: float = 0.0
    head_decay: float | None = None
    schedule: str | Schedule = "three_phase"
    cooldown: int | None = None
    rw_loss: Sequence[float] = ()
    positives_bound: int = 32
    micro_batch: int = 0
    clip: float = 0.0
    mean: MeanSettings = MeanSettings()
    reference_loss: bool = False
    encoder_epsilon: float = 1e-8
    optimizer: MakeOptimizer | None = None

    def rates(self, step: int) -> tuple[float, float, float | None]:
        """Rates of encoder and heads in an update, and beta1 (None: as it is)."""
        head = 10 * self.encoder_lr if self.head_lr is None else self.head_lr
        beta1: float | None = None
        if not isinstance(self.schedule, str):
            factor = self.schedule(step)
        elif self.schedule == "three_phase":
            cooldown = self.total // 5 if self.cooldown is None else self.cooldown
            factor, beta1 = three_phase(step, self.warmup, self.total, cooldown)
        else:
            factor = warmup_cosine(step, self.warmup, self.total)
        return self.encoder_lr * factor, head * factor, beta1

    def table_decay(self) -> float:
        """Decay of the heads."""
        return self.decay / 10 if self.head_decay is None else self.head_decay

    def check(self, levels: int) -> None:
        """Check that the settings fit a cascade of R levels.

        Raises:
            InputError: one does not.
        """
        if isinstance(self.schedule, str) and self.schedule not in SCHEDULES:
            expected = f"one of {', '.join(SCHEDULES)}, or a function of the step"
            raise InputError("schedule", expected, repr(self.schedule), "choose one of them")
        if self.rw_loss and len(self.rw_loss) != levels:
            mend = "name them all, coarsest first, or none"
            expected = f"{levels} weights, one per level"
            raise InputError("rw_loss", expected, str(len(self.rw_loss)), mend)
        for name in ("positives_bound", "micro_batch", "clip"):
            if (value := getattr(self, name)) < 0:
                raise InputError(name, "0 or more", str(value), "correct it")
        self.rates(0)

    def weights(self, levels: int) -> tuple[float, ...]:
        """rw_loss of every level."""
        return tuple(float(w) for w in self.rw_loss) or (1.0,) * levels

    def make_optimizer(self, encoder: nn.Module, linear: nn.Module) -> torch.optim.Optimizer | None:
        """Make the optimizer of the encoder (two groups) and of the heads' linear layers (two).

        Groups of the linear layers have `head` set, for their own rate.

        Returns:
            None when there is nothing to train.
        """
        heads: list[dict[str, Any]] = []
        weights = [p for name, p in linear.named_parameters() if not name.endswith("bias")]
        biases = [p for name, p in linear.named_parameters() if name.endswith("bias")]
        if weights:
            heads = [
                {"params": weights, "weight_decay": self.table_decay(), "head": True},
                {"params": biases, "weight_decay": 0.0, "head": True},
            ]
        trained = any(p.requires_grad for p in encoder.parameters())
        if not trained and not heads:
            return None
        if self.optimizer is not None:
            own = parameter_groups(encoder, self.decay) if trained else []
            return self.optimizer([group | {"head": False} for group in own] + heads)
        if trained:
            optimizer = encoder_optimizer(
                encoder, self.encoder_lr, self.decay, eps=self.encoder_epsilon
            )
            for group in optimizer.param_groups:
                group["head"] = False
            for group in heads:
                optimizer.add_param_group(group)
            return optimizer
        # Fused, as `encoder_optimizer` makes it: the decision to skip is taken on the device.
        return torch.optim.AdamW(heads, lr=self.encoder_lr, eps=self.encoder_epsilon, fused=True)


def decision_bytes(clip: float) -> int:
    """Bytes that are summed for the decisions of a step with an encoder in parts.

    They are whether all gradients are finite and, with `clip`, their norm (`optim.scaled_step`).
    """
    return 8 if clip > 0 else 4


def no_training() -> InputError:
    """Make the error of a model that is to train without settings for it."""
    got, mend = "one for prediction alone", "pass its training settings when it is built"
    return InputError("model", "a model built for training", got, mend)


def set_rates(
    optimizer: torch.optim.Optimizer, encoder_lr: float, head_lr: float, beta1: float | None
) -> None:
    """Set rates, and beta1 where it is given, in the groups of `CascadeTraining.make_optimizer`."""
    for group in optimizer.param_groups:
        group["lr"] = head_lr if group["head"] else encoder_lr
        if beta1 is not None and "betas" in group:
            group["betas"] = (beta1, group["betas"][1])
