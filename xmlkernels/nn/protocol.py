"""What a model needs of an encoder, be it one of this package or one of your own."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from xmlkernels.errors import InputError
from xmlkernels.nn.layer_recipe import Recipe

_PAGE = "see docs/own-encoder.md"


class TextEncoder(Protocol):
    """What `EndToEnd` needs of an encoder: a module with this, and nothing more.

    Optional is `update(lr)`, for an encoder that trains a table of its own: it is called after
    every backward. Any other name is the encoder's own.

    Attributes:
        width: D, of what it gives.
        autocast: the half precision that it computes in (fp16 gets a loss scaler), or None.
    """

    width: int
    autocast: torch.dtype | None

    def encoder_config(self) -> dict[str, Any]:
        """Describe it for a checkpoint, JSON-ready: no weights, no paths."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Encode the `inputs` of a batch: fp32 [B, D]."""


class LayeredEncoder(TextEncoder, Protocol):
    """What `Cascade` needs of an encoder.

    Optional is `check_recipe(recipe)`, which raises InputError where the encoder lacks a layer that
    the recipe names.
    """

    def layer_vectors(self, recipe: Recipe, *inputs: Tensor) -> list[Tensor]:
        """Give each level fp32 [B, D], or [B, 2D] where the recipe names two layers."""


def check_encoder(encoder: nn.Module, recipe: Recipe | None = None) -> None:
    """Refuse an encoder that lacks what a model needs of it, before the first step.

    Args:
        encoder: of a model.
        recipe: of a cascade: the layers that each level reads.

    Raises:
        InputError: something is missing, or of another type.
    """
    width = _part(encoder, "width", "its vectors' width, a whole number of 1 or more")
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        expected = "a whole number of 1 or more, its vectors' width"
        raise InputError("encoder: width", expected, _told(width), _PAGE)
    half = _part(encoder, "autocast", "torch.bfloat16, torch.float16 or None")
    if half not in (None, torch.bfloat16, torch.float16):
        expected = "torch.bfloat16, torch.float16 or None"
        raise InputError("encoder: autocast", expected, _told(half), _PAGE)
    methods = ["encoder_config"] + (["layer_vectors"] if recipe is not None else [])
    methods += ["update"] if hasattr(encoder, "update") else []
    for name in methods:
        method = _part(encoder, name, "a method")
        if isinstance(method, nn.Module) or not callable(method):
            raise InputError(f"encoder: {name}", "a method", _told(method), _PAGE)
    check = getattr(encoder, "check_recipe", None)
    if recipe is not None and check is not None:
        check(recipe)


def _part(encoder: nn.Module, name: str, expected: str) -> Any:
    if not hasattr(encoder, name):
        raise InputError(f"encoder: {name}", expected, "none", _PAGE)
    return getattr(encoder, name)


def _told(value: object) -> str:
    return type(value).__name__ if isinstance(value, nn.Module) else repr(value)
