"""Calibrate what was trained: at the end of a training, or later by `xmlkernels calibrate`."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xmlkernels.data.dataset import Dataset, Split
from xmlkernels.data.formats.text_lines import read_raw_texts
from xmlkernels.data.inputs import check_dataset
from xmlkernels.errors import InputError
from xmlkernels.evaluation import predict_split
from xmlkernels.locks import own_folder
from xmlkernels.predict.base import TextPredictor
from xmlkernels.predict.calibrate import (
    DEPTH,
    Answers,
    fit_calibration,
    measure_calibration,
)
from xmlkernels.predict.calibration import CALIBRATION, sigmoid
from xmlkernels.predict.folders import dataset_folder, load
from xmlkernels.predict.forest import Forest
from xmlkernels.predict.model import Predictor
from xmlkernels.predict.ranked import Ranked, RankedPredictor
from xmlkernels.predict.source import forest_identity, ranker_identity
from xmlkernels.ranker.blend import best
from xmlkernels.training.folder import read_json, write_json
from xmlkernels.training.inputs import dataset_of_run

log = logging.getLogger(__name__)

Found = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Scores and labels [N, k] of the best labels, by the name of the split."""


@dataclass(frozen=True)
class CalibrateConfig:
    """What to calibrate, and how."""

    folder: str
    """The output folder of a run, of a ranker, or of `linear --trees N`."""
    checkpoint: str = ""
    """The run that a ranker was trained beside, where it has moved since."""
    dataset: str = ""
    """The dataset folder whose validation split is used; by default the one it was trained on."""
    bands: int = 5
    """Groups of labels by how many training documents they have, each with a curve of its own; a
    group with fewer than 50 right answers joins the next."""
    method: Literal["auto", "isotonic", "platt"] = "auto"
    """isotonic: any rising curve; platt: a sigmoid; auto: isotonic where a group has 200 right
    answers or more."""
    precision: float = 0.8
    """The share of right labels that the stored thresholds are to give."""
    batch: int = 64
    """Documents per pass of a model."""


def calibrate(options: CalibrateConfig) -> dict[str, Any]:
    """Fit the probabilities of a folder that training has written, and keep them there.

    metrics.json gets the measures as `calibration`.

    Returns:
        Measures by split, as of `measure_calibration`.

    Raises:
        InputError: no such folder, no validation split, or too few answers on it.
    """
    _settings(Path(options.folder), options)  # for a mistake in its name
    with own_folder(options.folder, "folder"):
        return calibrate_held(options)


def calibrate_held(options: CalibrateConfig) -> dict[str, Any]:
    """Calibrate a folder that the caller holds; see `calibrate`."""
    path = Path(options.folder)
    settings = _settings(path, options)
    dataset = _dataset(path, options, settings)
    if "val" not in dataset.splits:
        mend = "prepare the data with --validation-share, or name another --dataset"
        raise InputError(str(dataset.folder), "a validation split", "none", mend)
    checkpoint = options.checkpoint or settings.get("checkpoint") or None
    predictor = load(path, checkpoint)
    if isinstance(predictor, Predictor):
        check_dataset(dataset, predictor.labels, predictor.inputs)
    elif dataset.num_labels != predictor.labels:
        expected, got = f"{predictor.labels:,} labels, as the ranker has", f"{dataset.num_labels:,}"
        raise InputError(str(dataset.folder), expected, got, "name the ranker's own dataset")
    found = {
        name: _answers(predictor, split, settings, options.batch)
        for name, split in dataset.splits.items()
        if name in ("val", "test")
    }
    inner = path / "checkpoint" if (path / "checkpoint").is_dir() else path
    identity = _identity(predictor)
    how = {name: getattr(options, name) for name in ("bands", "method", "precision")}
    report = keep_calibration(inner, identity, found, dataset, **how)
    if (metrics := path / "metrics.json").is_file():
        write_json(metrics, read_json(metrics) | {"calibration": report})
    return report


