"""A running mean of a model's weights: predictions use it, training goes on from the weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from xmlkernels import dist
from xmlkernels.errors import InputError

PREFIX = "average."  # of its tensors in a checkpoint
_ROWS = 4096  # of a table at a time
Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class MeanSettings:
    """How the mean is taken.

    Attributes:
        decay: of the mean from one value that it takes in to the next; 1: the plain mean (SWA,
            Izmailov et al., UAI 2018); 0: no mean.
        start: updates before it begins.
        every: updates from one value to the next; each is what the last of them left.
        tables: of the tables, too, and not of the encoder and linear layers alone.
    """

    decay: float = 0.0
    start: int = 0
    every: int = 1
    tables: bool = False

    def check(self) -> None:
        """Raise InputError when one is out of range."""
        if not 0 <= self.decay <= 1:
            raise InputError(
                "running mean: decay",
                "from 0 (none) to 1 (the plain mean)",
                str(self.decay),
                "correct it",
            )
        for name, value, least in (("start", self.start, 0), ("every", self.every, 1)):
            if value < least:
                raise InputError(
                    f"running mean: {name}", f"{least} or more", str(value), "correct it"
                )


class RunningMean:
    """The mean of weights, kept next to them in fp32: exponential (EMA) or plain (SWA).

    The n-th value (from 0) moves the mean by max(1 − decay, 1/(n + 1)) towards it: it begins as
    their plain mean, so no start value lingers, and goes on as an EMA; with decay = 1 it stays the
    plain mean.

    Attributes:
        names, count: of the weights, in their order; values taken in so far.
        means: fp32, one for each of the weights.

    Args:
        weights: parameters, or tables of any format but fp8, by name; of a sharded parameter this
            process's rows have a mean.
        settings: with a decay above 0.

    Raises:
        InputError: a table is fp8.
    """

    def __init__(self, weights: Mapping[str, Tensor], settings: MeanSettings) -> None:
        if any(w.dtype.itemsize < 2 for w in weights.values()):
            raise InputError(
                "running mean",
                "tables in fp32, bf16 or fp16",
                "an fp8 one",
                "leave the tables out of the mean",
            )
        self.settings, self.names, self.count = settings, list(weights), 0
        self._attach(weights)
        self.means = [w.detach().to(torch.float32, copy=True) for w in self._weights]
        self._rounded: list[Tensor] = []  # the means in the weights' formats, made on first use

    @torch.no_grad()
    def step(self, number: int) -> None:
        """Take in the weights as update `number` (from 0) left them, where that is one to take."""
        late = number - self.settings.start
        if late < 0 or (late + 1) % self.settings.every:
            return
        share = max(1 - self.settings.decay, 1 / (self.count + 1))
        # Few launches for the many weights of an encoder.
        together: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for mean, weight in zip(self.means, self._weights, strict=True):
            if weight.dtype == torch.float32:
                means, own = together.setdefault(weight.device, ([], []))
                means.append(mean)
                own.append(weight.detach())
                continue
            # Never a whole table in fp32 next to its mean.
            for start in range(0, len(weight), _ROWS):
                mean[start : start + _ROWS].lerp_(weight[start : start + _ROWS].float(), share)
        for means, own in together.values():
            torch._foreach_lerp_(means, own, share)
        self.count += 1
        self._rounded = []

    @contextmanager
    def used(self) -> Iterator[None]:
        """Put the means in place of the weights inside the block; none before the first value.

        Means of fp32 weights are not copied.
        """
        if self.count == 0:
            yield
            return
        self._rounded = self._rounded or [
            m.to(w.dtype) for m, w in zip(self.means, self._weights, strict=True)
        ]
        held = [
            w.clone() if fixed else w.data
            for w, fixed in zip(self._weights, self._fixed, strict=True)
        ]
        self._put(self._rounded)
        try:
            yield
        finally:
            self._put(held)

    def _put(self, values: Sequence[Tensor]) -> None:
        for weight, value, fixed in zip(self._weights, values, self._fixed, strict=True):
            if fixed:
                weight.copy_(value)
            else:
                weight.data = value

    def _attach(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = [dist.own(weights[name]) for name in self.names]
        # Messages are filled from the memory of a sharded parameter's rows: no other replaces it.
        self._fixed = [dist.is_sharded(weights[name]) for name in self.names]

    def follow(self, weights: Mapping[str, Tensor]) -> None:
        """Attach to the weights again after `.to(device)`, which may have replaced them."""
        self._attach(weights)
        self.means = [m.to(w.device) for m, w in zip(self.means, self._weights, strict=True)]
        self._rounded = []

    def tensors(self) -> dict[str, Tensor]:
        """Collect what must survive a stop, by its name in a checkpoint."""
        means = {PREFIX + name: mean for name, mean in zip(self.names, self.means, strict=True)}
        return means | {PREFIX + "count": torch.tensor([self.count])}

    def load_tensors(self, means: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave, names without their prefix."""
        self.count, self._rounded = int(means["count"]), []
        for name, mean in zip(self.names, self.means, strict=True):
            mean.copy_(means[name])


def averaged_weights(model: nn.Module, tables: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Name what is averaged: trainable parameters, and these tables' weights and biases."""
    found: dict[str, Tensor] = {
        name: weight for name, weight in model.named_parameters() if weight.requires_grad
    }
    for prefix, table in tables.items():
        own = {f"{prefix}.{name}": getattr(table, name) for name in ("weight", "bias")}
        found |= {name: value for name, value in own.items() if value is not None}
    return found


def start_mean(
    encoder: nn.Module, weights: Mapping[str, Tensor], settings: MeanSettings
) -> RunningMean | None:
    """Start the mean that the settings ask for; None for a decay of 0.

    Raises:
        InputError: a setting is out of range, a table is fp8, or the encoder trains a table of its
            own.
    """
    settings.check()
    if settings.decay == 0:
        return None
    if hasattr(encoder, "update"):
        got = str(settings.decay)
        raise InputError(
            "running mean: decay", "0 for an encoder with a table of its own", got, "leave it out"
        )
    return RunningMean(weights, settings)


def evaluating(method: Method) -> Method:
    """Run a method of a model without gradients and, where there is one, on the running mean."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **options: Any) -> Any:
        with torch.no_grad(), self.average.used() if self.average is not None else nullcontext():
            return method(self, *args, **options)

    return cast(Method, run)


def with_means(tensors: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put a checkpoint's means in place of its weights, in the weights' formats.

    Args:
        tensors: of the checkpoint.
        means: its means, names without their prefix.

    Raises:
        InputError: a mean of something that is not among the tensors.
    """
    if foreign := sorted(means.keys() - tensors.keys() - {"count"}):
        raise InputError(
            "checkpoint",
            "running means of its weights",
            f"one of {foreign[0]}",
            "use one that xmlkernels train wrote",
        )
    if not means or int(means["count"]) == 0:
        return dict(tensors)
    return {
        name: means[name].to(own.dtype) if name in means else own for name, own in tensors.items()
    }


def check_means(average: RunningMean | None, means: Mapping[str, Tensor]) -> None:
    """Raise InputError unless a checkpoint has the means that a model is to go on with."""
    expected = set() if average is None else {"count", *average.names}
    missing, extra = sorted(expected - means.keys()), sorted(means.keys() - expected)
    if missing or extra:
        raise InputError(
            "checkpoint",
            "the running means of this model",
            f"missing {missing[:3]}, left over {extra[:3]}",
            "use the checkpoint's own configuration (--ema, --ema-tables)",
        )
