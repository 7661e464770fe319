"""How a cascade is trained: its settings, and the optimizer of what is not a table."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from xmlkernels.errors import InputError
from xmlkernels.models.running_mean import MeanSettings
from xmlkernels.optim import encoder_optimizer, three_phase, warmup_cosine

SCHEDULES = ("three_phase", "warmup_cosine")


@dataclass(frozen=True)
class CascadeTraining:
    """How encoder and heads are trained. The loss of a level is a mean over its candidates, times
    its weight.

    Attributes:
        encoder_lr: peak rate of the encoder.
        total: updates of the whole run.
        warmup: updates until the peak.
        head_lr: peak rate of tables and linear layer; None: ten times the encoder's.
        decay: AdamW's, on the encoder's matrices.
        head_decay: of the linear layer's weight and, decoupled, of the table rows that a step
            touches; None: a tenth of decay.
        schedule: "three_phase" (with its cycle of beta1) or "warmup_cosine".
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
    """

    encoder_lr: float
    total: int
    warmup: int = 0
    head_lr: float | None = None
    decay: float = 0.0
    head_decay: float | None = None
    schedule: str = "three_phase"
    cooldown: int | None = None
    rw_loss: Sequence[float] = ()
    positives_bound: int = 32
    micro_batch: int = 0
    clip: float = 0.0
    mean: MeanSettings = MeanSettings()
    reference_loss: bool = False
    encoder_epsilon: float = 1e-8

    def rates(self, step: int) -> tuple[float, float, float | None]:
        """Rates of encoder and heads in an update, and beta1 (None: as it is)."""
        head = 10 * self.encoder_lr if self.head_lr is None else self.head_lr
        beta1: float | None = None
        if self.schedule == "three_phase":
            factor, beta1 = three_phase(
                step,
                self.warmup,
                self.total,
                self.total // 5 if self.cooldown is None else self.cooldown,
            )
        else:
            factor = warmup_cosine(step, self.warmup, self.total)
        return self.encoder_lr * factor, head * factor, beta1

    def table_decay(self) -> float:
        """Decay of the heads."""
        return self.decay / 10 if self.head_decay is None else self.head_decay

    def check(self, levels: int) -> None:
        """Whether the settings fit a cascade of R levels.

        Raises:
            InputError: one does not.
        """
        if self.schedule not in SCHEDULES:
            raise InputError(
                "schedule",
                f"one of {', '.join(SCHEDULES)}",
                repr(self.schedule),
                "choose one of them",
            )
        if self.rw_loss and len(self.rw_loss) != levels:
            got = f"{len(self.rw_loss)}"
            raise InputError(
                "rw_loss",
                f"{levels} weights, one for each level",
                got,
                "name them all, coarsest first, or none",
            )
        for name, value in (
            ("positives_bound", self.positives_bound),
            ("micro_batch", self.micro_batch),
            ("clip", self.clip),
        ):
            if value < 0:
                raise InputError(name, "0 or more", str(value), "correct it")
        self.rates(0)

    def weights(self, levels: int) -> tuple[float, ...]:
        """rw_loss of every level."""
        return tuple(float(w) for w in self.rw_loss) or (1.0,) * levels


def cascade_optimizer(
    encoder: nn.Module, linear: nn.Module, settings: CascadeTraining
) -> torch.optim.AdamW | None:
    """AdamW over the encoder (two groups) and the heads' linear layers (two groups); None when
    neither has parameters.
    """
    groups: list[dict[str, object]] = []
    decay = settings.table_decay()
    weights = [p for name, p in linear.named_parameters() if not name.endswith("bias")]
    biases = [p for name, p in linear.named_parameters() if name.endswith("bias")]
    if weights:
        groups = [
            {"params": weights, "weight_decay": decay},
            {"params": biases, "weight_decay": 0.0},
        ]
    if any(p.requires_grad for p in encoder.parameters()):
        optimizer = encoder_optimizer(
            encoder, settings.encoder_lr, settings.decay, eps=settings.encoder_epsilon
        )
        for group in optimizer.param_groups:
            group["head"] = False
        for group in groups:
            optimizer.add_param_group(group | {"head": True})
        return optimizer
    if not groups:
        return None
    # Fused, as `encoder_optimizer` makes it: the decision to skip is then taken on the device.
    linear_groups = [group | {"head": True} for group in groups]
    return torch.optim.AdamW(
        linear_groups, lr=settings.encoder_lr, eps=settings.encoder_epsilon, fused=True
    )


def set_rates(
    optimizer: torch.optim.Optimizer, encoder_lr: float, head_lr: float, beta1: float | None
) -> None:
    """Rates, and beta1 where it is given, of the groups of `cascade_optimizer`."""
    for group in optimizer.param_groups:
        group["lr"] = head_lr if group["head"] else encoder_lr
        if beta1 is not None:
            group["betas"] = (beta1, group["betas"][1])
