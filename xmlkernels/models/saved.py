"""What a checkpoint holds of a model: its description, its tensors, its label tree."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from xmlkernels.errors import InputError
from xmlkernels.nn.table import Table
from xmlkernels.records import check_record
from xmlkernels.rows import Rows, rows_behind
from xmlkernels.tree.label_tree import LabelTree

_STATES = tuple(f".{name}" for name in Table.TRAINING_ONLY)


def needed_for_prediction(name: str) -> bool:
    """Whether prediction needs this tensor of a checkpoint; states of optimizers it does not."""
    return not name.startswith(("optimizer.", "scaler.")) and not name.endswith(_STATES)


def model_config(state: Mapping[str, Any]) -> dict[str, Any]:
    """Read the model's `config()` from the state of a checkpoint.

    Checkpoints written before there was more than one kind of model hold encoder and head alone.

    Raises:
        InputError: the state describes no model.
    """
    if "model" in state:
        where, mend = "checkpoint, $.model", "use another checkpoint"
        return dict(check_record(state["model"], dict[str, Any], where=where, mend=mend))
    if {"encoder", "head"} <= state.keys():
        return {"kind": "end_to_end", "encoder": state["encoder"], "head": state["head"]}
    mend = "use one that xmlkernels train wrote"
    raise InputError("checkpoint", "the description of a model", "none", mend)


def table_rows(tensors: Mapping[str, Tensor], table: str) -> dict[str, Rows]:
    """Give the rows of a table that a checkpoint's tensors stand in for, by their buffers.

    Args:
        tensors: of the checkpoint.
        table: its name there.
    """
    inside = f"{table}."
    found = {
        name.removeprefix(inside): rows_behind(tensor)
        for name, tensor in tensors.items()
        if name.startswith(inside)
    }
    return {name: rows for name, rows in found.items() if rows is not None}


def check_tensors(own: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> None:
    """Compare a checkpoint's tensors with a model's own.

    Raises:
        InputError: other names, shapes or formats.
    """
    mend = "use the checkpoint's own configuration"
    missing, extra = sorted(own.keys() - there.keys()), sorted(there.keys() - own.keys())
    if missing or extra:
        got = f"missing {missing[:3]}, left over {extra[:3]}"
        raise InputError("checkpoint", "the tensors of this model", got, mend)
    for name, mine in own.items():
        other = there[name]
        if mine.shape != other.shape or mine.dtype != other.dtype:
            raise InputError(
                f"checkpoint: {name}",
                f"{mine.dtype} {list(mine.shape)}",
                f"{other.dtype} {list(other.shape)}",
                f"{mend} (table formats are chosen by --table and --state)",
            )


def saved_tree(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LabelTree:
    """Build the label tree of a checkpoint.

    Args:
        config: `Cascade.config()` of the model that was saved.
        tensors: its tensors.

    Raises:
        InputError: no tree in them.
    """
    children = [tensors[f"children_{r}"] for r in range(4) if f"children_{r}" in tensors]
    if not children or "order" not in tensors:
        mend = "use the checkpoint of a cascade"
        raise InputError("checkpoint", "a cascade with its label tree", "none", mend)
    arrays = tuple(c.cpu().numpy() for c in children)
    return LabelTree(arrays, tensors["order"].cpu().numpy(), dict(config.get("tree", {})))
