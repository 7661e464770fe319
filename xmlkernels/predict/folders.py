"""Load whatever a training command has written: a run, a ranker, or several rankers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from xmlkernels.data.manifest import MANIFEST
from xmlkernels.errors import InputError
from xmlkernels.predict.base import FOREST, RANKER, TextPredictor
from xmlkernels.predict.forest import Forest
from xmlkernels.predict.model import Predictor, check_run
from xmlkernels.predict.ranked import RankedPredictor
from xmlkernels.records import Positive, read_record

MODEL = "model"  # in a folder to be shared, the model that its ranker was trained beside
_KNOWN = "the output folder of a run or of a ranker"


class _Forest(TypedDict):
    trees: Positive


def load(
    folder: str | Path | Sequence[str | Path],
    checkpoint: str | Path | None = None,
    *,
    which: str | None = None,
    device: str | torch.device = "cpu",
    threads: int = 0,
    table_store: str = "auto",
) -> TextPredictor:
    """Load the predictor of a folder that training has written.

    Args:
        folder: the output folder of a run (or the `checkpoint` folder in it), that of a ranker, or
            those of several rankers, whose mean is taken (a forest); of `linear --trees N` its one
            output folder will do.
        checkpoint: with a ranker: the run that it was trained beside, if there was one.
        which: the run's checkpoint, "best" or "last"; see `Predictor.load`.
        device: where the model computes.
        threads: CPU threads of the predictor; 0 leaves the choice to torch and numba.
        table_store: where the label table of a run is meanwhile; see `Predictor.load`.

    Returns:
        A `Predictor`, `RankedPredictor` or `Forest`; each has `predict(texts, k)`.

    Raises:
        InputError: nothing of that kind there, or a damaged folder.
    """
    single = isinstance(folder, str | Path)
    paths = [Path(folder)] if isinstance(folder, str | Path) else [Path(path) for path in folder]
    rankers = [path for path in paths if _is_ranker(path)]
    if single and not rankers:
        if checkpoint is not None:
            mend = "load the run alone, or name the ranker's folder first"
            raise InputError(str(paths[0]), "a ranker beside a checkpoint", "a run", mend)
        options: dict[str, Any] = {"device": device, "threads": threads, "table_store": table_store}
        return Predictor.load(paths[0], which=which, **options)
    if other := [path for path in paths if path not in rankers]:
        raise InputError(str(other[0]), "rankers alone", "a run", "load it by itself")
    if single and checkpoint is None and (paths[0] / MODEL / "best").is_dir():
        checkpoint = paths[0] / MODEL
    if which is not None and checkpoint is None:
        raise InputError("which", "a checkpoint to choose from", "none", "leave it out")
    how: dict[str, Any] = {"which": which, "device": device, "threads": threads}
    if single and not (paths[0] / RANKER).is_file():
        return Forest.load(_trees(paths[0]), checkpoint, **how)
    if single:
        return RankedPredictor.load(paths[0], checkpoint, **how)
    return Forest.load(paths, checkpoint, **how)


def _trees(path: Path) -> list[Path]:
    """Return the rankers that `linear --trees` wrote into a folder, in their order."""
    found: list[Path] = []
    whole = _trees_when_whole(path)
    while (tree := path / f"tree{len(found)}" / RANKER).is_file():
        found.append(tree.parent)
    if whole is not None and len(found) != whole:
        mend = "the training was stopped: go on with it by --resume"
        raise InputError(str(path), f"a forest of {whole} trees", f"{len(found)} of them", mend)
    return found


def _trees_when_whole(path: Path) -> int | None:
    """Return how many trees a forest was to have; None where its folder does not say."""
    if not (path / FOREST).is_file():
        return None
    mend = "start the training again"
    return read_record(path / FOREST, _Forest, mend=mend)["trees"]


def _is_ranker(path: Path) -> bool:
    """Return whether the folder is a ranker's and not a run's; InputError where it is neither."""
    if (path / RANKER).is_file() or (path.is_dir() and _trees(path)):
        return True
    check_run(path, _KNOWN, f"checkpoint/ and {RANKER}")
    return False


def named_in(folder: Path, file: str, key: str) -> Any:
    """Return what a JSON file of a run says, in the folder or above; None where it says nothing."""
    at = next((place for place in (folder, folder.parent) if (place / file).is_file()), None)
    if at is None:
        return None
    try:
        return json.loads((at / file).read_text("utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None


def dataset_folder(folder: Path) -> Path | None:
    """Return where the dataset of a run or a ranker is; None where it is there no more.

    The settings may name it relative to where the training was started; metrics.json does not.
    """
    found = named_in(folder, "metrics.json", "dataset_folder")
    return Path(found) if isinstance(found, str) and (Path(found) / MANIFEST).is_file() else None