def keep_calibration(
    folder: Path, identity: str, found: Found, dataset: Dataset, **how: Any
) -> dict[str, Any]:
    """Fit a calibration on the answers to the validation split, write it, and measure it.

    Args:
        folder: where the checkpoints or the ranker are.
        identity: of what gave the answers.
        found: answers to "val" and, where there is one, "test".
        dataset: the data.
        how: options of `fit_calibration`.

    Raises:
        InputError: too few right or wrong answers.
    """
    answers = {name: Answers.of(*pair, dataset.splits[name].labels) for name, pair in found.items()}
    train = dataset.splits["train"].labels
    how |= {"propensity": dataset.propensity, "identity": identity}
    fitted = fit_calibration(answers["val"], train, **how)
    fitted.save(folder)
    report: dict[str, Any] = {
        {"val": "validation"}.get(name, name): measure_calibration(fitted, one)
        for name, one in answers.items()
    }
    bands = zip(fitted.counts, fitted.methods, fitted.thresholds.tolist(), strict=True)
    report["bands"] = [
        {"most_documents": count, "method": method, "threshold": threshold}
        for count, method, threshold in bands
    ]
    report["wanted_precision"] = fitted.precision
    report["f1_probability"] = float(sigmoid(np.array(fitted.f1_cut)))
    where = "test" if "test" in report else "validation"
    log.info(
        f"calibrated on validation: expected calibration error of the five best labels on {where} "
        f"{report[where]['before']:.3f} before, {report[where]['after']:.3f} after"
    )
    return report


def calibrated_at_end(
    folder: Path, identity: str, found: Found, dataset: Dataset
) -> dict[str, Any]:
    """Calibrate at the end of a training, for its report; {} where validation is too small."""
    try:
        return {"calibration": keep_calibration(folder, identity, found, dataset)}
    except InputError as error:
        (folder / CALIBRATION).unlink(missing_ok=True)
        log.info(f"note: probabilities are not calibrated: {error}")
        return {}


def _settings(path: Path, options: CalibrateConfig) -> dict[str, Any]:
    """Return what the training of a folder was told; {} where --dataset makes up for it."""
    if (path / "config.json").is_file():
        return read_json(path / "config.json")
    if (path / "metrics.json").is_file():
        told = read_json(path / "metrics.json").get("options")
        if isinstance(told, dict):
            return told
    if options.dataset:
        return {}
    mend = "name the dataset folder as --dataset"
    raise InputError(str(path), "a config.json or metrics.json that names the data", "none", mend)


def _dataset(path: Path, options: CalibrateConfig, settings: dict[str, Any]) -> Dataset:
    """Open the dataset that is named, or the one of the training."""
    if options.dataset:
        return Dataset.open(options.dataset)
    if (path / "config.json").is_file():
        return dataset_of_run(path)
    return Dataset.open(dataset_folder(path) or settings["dataset"])


def _identity(predictor: TextPredictor) -> str:
    if isinstance(predictor, Predictor):
        return predictor.identity
    if isinstance(predictor, Forest):
        return forest_identity([one.reranker for one in predictor.rankers])
    assert isinstance(predictor, RankedPredictor)
    return ranker_identity(predictor.reranker)


def _answers(
    predictor: TextPredictor, split: Split, settings: Mapping[str, Any], batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the answers to a split as an evaluation would find them."""
    if isinstance(predictor, Predictor):
        inputs = predictor.inputs
        return predict_split(predictor.model, split, DEPTH, batch_size=batch, inputs=inputs)
    assert isinstance(predictor, Ranked)
    words = texts = split.texts
    if predictor.takes_pairs:
        own = settings.get({"val": "validation_text"}.get(split.name, f"{split.name}_text"))
        if not own:
            expected = f"the texts of its TF-IDF for the split {split.name}"
            raise InputError(str(split.folder), expected, "none", "train the ranker again")
        words = read_raw_texts(own)
    scores = predictor.scores(texts, words, DEPTH, batch_size=batch)
    return best(scores, split.filter_pairs, DEPTH)
