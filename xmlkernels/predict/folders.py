"""Load whatever a training command has written: a run, a ranker, or several rankers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xmlkernels.errors import InputError
from xmlkernels.predict.base import RANKER, TextPredictor
from xmlkernels.predict.model import Predictor
from xmlkernels.predict.ranked import Forest, RankedPredictor

MODEL = "model"  # in a folder to be shared, the model that its ranker was trained beside
_KNOWN = "the output folder of a run or of a ranker"


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
    while (tree := path / f"tree{len(found)}" / RANKER).is_file():
        found.append(tree.parent)
    return found


def _is_ranker(path: Path) -> bool:
    """Return whether the folder is a ranker's and not a run's; InputError where it is neither."""
    if not path.is_dir():
        got = "a file" if path.exists() else "no such folder"
        raise InputError(str(path), _KNOWN, got, "check the path")
    if (path / RANKER).is_file() or _trees(path):
        return True
    if not any((path / name).is_dir() for name in ("checkpoint", "best", "last")):
        got = f"a folder without checkpoint/ and {RANKER}"
        raise InputError(str(path), _KNOWN, got, "check the path")
    return False
