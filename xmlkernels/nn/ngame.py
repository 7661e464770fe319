"""Initialisation from the encoder of an NGAME checkpoint."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from xmlkernels.errors import InputError

if TYPE_CHECKING:
    from xmlkernels.nn.encoder import Encoder

NGAME_PREFIX = "embedding_labels.encoder.transformer.0.auto_model."


def load_ngame(encoder: Encoder, path: str | PathLike[str], prefix: str = NGAME_PREFIX) -> None:
    """Load the weights of an NGAME encoder (Dahiya et al., WSDM 2023) into `encoder.model`,
    strictly.

    Keys that begin with `prefix` lose it and must match the encoder one to one; other keys belong
    to other modules and are left alone. Buffers `position_ids` of old transformers versions and a
    pooling layer, neither of which the encoder has, are dropped.

    Args:
        path: a safetensors file, or a torch file of plain tensors (read with weights_only=True).

    Raises:
        InputError: unreadable file, no key with the prefix, missing or unexpected keys, other
            shapes. The encoder is then unchanged.
    """
    where = str(path)
    state = _read_state(Path(path))
    named = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
    if not named:
        raise InputError(
            where,
            f"keys that begin with {prefix!r}",
            few(list(state)),
            "pass the file's own prefix",
        )
    own = encoder.model.state_dict()
    for key in [k for k in named if k not in own]:
        if key.endswith("position_ids") or key.startswith("pooler."):
            del named[key]
    mend = "use a file of the same architecture as the encoder"
    if missing := [k for k in own if k not in named]:
        raise InputError(
            where, f"{len(own)} weights of the encoder", f"none for {few(missing)}", mend
        )
    if unexpected := [k for k in named if k not in own]:
        raise InputError(where, "only weights of the encoder", f"also {few(unexpected)}", mend)
    if wrong := [k for k in own if named[k].shape != own[k].shape]:
        key = wrong[0]
        got = f"{tuple(named[key].shape)} ({len(wrong)} such: {few(wrong)})"
        raise InputError(where, f"shape {tuple(own[key].shape)} for {key}", got, mend)
    encoder.model.load_state_dict(named, strict=True)


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise InputError(str(path), "a file of weights", "no such file", "correct the path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has exceptions of its own for a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            str(path), "safetensors or a torch file of plain tensors", reason, "fetch it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(
            str(path),
            "a flat dict of tensors",
            type(state).__name__,
            "save model.state_dict() alone",
        )
    return state


def few(names: list[str]) -> str:
    """The first three names and how many more there are, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
