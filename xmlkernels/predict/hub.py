"""Save what predicts as one folder, with a model card, and load it from the Hugging Face Hub.

Such a folder holds safetensors, JSON and text alone: no pickle, and no code that a loader would
run. `xmlkernels.load` reads it as it reads what training has written.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from xmlkernels.checkpoint.folder import load as load_checkpoint
from xmlkernels.checkpoint.folder import save as save_checkpoint
from xmlkernels.data.manifest import IDS
from xmlkernels.errors import InputError
from xmlkernels.files import replacing
from xmlkernels.models.saved import needed_for_prediction
from xmlkernels.predict.base import HUB_NAMES, NAMES, RANKER, TextPredictor
from xmlkernels.predict.calibration import CALIBRATION
from xmlkernels.predict.card import model_card
from xmlkernels.predict.folders import MODEL, load, named_in
from xmlkernels.predict.forest import Forest
from xmlkernels.predict.model import Predictor
from xmlkernels.predict.ranked import RankedPredictor
from xmlkernels.predict.source import CLUSTERS, VECTORIZER

OURS = "xmlkernels"  # the library that a folder's config.json names
_SAFE = ["*.safetensors", "*.json", "*.txt", "*.model", "README.md"]
_WRITTEN = {
    "README.md", "config.json", HUB_NAMES, IDS, RANKER, CALIBRATION, "best", "tokenizer",
    "vocabulary", VECTORIZER, CLUSTERS, MODEL,
}  # fmt: skip


def save_pretrained(
    predictor: TextPredictor, folder: str | Path, *, license: str | None = None
) -> Path:
    """Write a loaded predictor into a folder of its own, with a model card.

    Of a run it takes the checkpoint without the optimizer's states; of a ranker the model that it
    was trained beside, too.

    Args:
        predictor: of `xmlkernels.load`.
        folder: a new or empty one, or one that this function wrote.
        license: for the card, as the Hub names it ("apache-2.0"); None says that none is stated.

    Raises:
        InputError: the folder holds something else, or the predictor was not loaded from one.
    """
    path = Path(folder)
    parts = predictor.rankers if isinstance(predictor, Forest) else (predictor,)
    sources = [part.folder.resolve() for part in parts if part.folder is not None]
    if any(path.resolve() in (source, *source.parents) for source in sources):
        got = "the folder that it was loaded from"
        raise InputError(str(path), "another folder", got, "name a new one")
    if path.is_dir() and (other := sorted(found.name for found in path.iterdir())):
        known = _WRITTEN | {name for name in other if name.startswith("tree")}
        named = (path / "config.json").is_file() and named_in(path, "config.json", "library_name")
        ours = named == OURS and set(other) <= known
        if not ours:
            raise InputError(
                str(path), "an empty folder", f"one that holds {other[0]}", "name another"
            )
        for name in other:
            shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()
    path.mkdir(parents=True, exist_ok=True)
    _write(predictor, path)
    model = predictor
    if isinstance(model, Forest):
        model = model.rankers[0]
    if isinstance(model, RankedPredictor) and model.model is not None:
        _write(model.model, path / MODEL)
    kind = type(predictor).__name__
    told = {"library_name": OURS, "predictor": kind, "labels": predictor.labels}
    _text(path / "config.json", json.dumps(told, indent=1) + "\n")
    _text(path / "README.md", model_card(predictor, license))
    return path


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    offline: bool = False,
    force_download: bool = False,
    **options: Any,
) -> TextPredictor:
    """Load a predictor from a folder of `save_pretrained`, or from the Hub by its name.

    Args:
        name: the folder, or "owner/name".
        revision: branch, tag or commit on the Hub.
        cache_dir, token: as huggingface_hub has them.
        force_download: fetch again what an earlier call has downloaded.
        offline: take what an earlier call has downloaded, without a network.
        options: of `xmlkernels.load`.

    Raises:
        InputError: no such folder, and no such repository, or none that can be reached.
    """
    if Path(name).is_dir():
        return load(name, **options)
    hub = _hub()
    try:
        folder = hub.snapshot_download(
            str(name),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=offline,
            force_download=force_download,
            allow_patterns=_SAFE,
        )
    except (OSError, ValueError) as error:
        raise not_found(name, error) from error
    return load(folder, **options)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise missing() from None
    return huggingface_hub


def not_found(name: str | Path, error: Exception) -> InputError:
    """Say that a model cannot be had from the Hub."""
    reason = (str(error).splitlines() or [""])[0][:200]
    mend = "check the name and the network"
    return InputError(str(name), "a folder or a model on the Hub", reason, mend)


def missing() -> InputError:
    """Say that the package of the Hub is not there."""
    mend = 'pip install "xmlkernels[hub]"'
    return InputError("the Hub", "the package huggingface_hub", "none", mend)


def _write(predictor: TextPredictor, path: Path) -> None:
    """Write the files of one predictor, without its model."""
    path.mkdir(parents=True, exist_ok=True)
    if isinstance(predictor, Forest):
        for number, ranker in enumerate(predictor.rankers):
            _write(ranker, path / f"tree{number}")
    elif predictor.folder is None:
        mend = "load it with xmlkernels.load"
        raise InputError("predictor", "one loaded from a folder", "another", mend)
    elif isinstance(predictor, Predictor):
        tensors, state = load_checkpoint(predictor.folder, needed_for_prediction)
        save_checkpoint(path / "best", tensors, state)
        _copy(predictor.folder.parent, path, (NAMES, HUB_NAMES, IDS, "tokenizer", "vocabulary"))
    else:
        _copy(predictor.folder, path, (RANKER, NAMES, HUB_NAMES, IDS, VECTORIZER, CLUSTERS))
    if predictor.calibration is not None:
        predictor.calibration.save(path)


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copy files and folders that there are; the names of the labels go into `labels.txt`."""
    for name in names:
        found, goal = source / name, target / (HUB_NAMES if name == NAMES else name)
        if found.is_dir():
            shutil.copytree(found, goal)
        elif found.is_file():
            shutil.copyfile(found, goal)


def _text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
