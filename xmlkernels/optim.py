"""The encoder's optimizer, schedules, gradient clipping and loss scaler.

None waits for the device.

Sources: AdamW (Loshchilov & Hutter, ICLR 2019); dynamic loss scaling (Micikevicius et al., ICLR
    2018, §3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from xmlkernels import dist
from xmlkernels.errors import InputError

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def _is_norm(module: nn.Module) -> bool:
    # transformers writes many norms as plain modules (T5LayerNorm, LlamaRMSNorm): their class says
    # what they are, while attribute names differ from model to model (LayerNorm, sa_layer_norm,
    # norm1).
    return isinstance(module, _NORMS) or any(
        c.__name__.endswith(("LayerNorm", "RMSNorm")) for c in type(module).mro()
    )


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters of `module` into what decays and what does not.

    Two groups, in the order of `module.named_parameters()`: first those that decay, then biases and
    every parameter of a normalisation layer, which do not. Norms are known by the type of their
    module, not by the parameter's name: by name Renee decays DistilBERT's `sa_layer_norm`. Of a
    sharded parameter they have this process's rows.

    Raises:
        InputError: nothing to train.
    """
    in_norm = {id(p) for m in module.modules() if _is_norm(m) for p in m.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():  # a shared parameter comes once
        if parameter.requires_grad:
            stays = id(parameter) in in_norm or name.endswith("bias")
            (plain if stays else decayed).append(dist.own_parameter(parameter))
    if not decayed and not plain:
        raise InputError(
            "encoder_optimizer", "at least one trainable parameter", "none", "unfreeze a part of it"
        )
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def encoder_optimizer(
    module: nn.Module,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
) -> torch.optim.AdamW:
    """AdamW over the `parameter_groups` of `module`, fused where torch has it (CPU and CUDA).

    Raises:
        InputError: nothing to train, or a rate, decay, beta or eps out of range.
    """
    if lr < 0 or weight_decay < 0 or eps <= 0 or not all(0 <= b < 1 for b in betas):
        got = f"lr {lr}, weight_decay {weight_decay}, betas {betas}, eps {eps}"
        expected = "lr and weight_decay ≥ 0, eps > 0, betas in [0, 1)"
        raise InputError("encoder_optimizer", expected, got, "correct it")
    groups = parameter_groups(module, weight_decay)
    try:
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    except RuntimeError:  # no fused kernel for this device or dtype
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)


