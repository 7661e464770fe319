"""A model from its own description and its tensors: what prediction needs, and no training."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from xmlkernels.errors import InputError
from xmlkernels.models.base import Model
from xmlkernels.models.kinds import KINDS
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.stored import StoredTable
from xmlkernels.records import Count, Meta, Positive, check_record
from xmlkernels.rows import row_blocks

DIVERGED = (
    "the training has diverged: use an earlier checkpoint (the best in place of the last), or "
    "train again with lower learning rates"
)
_MEND = "use another checkpoint, or a newer xmlkernels"
_Share = Annotated[float, Meta(ge=0, lt=1)]


class _Bow(TypedDict):
    kind: Literal["bow"]
    vocabulary: Positive
    width: Positive
    dropout: _Share
    word_dropout: _Share
    activation: str
    dtype: str


class _Encoder(TypedDict):
    model: dict[str, Any]
    pooling: str
    bottleneck: Count
    dropout: _Share
    autocast: str | None
    compile: bool
    class_token: NotRequired[Literal["first", "last"]]


class _Config(TypedDict):
    kind: str
    encoder: dict[str, Any]
    head: dict[str, Any]
    tree: NotRequired[dict[str, Any]]


def check_config(config: Any) -> None:
    """Check the types, the keys and the kind of a model's `config()`.

    Raises:
        InputError: a value of another type, a key too many, or a kind that is not known.
    """
    where = "checkpoint, $.model"
    check_record(config, _Config, where=where, mend=_MEND)
    kind = KINDS.get(config["kind"])
    if kind is None:
        expected, mend = f"a model of kind {' or '.join(KINDS)}", "read it with a newer xmlkernels"
        raise InputError("checkpoint", expected, repr(config["kind"]), mend)
    parts = {
        "head": kind.head_config,
        "encoder": _Bow if config["encoder"].get("kind") == "bow" else _Encoder,
    }
    for name, shape in parts.items():
        check_record(config[name], shape, where=f"{where}.{name}", mend=_MEND)
        if more := sorted(config[name].keys() - shape.__annotations__.keys()):
            raise InputError(
                f"{where}.{name}", "keys that this version knows", repr(more[0]), _MEND
            )


def check_finite(model: Model, where: str) -> None:
    """Refuse weights that are not finite: such a model answers every text with nothing.

    Args:
        model: on the CPU.
        where: what it was read from.

    Raises:
        InputError: NaN or infinity in a tensor; names the first one and how many there are.
    """
    stored = {
        f"{name}.{buffer}": rows
        for name, table in model.tables().items()
        if isinstance(table, StoredTable)
        for buffer, rows in table.stored().items()
    }
    bad = [
        name
        for name, value in model.state_dict().items()
        if not all(map(_finite, row_blocks(stored[name]) if name in stored else (value,)))
    ]
    if bad:
        got = f"NaN or infinity in {len(bad)} of them, the first {bad[0]}"
        raise InputError(where, "weights that are finite numbers", got, DIVERGED)


def _finite(values: Tensor) -> bool:
    if values.numel() == 0 or not values.is_floating_point():
        return True
    if values.dtype == torch.float8_e4m3fn:
        # No infinity; its NaNs are 0xFF and 0x7F, the largest byte without and with a sign.
        largest = int(values.view(torch.uint8).max()), int(values.view(torch.int8).max())
        return largest[0] < 0xFF and largest[1] < 0x7F
    # One pass, no copy, and NaN comes through.
    return all(bool(torch.isfinite(end)) for end in values.aminmax())


def restored(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Model:
    """Build the model that `config()` of a trained one describes, without loading its weights.

    Args:
        config: of the checkpoint.
        tensors: of the same checkpoint; a cascade's hold its label tree.

    Raises:
        InputError: a kind of model that this version does not know, values of other types, no label
            tree, or sizes other than those of the tensors: nothing of a size that the checkpoint
            does not hold is made.
    """
    check_config(config)
    check_sizes(config, tensors)
    encoder = _encoder(config["encoder"], tensors)
    return KINDS[config["kind"]].restore(config, encoder, tensors)


def check_sizes(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError where the tables that a configuration describes are not in the tensors."""
    head, encoder = config["head"], config["encoder"]
    expected = KINDS[config["kind"]].table_shapes(head)
    if encoder.get("kind") == "bow":
        expected["encoder.table"] = (encoder["vocabulary"], encoder["width"])
    elif encoder["bottleneck"]:
        found = tensors.get("encoder.bottleneck.weight")
        expected["encoder.bottleneck.weight"] = (
            encoder["bottleneck"],
            int(found.shape[1]) if found is not None else 0,
        )
    for name, shape in expected.items():
        got = tuple(tensors[name].shape) if name in tensors else None
        if got != shape:
            mend = "use the checkpoint's own configuration"
            raise InputError(
                f"checkpoint: {name}",
                f"shape {list(shape)}",
                "none" if got is None else str(list(got)),
                mend,
            )


def _encoder(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    if config.get("kind") == "bow":
        return BowEncoder.from_config(config)
    inside = "encoder.model."
    return Encoder.from_config(
        config,
        {k.removeprefix(inside): t.shape for k, t in tensors.items() if k.startswith(inside)},
    )
