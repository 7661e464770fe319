"""A model from its own description: what prediction needs, and no training."""

from collections.abc import Mapping
from typing import Any

from xmlkernels.errors import InputError
from xmlkernels.models.common import Model
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.full_head import FullHead


def restored(config: Mapping[str, Any]) -> Model:
    """The model that `config()` of a trained one describes, with weights to be loaded into it.

    Raises:
        InputError: a kind of model that this version does not know.
    """
    if config.get("kind") != "end_to_end":
        raise InputError(
            "checkpoint", "a model of kind end_to_end", repr(config.get("kind")), "read it with a newer xmlkernels"
        )
    return EndToEnd(Encoder.from_config(config["encoder"]), FullHead(**config["head"], std=0))