def step_unless(optimizer: torch.optim.Optimizer, found_inf: torch.Tensor) -> None:
    """Call `optimizer.step()`, which found_inf = 1 turns into a step without effect.

    Parameters, moments and step counters are then bit for bit unchanged.

    Args:
        optimizer: if fused, the decision is taken inside its kernel; otherwise `found_inf` is read
            on the host.
        found_inf: fp32, one element, 0 or 1.
    """
    if not all(group.get("fused") for group in optimizer.param_groups):
        if not found_inf.item():
            optimizer.step()
        return
    optimizer.found_inf = found_inf.reshape(())  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor of the learning rate in step 0, 1, …, total − 1: linear warm-up, then cosine to 0.

    The warm-up is (step + 1)/warmup, where the Hugging Face helper (and so Renee) has step/warmup:
    that first step has rate 0, costs a whole step and moves nothing but the moments. From `warmup`
    on both are equal: (1 + cos(π·(step − warmup)/(total − warmup)))/2, and 0 from `total` on. A
    warm-up beyond `total` never peaks.

    Raises:
        InputError: a negative step or warm-up, or total < 1.
    """
    if step < 0 or warmup < 0 or total < 1:
        got = f"step {step}, warmup {warmup}, total {total}"
        raise InputError("schedule", "step ≥ 0, warmup ≥ 0 and total ≥ 1", got, "correct it")
    if step >= total:
        return 0.0
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def three_phase(step: int, warmup: int, total: int, cooldown: int) -> tuple[float, float]:
    """Return the factor of the rate, and beta1, in a step: one-cycle with a plateau.

    Steps are 0, 1, …, total − 1.

    Phase 1 rises by a cosine from 1/10 to 1 and ends in step warmup − 1; phase 2 stays at 1 until
    step total − cooldown − 2; phase 3 falls by a cosine to 1/1000 in step total − 1, where it
    stays. beta1 runs against it: 0.95 → 0.85, 0.85, 0.85 → 0.95. Sources: Smith (2018), 1803.09820;
    the phases are CascadeXML's (NeurIPS 2022).

    Args:
        step: updates done so far, not batches: with gradient accumulation several batches make one.
        warmup, total, cooldown: steps; a cooldown that reaches into the warm-up begins where that
            ends.

    Raises:
        InputError: a negative step, warm-up or cooldown, total < 1, or a warm-up beyond `total`.
    """
    if min(step, warmup, cooldown) < 0 or total < 1 or warmup > total:
        got = f"step {step}, warmup {warmup}, cooldown {cooldown}, total {total}"
        raise InputError(
            "schedule",
            "step, warmup and cooldown ≥ 0, total ≥ 1, warmup ≤ total",
            got,
            "correct it",
        )
    rise, last = warmup - 1, total - 1
    plateau = max(rise, last - cooldown - 1, 0)
    if step < rise:
        share = 0.5 * (1.0 - math.cos(math.pi * step / rise))
        return 0.1 + 0.9 * share, 0.95 - 0.1 * share
    if step <= plateau:
        return 1.0, 0.85
    share = (
        0.5 * (1.0 - math.cos(math.pi * min(1.0, (step - plateau) / (last - plateau))))
        if last > plateau
        else 1.0
    )
    return 1.0 - 0.999 * share, 0.85 + 0.1 * share


def set_learning_rate(
    optimizer: torch.optim.Optimizer, base_lrs: Sequence[float], factor: float
) -> None:
    """Set the rate of group i to base_lrs[i]·factor; a rate held in a tensor is filled in place.

    Raises:
        InputError: not one base rate per group.
    """
    groups = optimizer.param_groups
    if len(base_lrs) != len(groups):
        raise InputError(
            "base_lrs",
            f"{len(groups)} rates, one per group",
            str(len(base_lrs)),
            "pass one per group",
        )
    for group, base in zip(groups, base_lrs, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(base * factor)
        else:
            group["lr"] = base * factor


def clip_gradients(params: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale all gradients so that their joint 2-norm is at most `max_norm`.

    Returns the norm before, fp32 [], on the device.

    A norm that is not finite makes every gradient non-finite: pass it to the check that skips the
    step.

    Raises:
        InputError: max_norm ≤ 0.
    """
    if not max_norm > 0:
        raise InputError("max_norm", "a number > 0", str(max_norm), "correct it, or do not clip")
    return nn.utils.clip_grad_norm_(params, max_norm, error_if_nonfinite=False)


