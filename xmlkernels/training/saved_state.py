"""The state that a run saves: its types, its checks, and the newest one that is whole."""

import json
import logging
from collections.abc import Container, Mapping
from typing import Annotated, Any, NotRequired, TypedDict

from torch import Tensor

from xmlkernels import InputError, dist
from xmlkernels.checkpoint import CheckpointFolder, RowRange
from xmlkernels.checksums import Files
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.inputs import Inputs
from xmlkernels.models.restore import check_config
from xmlkernels.records import Count, Meta, check_record
from xmlkernels.training.config import Config
from xmlkernels.tree.label_tree import LabelTree

log = logging.getLogger(__name__)

_ORDER = ("last", "earlier", "best")  # in which a run looks for a checkpoint that is whole
_MEND = "restore the checkpoint from a copy, or start over with --overwrite"
_Time = Annotated[float, Meta(ge=0)]


class _Seconds(TypedDict):
    train: _Time
    evaluate: NotRequired[_Time]
    save: NotRequired[_Time]


class Saved(TypedDict):
    """A checkpoint's state, as `RunState` writes it; older ones lack the keys that may be missing.

    Attributes:
        position: batches of the epoch that were trained on.
        pending: losses not logged yet, with their documents.
        beside: files beside the checkpoint that predictions need.
    """

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
    checkpoints: CheckpointFolder,
    config: Config,
    batches: int,
    rows: Mapping[str, RowRange] | None = None,
    on_disk: Container[str] = (),
) -> tuple[dict[str, Tensor], Saved, str]:
    """Load the newest checkpoint that is whole; those that are not are logged.

    Args:
        checkpoints: of the run.
        config: its settings.
        batches: updates per epoch.
        rows: of shared tables, which this process holds.
        on_disk: names of tensors that are not to be brought into memory.

    Returns:
        Its tensors, its state and its name.

    Raises:
        InputError: why the last one cannot be used, where none can.
    """

    def check(state: Mapping[str, Any]) -> None:
        check_state(state, config, batches, str(checkpoints.folder))

    tensors, state, which, reason = checkpoints.load_first(
        _ORDER, check=check, rows=rows, on_disk=on_disk, agree=_first_of_all
    )
    if which != "last":
        why = "there is no last checkpoint" if reason is None else f"{reason.where}: {reason.got}"
        log.info(
            f"note: {why}; going on from {checkpoints.folder / which}, the newest one that is whole"
        )
    found: Any = state  # as `check` has seen
    return tensors, found, which


def _first_of_all(error: InputError | None) -> InputError | None:
    """Return the error of the first process that has met one: it may be among its rows alone."""
    told = "" if error is None else json.dumps([error.where, error.expected, error.got, error.mend])
    found = next(filter(None, dist.gather_texts(told)), None)
    return error or (None if found is None else InputError(*json.loads(found)))


def check_state(state: Mapping[str, Any], config: Config, batches: int, where: str) -> None:
    """Refuse a state that no `RunState` writes, or that lies beyond this run.

    Raises:
        InputError: the first value that is wrong.
    """
    where = f"{where}, state"
    check_record(state, Saved, where=where, mend=_MEND)
    if "model" in state:
        check_config(state["model"])
    for name, most in (("epoch", config.epochs), ("position", batches)):
        if state[name] > most:
            expected = f"at most {most}, as long as the run is"
            raise InputError(f"{where}, $.{name}", expected, str(state[name]), _MEND)
    if state["best"]:
        missing = sorted({config.best_by, "epoch", "step"} - state["best"].keys())
        if missing:
            expected = "the best metric with its epoch and step"
            raise InputError(f"{where}, $.best", expected, f"no {missing[0]}", _MEND)


def check_same(state: Saved, dataset: Dataset, inputs: Inputs, tree: LabelTree | None) -> None:
    """Refuse to resume a run with other data, inputs or tree than it began with.

    Raises:
        InputError: the first that differs.
    """
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
            "resume with the tree it began with, which is beside its checkpoint",
        )
