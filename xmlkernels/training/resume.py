"""Where a run stands, as its checkpoint says: every value by its type, and compared with the run
that goes on.
"""

import logging
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired, TypedDict

from torch import Tensor

from xmlkernels import InputError
from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.checksums import Files
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.inputs import Inputs
from xmlkernels.models.restore import check_config
from xmlkernels.records import Count, Meta, check_record
from xmlkernels.training.config import Config
from xmlkernels.tree.label_tree import LabelTree

log = logging.getLogger(__name__)

ORDER = ("last", "earlier", "best")  # in which a run looks for a checkpoint that is whole
_MEND = "restore the checkpoint from a copy, or start over with --overwrite"
_Time = Annotated[float, Meta(ge=0)]


class _Seconds(TypedDict):
    train: _Time
    evaluate: NotRequired[_Time]
    save: NotRequired[_Time]


class RunState(TypedDict):
    """What `Session` writes; keys that may be missing came in later."""

    dataset: str
    epoch: Count
    position: Count
    documents: Count
    log_bytes: Count
    best: dict[str, float]
    seconds: _Seconds
    pending: list[tuple[float, Count]]
    rng: dict[str, Any]
    other_rngs: NotRequired[list[dict[str, Any]]]
    inputs: NotRequired[dict[str, Any]]
    tree: NotRequired[str | None]
    model: NotRequired[dict[str, Any]]
    commits: NotRequired[list[str]]
    environment: NotRequired[dict[str, Any]]
    beside: NotRequired[Files]


def newest(
    checkpoints: CheckpointFolder, config: Config, batches: int
) -> tuple[dict[str, Tensor], RunState, str]:
    """Tensors and state of the newest checkpoint that is whole, and its name; one that is not is
    told of.

    Args:
        batches: steps of an epoch.

    Raises:
        InputError: why the last one cannot be used, where none can.
    """

    def check(state: Mapping[str, Any]) -> None:
        check_state(state, config, batches, str(checkpoints.folder))

    tensors, state, which, reason = checkpoints.load_first(ORDER, check=check)
    if which != "last":
        why = "there is no last checkpoint" if reason is None else f"{reason.where}: {reason.got}"
        log.info(
            f"note: {why}; going on from {checkpoints.folder / which}, the newest one that is whole"
        )
    found: Any = state  # as `check` has seen
    return tensors, found, which


def check_state(state: Mapping[str, Any], config: Config, batches: int, where: str) -> None:
    """InputError where a state is none that `Session` writes, or lies beyond this run."""
    where = f"{where}, state"
    check_record(state, RunState, where=where, mend=_MEND)
    if "model" in state:
        check_config(state["model"])
    for name, most in (("epoch", config.epochs), ("position", batches)):
        if state[name] > most:
            raise InputError(
                f"{where}, $.{name}",
                f"at most {most}, as long as the run is",
                str(state[name]),
                _MEND,
            )
    missing = (
        sorted({config.best_by, "epoch", "step"} - state["best"].keys()) if state["best"] else []
    )
    if missing:
        raise InputError(
            f"{where}, $.best", "the best metric with its epoch and step", f"no {missing[0]}", _MEND
        )


def check_same(state: RunState, dataset: Dataset, inputs: Inputs, tree: LabelTree | None) -> None:
    """InputError where a run would go on with other data, inputs or tree than it began with."""
    if state["dataset"] != dataset.content_hash:
        raise InputError(
            "--resume",
            f"dataset hash {state['dataset'][:12]}",
            dataset.content_hash[:12],
            "resume on the data it began with",
        )
    if state.get("inputs", inputs.config()) != inputs.config():
        raise InputError(
            "--resume",
            f"inputs {state['inputs']}, as the run began",
            str(inputs.config()),
            "resume with the packages and data it began with",
        )
    own = tree and tree.content_hash
    if (began := state.get("tree")) != own:
        raise InputError(
            "--resume",
            f"label tree {str(began)[:12]}, as the run began",
            str(own)[:12],
            "resume with the tree it began with, which lies beside its checkpoint",
        )