class LossScaler:
    """Dynamic loss scale for fp16 autocast, on the device throughout (no read by the host).

    In a step: hand `scale` to the loss or, as here, to `dx_scale` of the head; `found =
    unscale_(params)` after backward; clip; `step_unless(optimizer, found)`; `update(found)`.

    Args:
        device: where the gradients are.
        init_scale, growth, backoff, interval: start; factor after `interval` steps in a row without
            overflow; factor after an overflow. The scale stays within [1, 2²⁴], so that it neither
            dies at 0 nor leaves fp16's use.

    Attributes:
        scale: fp32 [1]. growth_tracker: int32 [1], good steps since the last change. skipped: int64
            [1], overflows.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        init_scale: float = 2.0**16,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
    ) -> None:
        if (
            not 1.0 <= init_scale <= 2.0**24
            or growth < 1.0
            or not 0.0 < backoff <= 1.0
            or interval < 1
        ):
            got = f"{init_scale}, {growth}, {backoff}, {interval}"
            expected = "init_scale in [1, 2^24], growth ≥ 1, backoff in (0, 1], interval ≥ 1"
            raise InputError("LossScaler", expected, got, "correct it")
        self.growth, self.backoff, self.interval = growth, backoff, interval
        self.scale = torch.full((1,), init_scale, dtype=torch.float32, device=device)
        self.growth_tracker = torch.zeros(1, dtype=torch.int32, device=device)
        self.skipped = torch.zeros(1, dtype=torch.int64, device=device)

    def unscale_(self, params: Iterable[torch.Tensor]) -> torch.Tensor:
        """Divide every gradient by the scale, in place.

        Returns fp32 [1]: 1 if any was not finite, else 0.
        """
        grads = [p.grad for p in params if p.grad is not None]
        found_inf = torch.zeros_like(self.scale)
        if grads:
            # One pass checks and scales; GradScaler, which reads its flags on the host, calls the
            # same.
            torch._amp_foreach_non_finite_check_and_unscale_(
                grads, found_inf, self.scale.reciprocal()
            )
        return found_inf

    def update(self, found_inf: torch.Tensor) -> None:
        """Adjust the scale after a step whose flag was `found_inf` (fp32 [1])."""
        self.skipped += found_inf.to(torch.int64)
        torch._amp_update_scale_(
            self.scale, self.growth_tracker, found_inf, self.growth, self.backoff, self.interval
        )
        self.scale.clamp_(1.0, 2.0**24)

    def move(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a module's `_apply` function (a move to a device) to the state; dtypes stay."""
        for name, tensor in self.tensors().items():
            setattr(self, name, fn(tensor).to(tensor.dtype))

    def tensors(self) -> dict[str, torch.Tensor]:
        """State for a checkpoint; the tensors themselves, not copies."""
        return {"scale": self.scale, "growth_tracker": self.growth_tracker, "skipped": self.skipped}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `tensors()` gave.

        Raises:
            InputError: other names or shapes.
        """
        own = self.tensors()
        got = {k: tuple(v.shape) for k, v in tensors.items()}
        if got != {k: tuple(v.shape) for k, v in own.items()}:
            raise InputError(
                "loss scaler state",
                f"{sorted(own)} of shape (1,)",
                str(got),
                "use LossScaler.tensors()",
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def scaled_step(
    optimizer: torch.optim.Optimizer,
    scaler: LossScaler,
    overflow: torch.Tensor,
    *,
    clip: float = 0.0,
) -> torch.Tensor:
    """Sum over processes, unscale, clip, step and adjust the scale.

    This is what follows the backward of a step.

    Args:
        optimizer: holds every parameter with a gradient; of several processes each has gradients of
            the same ones.
        overflow: fp32 [1], 1 where the forward was not finite: no parameter moves, and the loss
            scale is not blamed.
        clip: largest norm of the gradient; 0 is off.

    Returns:
        fp32 [1]: 1 where a gradient alone was not finite, and no parameter moved for it.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    # Of those alone that have a gradient: a zero in place of none would let AdamW decay what the
    # step has nothing to do with. Rows of a sharded parameter have their sums already.
    own = [p for p in params if isinstance(p, dist.OwnRows)]
    dist.sum_gradients(p for p in params if p.grad is not None and not isinstance(p, dist.OwnRows))
    found = scaler.unscale_(params) * (1 - overflow)
    if own:
        found = _over_all(params, own, found, clip)
    elif clip > 0:
        clip_gradients(params, clip)
    step_unless(optimizer, torch.maximum(found, overflow))
    scaler.update(found)
    return found


def _over_all(
    params: Sequence[torch.Tensor], own: Sequence[torch.Tensor], found: torch.Tensor, clip: float
) -> torch.Tensor:
    """Take the decisions of a step over the rows of all processes, in one message.

    Returns:
        fp32 [1]: 1 where a gradient of any process was not finite. With `clip` all are scaled.
    """
    total: Callable[..., torch.Tensor] = nn.utils.get_total_norm
    norm = total([p.grad for p in own if p.grad is not None]).to(found)
    told = torch.cat([found, norm.reshape(1).square()]) if clip > 0 else found.clone()
    dist.sum_(told)
    if clip > 0:
        rest = [p.grad for p in params if p.grad is not None and not isinstance(p, dist.OwnRows)]
        squares = told[1] + (total(rest).square() if rest else 0)
        nn.utils.clip_grads_with_norm_(params, clip, squares.sqrt())
    return (told[:1] > 0).to(found)
