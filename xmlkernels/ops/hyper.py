"""The numbers that steer one step of an optimizer, by name."""

from typing import NamedTuple

import torch
from torch import Tensor


class Hyper(NamedTuple):
    """Hyperparameters of one step; `tensor` makes the `hyper` argument of the ops that update.

    The tensor stays on the table's device from step to step, so that neither a schedule nor a loss
    scale costs a wait: write to it in place, by the index constants of this module
    (`hyper[LR] = 0.01`).

    Attributes:
        lr: learning rate.
        decay: weight decay; L2, or decoupled where the op is asked for that.
        beta1: momentum of SGD, or Adam's decay rate of the first moment.
        beta2: Adam's decay rate of the second moment.
        epsilon: added to the root of the second moment; above 0 for Adam and Adagrad.
        scale: multiplies the gradient and the loss, for example 1 / batch size for a mean.
        dx_scale: multiplies the gradient of the input alone: the loss scale of half precision.
    """

    lr: float
    decay: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.999
    epsilon: float = 1e-8
    scale: float = 1.0
    dx_scale: float = 1.0

    def tensor(self, device: torch.device | str | None = None) -> Tensor:
        """Return the values as fp32 [7] on a device."""
        return torch.tensor(self, dtype=torch.float32, device=device)


LR, DECAY, BETA1, BETA2, EPSILON, SCALE, DX_SCALE = range(len(Hyper._fields))
