"""What an encoder checks of its model and its options when it is built."""

import inspect
from typing import Any

import torch
from torch import nn

from xmlkernels.errors import InputError
from xmlkernels.threads import torch_threads

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CLASS_TOKEN = ("first", "last")


def check_options(pooling: str, class_token: str, bottleneck: int, dropout: float, autocast: torch.dtype | None) -> None:
    if pooling not in ("mean", "cls"):
        raise InputError("pooling", "'mean' or 'cls'", repr(pooling), "choose one of the two")
    if class_token not in CLASS_TOKEN:
        raise InputError("class_token", "'first' or 'last'", repr(class_token), "take the tokenizer's `class_position`")
    if bottleneck < 0:
        raise InputError("bottleneck", "a width ≥ 0 (0 = none)", str(bottleneck), "correct it")
    if not 0.0 <= dropout < 1.0:
        raise InputError("dropout", "a probability in [0, 1)", str(dropout), "correct it")
    if autocast is not None and autocast not in AUTOCAST.values():
        raise InputError("autocast", "torch.bfloat16, torch.float16 or None", str(autocast), "choose one of them")


@torch.no_grad()
def checked_width(model: nn.Module) -> int:
    """Width of the last hidden state, found by two tokens, so that an unusable model is told before training."""
    config: Any = model.config
    where = f"model {config.model_type!r}"
    mend = "choose a text encoder, as BERT, RoBERTa, DistilBERT or MiniLM"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(where, "an encoder", "an encoder-decoder", mend)
    missing = {"input_ids", "attention_mask"} - set(inspect.signature(model.forward).parameters)
    if missing:
        raise InputError(where, "a text model that takes input_ids and attention_mask", f"no {sorted(missing)}", mend)
    training = model.training
    device = next(model.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with torch_threads(1):  # a process that has only built a model may still fork: no OpenMP pool for two tokens
        output = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    model.train(training)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None or hidden.shape[:2] != ids.shape:
        raise InputError(where, "an output `last_hidden_state` of shape [B, T, H]", f"{type(output).__name__}", mend)
    return int(hidden.shape[2])


def longest(model: nn.Module) -> int | None:
    """Tokens that learned absolute positions allow, or None without them; RoBERTa starts after its padding index."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None
