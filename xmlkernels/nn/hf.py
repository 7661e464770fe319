"""What an encoder checks of its model and its options when it is built."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from xmlkernels.errors import InputError
from xmlkernels.threads import torch_threads

_OWN = "use the checkpoint's own configuration"
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CLASS_TOKEN = ("first", "last")


def check_options(
    pooling: str, class_token: str, bottleneck: int, dropout: float, autocast: torch.dtype | None
) -> None:
    if pooling not in ("mean", "cls"):
        raise InputError("pooling", "'mean' or 'cls'", repr(pooling), "choose one of the two")
    if class_token not in CLASS_TOKEN:
        raise InputError(
            "class_token",
            "'first' or 'last'",
            repr(class_token),
            "take the tokenizer's `class_position`",
        )
    if bottleneck < 0:
        raise InputError("bottleneck", "a width ≥ 0 (0 = none)", str(bottleneck), "correct it")
    if not 0.0 <= dropout < 1.0:
        raise InputError("dropout", "a probability in [0, 1)", str(dropout), "correct it")
    if autocast is not None and autocast not in AUTOCAST.values():
        raise InputError(
            "autocast", "torch.bfloat16, torch.float16 or None", str(autocast), "choose one of them"
        )


@torch.no_grad()
def checked_width(model: nn.Module) -> int:
    """Width of the last hidden state, found by two tokens, so that an unusable model is told before
    training.
    """
    config: Any = model.config
    where = f"model {config.model_type!r}"
    mend = "choose a text encoder, as BERT, RoBERTa, DistilBERT or MiniLM"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(where, "an encoder", "an encoder-decoder", mend)
    missing = {"input_ids", "attention_mask"} - set(inspect.signature(model.forward).parameters)
    if missing:
        raise InputError(
            where,
            "a text model that takes input_ids and attention_mask",
            f"no {sorted(missing)}",
            mend,
        )
    training = model.training
    device = next(model.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with torch_threads(
        1
    ):  # a process that has only built a model may still fork: no OpenMP pool for two tokens
        output = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    model.train(training)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None or hidden.shape[:2] != ids.shape:
        raise InputError(
            where,
            "an output `last_hidden_state` of shape [B, T, H]",
            f"{type(output).__name__}",
            mend,
        )
    return int(hidden.shape[2])


def longest(model: nn.Module) -> int | None:
    """Tokens that learned absolute positions allow, or None without them; RoBERTa starts after its
    padding index.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (
                0 if module.padding_idx is None else module.padding_idx + 1
            )
    return None


def check_depth(config: Any, shapes: Mapping[str, torch.Size]) -> None:
    """InputError where a configuration has more layers than there are weights: building so many
    would never end.
    """
    layers = getattr(config, "num_hidden_layers", 0)
    if not isinstance(layers, int) or not 0 <= layers <= len(shapes):
        got = f"num_hidden_layers {layers!r} beside {len(shapes)} weights"
        raise InputError("encoder configuration", "the layers of the checkpoint", got, _OWN)


def check_shapes(model: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """InputError where the weights of a model are not those that it will be given; the model may
    stand on "meta".
    """
    own = {name: value.shape for name, value in model.state_dict().items()}
    for name in sorted(own.keys() | shapes.keys()):
        if own.get(name) != shapes.get(name):
            here, there = (
                list(found[name]) if name in found else "none" for found in (own, shapes)
            )
            raise InputError(
                f"checkpoint: encoder weight {name}", f"shape {here}", str(there), _OWN
            )


@contextlib.contextmanager
def told_of(where: str) -> Iterator[None]:
    """Whatever transformers raises as an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # damaged settings end in whatever transformers happens to raise
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        mend = "check the name or path; a hub name needs network or a filled cache"
        if "custom code" in reason:
            mend = "choose a model that transformers knows: no other code runs"
        raise InputError(where, "a model that transformers can load", reason, mend) from error
