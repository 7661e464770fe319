"""What of a cascade survives a stop: its tensors by name, their way back, and what must fit for
that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xmlkernels.checkpoint import load_optimizer_tensors, optimizer_tensors
from xmlkernels.errors import InputError
from xmlkernels.models.base import check_tensors
from xmlkernels.models.running_mean import PREFIX, check_means, for_prediction
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.layer_recipe import checked_layers
from xmlkernels.nn.table import without_states
from xmlkernels.tree.label_tree import LabelTree

if TYPE_CHECKING:
    from xmlkernels.models.cascade import Cascade

_PARTS = ("optimizer.", "scaler.", PREFIX)


def cascade_tensors(model: Cascade) -> dict[str, Tensor]:
    """See `Cascade.tensors`."""
    out = {name: value.detach() for name, value in model.state_dict().items()}
    if model.training_settings is None:
        return out
    if model.optimizer is not None:
        out |= {
            f"optimizer.{k}": v
            for k, v in optimizer_tensors(model.optimizer, model.named_parameters()).items()
        }
    out |= {f"scaler.{name}": value for name, value in model.scaler.tensors().items()}
    if model.average is not None:
        out |= model.average.tensors()
    return out


def load_cascade_tensors(model: Cascade, tensors: Mapping[str, Tensor]) -> None:
    """See `Cascade.load_tensors`."""
    parts = {
        p: {k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in _PARTS
    }
    rest = {k: v for k, v in tensors.items() if not k.startswith(_PARTS)}
    means, own = parts[PREFIX], model.state_dict()
    if model.training_settings is None:
        rest = without_states(rest, own)
        rest = for_prediction(rest, means)
    _check_tree(model, rest)
    check_tensors(own, rest)
    if model.training_settings is not None:
        check_means(model.average, means)
    model.load_state_dict(rest)
    model.steps = int(model.heads.levels[0].counter[1])  # type: ignore[index]
    if model.training_settings is None:
        return
    if model.optimizer is not None:
        load_optimizer_tensors(model.optimizer, model.named_parameters(), parts["optimizer."])
    model.scaler.load_tensors(parts["scaler."])
    if model.average is not None:
        model.average.load_tensors(means)


def saved_tree(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LabelTree:
    """The label tree of a checkpoint.

    Args:
        config: `Cascade.config()` of the model that was saved.
        tensors: its tensors.

    Raises:
        InputError: no tree in them.
    """
    children = [tensors[f"children_{r}"] for r in range(4) if f"children_{r}" in tensors]
    if not children or "order" not in tensors:
        raise InputError(
            "checkpoint", "a cascade with its label tree", "none", "use the checkpoint of a cascade"
        )
    arrays = tuple(c.cpu().numpy() for c in children)
    return LabelTree(arrays, tensors["order"].cpu().numpy(), dict(config.get("tree", {})))


def _check_tree(model: Cascade, rest: Mapping[str, Tensor]) -> None:
    names = {"order", *(f"children_{r}" for r in range(model.tree.levels - 1))}
    there = {k for k in rest if k == "order" or k.startswith("children_")}
    own = model.state_dict()
    if there != names or any(not torch.equal(rest[k].cpu(), own[k].cpu()) for k in names):
        raise InputError(
            "checkpoint",
            f"a cascade on this label tree ({model.tree.content_hash[:12]}, sizes "
            f"{list(model.tree.sizes)})",
            "one on another tree",
            "pass the tree that it was trained with",
        )


def check_fit(encoder: nn.Module, heads: CascadeHeads, tree: LabelTree) -> None:
    """Raises InputError when heads, tree and encoder do not fit together."""
    sizes = tuple(level.nodes for level in heads.levels)
    if sizes != tuple(tree.sizes):
        raise InputError(
            "cascade",
            f"heads of {list(tree.sizes)} nodes, the sizes of the label tree",
            f"{list(sizes)}",
            "make the heads with tree.sizes",
        )
    most = tuple(tree.widest(r) for r in range(tree.levels - 1))
    if heads.most != most:
        got = f"{list(heads.most)}"
        raise InputError(
            "cascade",
            f"heads for clusters of up to {list(most)} children",
            got,
            "pass tree.widest of each level",
        )
    width = getattr(encoder, "hidden", None) or encoder.width
    if heads.width != width:
        raise InputError(
            "cascade",
            f"heads of width {width}, the encoder's",
            str(heads.width),
            "make the heads for this encoder",
        )
    if getattr(encoder, "bottleneck", None) is not None:
        mend = "build the encoder without one"
        raise InputError(
            "encoder of a cascade", "no bottleneck (every level reads a layer itself)", "one", mend
        )
    checked_layers(heads.layers, tree.levels, getattr(encoder, "layers", None))
