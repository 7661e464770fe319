"""The output folder of a ranker, or of the rankers of a forest: what is in it, and how it is left.

A folder holds one ranker, or one forest whose rankers are in tree0, tree1, … What an earlier
training left is removed before another one writes there: files of two must never be read as one.
"""

import json
import logging
import shutil
from pathlib import Path

from xmlkernels import InputError
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.manifest import IDS, PROFILE
from xmlkernels.predict.base import FOREST, NAMES, RANKER
from xmlkernels.predict.calibration import CALIBRATION
from xmlkernels.predict.source import CLUSTERS, VECTORIZER
from xmlkernels.report.page import REPORT
from xmlkernels.report.run import CHOICES
from xmlkernels.training.folder import copy_profile, write_names, write_text

log = logging.getLogger(__name__)

INPUTS, WRITTEN = "inputs", (REPORT, "metrics.json", "predictions.npz")
OTHERS = (RANKER, NAMES, IDS, PROFILE, CALIBRATION, CHOICES, FOREST)


def begin(folder: Path, dataset: Dataset) -> None:
    """Remove the ranker or the forest that the folder may hold, and write the labels' names.

    A ranker vouches for the files beside it, so it goes before they change.
    """
    _tell_replaced(folder)
    for name in (REPORT, "metrics.json", *OTHERS):
        (folder / name).unlink(missing_ok=True)
    remove_trees(folder, 0)
    write_names(folder, dataset)
    copy_profile(folder, dataset)


def refuse_held(path: str) -> None:
    """Refuse an --output that holds a ranker or a forest, before any work.

    Raises:
        InputError: naming what it holds.
    """
    for name in (RANKER, FOREST, "metrics.json"):
        if (Path(path) / name).exists():
            raise InputError(
                f"--output {path}",
                "a new folder",
                f"a folder that holds a ranker ({name})",
                "go on with it by --resume, replace it by --overwrite, or name another",
            )


def begin_forest(folder: Path, trees: int, kept: int = 0) -> None:
    """Remove the ranker or the forest that the folder may hold, and write how many trees will be.

    As long as fewer are there, nothing loads the folder.

    Args:
        folder: of the forest.
        trees: how many it will have.
        kept: its first trees, which stay.
    """
    if not kept:
        _tell_replaced(folder)
    for name in (*WRITTEN, *OTHERS):
        (folder / name).unlink(missing_ok=True)
    for name in (VECTORIZER, CLUSTERS, INPUTS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for number in range(kept, trees):
        (folder / f"tree{number}" / RANKER).unlink(missing_ok=True)
    remove_trees(folder, trees)
    write_count(folder, trees)


def write_count(folder: Path, trees: int) -> None:
    """Write how many trees a forest has."""
    write_text(folder / FOREST, json.dumps({"trees": trees}) + "\n")


def _tell_replaced(folder: Path) -> None:
    if (folder / RANKER).exists() or (folder / FOREST).exists():
        log.info(f"{folder}/ holds an earlier ranker, which is replaced")


def remove_trees(folder: Path, first: int) -> None:
    """Remove the rankers of a forest from a number on; what a person put beside them stays."""
    while (tree := folder / f"tree{first}").is_dir():
        for name in (*WRITTEN, *OTHERS):
            (tree / name).unlink(missing_ok=True)
        for name in (VECTORIZER, CLUSTERS, INPUTS):
            shutil.rmtree(tree / name, ignore_errors=True)
        if not any(tree.iterdir()):
            tree.rmdir()
        first += 1


def clear_inner(folder: Path) -> None:
    """Remove what a killed process left in the folders of vocabulary, clusters and inputs.

    Nothing but this command writes there.
    """
    for inner in (folder / VECTORIZER, folder / CLUSTERS, folder / INPUTS):
        for left in inner.glob(".*.part"):
            left.unlink(missing_ok=True)
