"""A model from its own description and its tensors: what prediction needs, and no training."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xmlkernels.errors import InputError
from xmlkernels.models.cascade import Cascade
from xmlkernels.models.cascade_state import saved_tree
from xmlkernels.models.common import Model
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.full_head import FullHead

DIVERGED = (
    "the training has diverged: use an earlier checkpoint (the best in place of the last), or train again with lower learning "
    "rates"
)


def check_finite(model: nn.Module, where: str) -> None:
    """Refuses weights that are no numbers: such a model answers every text with nothing.

    Args:
        model: on the CPU.
        where: what it was read from.

    Raises:
        InputError: NaN or infinity in a tensor; names the first one and how many there are.
    """
    bad = [name for name, value in model.state_dict().items() if not _finite(value)]
    if bad:
        got = f"NaN or infinity in {len(bad)} of them, the first {bad[0]}"
        raise InputError(where, "weights that are finite numbers", got, DIVERGED)


def _finite(values: Tensor) -> bool:
    if values.numel() == 0 or not values.is_floating_point():
        return True
    if values.dtype == torch.float8_e4m3fn:  # it has no infinity; all bits but the sign are set in its NaN
        return int((values.view(torch.uint8) & 0x7F).max()) < 0x7F
    return all(bool(torch.isfinite(end)) for end in values.aminmax())  # one pass, no copy, and NaN comes through


def restored(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Model:
    """The model that `config()` of a trained one describes; its weights are still to be loaded.

    Args:
        tensors: of the same checkpoint; a cascade's hold its label tree.

    Raises:
        InputError: a kind of model that this version does not know, or no label tree.
    """
    kind = config.get("kind")
    if kind == "end_to_end":
        return EndToEnd(_encoder(config["encoder"]), FullHead(**config["head"], std=0))
    if kind == "cascade":
        tree = saved_tree(config, tensors)
        # SGD without momentum keeps no states, which prediction has no use for.
        heads = CascadeHeads(**config["head"], optimizer="sgd", betas=(0.0, 0.999), fill=False)
        return Cascade(_encoder(config["encoder"]), heads, tree)
    raise InputError("checkpoint", "a model of kind end_to_end or cascade", repr(kind), "read it with a newer xmlkernels")


def _encoder(config: Mapping[str, Any]) -> nn.Module:
    return BowEncoder.from_config(config) if config.get("kind") == "bow" else Encoder.from_config(config)
