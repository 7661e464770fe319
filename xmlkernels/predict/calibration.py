"""Calibrated probabilities: a rising curve from scores to log-odds per band of label frequency.

A file `calibration.safetensors` beside a run's checkpoints or a ranker holds the curves, the band
of every label, and per band the score from which labels are right as often as was wanted.

Letters: N documents, k labels of each, L labels, G bands.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args

import numpy as np
from safetensors.numpy import save

from xmlkernels.checksums import ALGORITHM, check_seal, seal
from xmlkernels.data.formats.arrays import read_tensors
from xmlkernels.errors import InputError
from xmlkernels.files import replacing
from xmlkernels.ranker.blend import rare_first
from xmlkernels.records import Count, Meta, parse_record

CALIBRATION = "calibration.safetensors"
FORMAT = "xmlkernels-calibration-1"
MOST_BANDS, MOST_KNOTS = 32, 64
Chosen = Literal["calibrated", "f1"]
"""A threshold that calibration chose."""
CHOSEN = get_args(Chosen)
_AGAIN = "delete it, and calibrate again: xmlkernels calibrate"
_TENSORS = {
    "band": (np.uint8, 1),
    "knots": (np.float64, 3),
    "thresholds": (np.float64, 1),
    "weight": (np.float32, 1),
}


class CalibrationWarning(UserWarning):
    """A calibration is there that belongs to another model, and is left alone."""


class Head(TypedDict):
    """What the header of the file says."""

    identity: str
    precision: Annotated[float, Meta(gt=0, le=1)]
    f1_cut: float
    methods: list[str]
    counts: list[Count]


@dataclass(frozen=True)
class Calibration:
    """What the scores of one model mean.

    Attributes:
        band: uint8 [L], the band of each label.
        knots: fp64 [G, MOST_KNOTS, 2], scores and log-odds of each band's curve, both rising; rows
            that are not needed repeat the last one. Beyond its ends a curve has slope 1.
        thresholds: fp64 [G], the lowest score from which a band's labels are right in a share
            `precision` of the cases; infinity where none is.
        weight: fp32 [L], inverse propensities of the labels, above 0: how rare they are.
        precision: the share that was wanted.
        f1_cut: the calibrated log-odds from which labels have the highest micro-F1.
        methods: how each curve was fitted, "isotonic" or "platt".
        counts: the largest number of training documents of a band's labels; the last is that of
            the most frequent label.
        identity: of the model that the scores are of.
    """

    band: np.ndarray
    knots: np.ndarray
    thresholds: np.ndarray
    weight: np.ndarray
    precision: float
    f1_cut: float
    methods: tuple[str, ...]
    counts: tuple[int, ...]
    identity: str = ""

    def log_odds(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return calibrated log-odds, fp64, of scores and int labels of one shape.

        Rising in the score within a band. Where the label is -1 it is -infinity.
        """
        out = np.full(scores.shape, -np.inf)
        there = labels >= 0
        own = self.band[labels[there]]
        values, found = scores[there].astype(np.float64), np.empty(int(there.sum()))
        for number, curve in enumerate(self.knots):
            mine = own == number
            x = values[mine]
            inside = np.clip(x, curve[0, 0], curve[-1, 0])
            found[mine] = np.interp(inside, curve[:, 0], curve[:, 1]) + (x - inside)
        out[there] = found
        return out

    def good_enough(
        self, scores: np.ndarray, labels: np.ndarray, how: Chosen = "calibrated"
    ) -> np.ndarray:
        """Return whether each score reaches the threshold; False at -1.

        Args:
            scores, labels: of one shape.
            how: "calibrated", that of the label's band; "f1", the one of all labels.
        """
        if how == "f1":
            return self.log_odds(scores, labels) >= self.f1_cut
        reached = np.zeros(scores.shape, bool)
        there = labels >= 0
        reached[there] = scores[there] >= self.thresholds[self.band[labels[there]]]
        return reached

    def towards_rare(self, odds: np.ndarray, labels: np.ndarray, power: float) -> np.ndarray:
        """Return what labels are ranked by where rare ones are to rise: fp64, -infinity at -1.

        ln p of each label and `power` times the logarithm of its inverse propensity, as
        `ranker.blend.towards_rare` does for matrices.

        Args:
            odds: log-odds of the labels, of their shape.
            labels: int, -1 for none.
            power: 0 or more.
        """
        ranked = rare_first(odds, self.weight[np.maximum(labels, 0)], power)
        return np.where(labels >= 0, ranked, -np.inf)

    def of_labels(self, kept: np.ndarray, new: int, identity: str) -> Calibration:
        """Return the same for a model of other labels.

        Args:
            kept: int [K], labels that stay, in their new order.
            new: labels after them, which count among the rarest.
            identity: of that model.
        """
        band = np.append(self.band[kept], np.zeros(new, np.uint8))
        rarest = np.full(new, self.weight.max(initial=1), np.float32)
        weight = np.append(self.weight[kept], rarest)
        return replace(self, band=band, weight=weight, identity=identity)

    def save(self, folder: str | Path) -> None:
        """Write the file into a folder, whole or not at all."""
        tensors: dict[str, np.ndarray] = {name: getattr(self, name) for name in _TENSORS}
        told = {"format": FORMAT, "identity": self.identity, "precision": self.precision}
        told |= {"f1_cut": self.f1_cut}
        told |= {"methods": list(self.methods), "counts": list(self.counts)}
        head = {"calibration": json.dumps(told)}
        with replacing(Path(folder) / CALIBRATION) as file:
            file.write(save(tensors, head | {ALGORITHM: seal(tensors, head)}))

    @classmethod
    def load(cls, folder: str | Path, labels: int) -> Calibration:
        """Load what `save` wrote.

        Args:
            folder: where the file is.
            labels: L of the model beside it.

        Raises:
            InputError: no such file, a damaged one, or one of other labels.
        """
        path = Path(folder) / CALIBRATION
        name = str(path)
        head, found = read_tensors(path, "a calibration", _AGAIN)
        check_seal(head, found, {"calibration"}, name, _AGAIN)
        told: Any = parse_record(
            head.get("calibration", ""),
            Head,
            where=f"{name}, head",
            mend=_AGAIN,
            kind={"format": FORMAT},
        )
        bands = len(told["methods"])
        shapes = {"band": (labels,), "knots": (bands, MOST_KNOTS, 2), "thresholds": (bands,)}
        shapes["weight"] = (labels,)
        for key, (kind, _) in _TENSORS.items():
            there = found.get(key)
            if there is None or there.dtype != kind or there.shape != shapes[key]:
                got = "none" if there is None else f"{there.dtype} {list(there.shape)}"
                expected = f"{np.dtype(kind)} {list(shapes[key])}"
                raise InputError(f"{name}, {key}", expected, got, _AGAIN)
        rising = np.isfinite(found["knots"]).all() and (np.diff(found["knots"], axis=1) >= 0).all()
        whole = 1 <= bands <= MOST_BANDS and len(told["counts"]) == bands
        if not (rising and whole and (not labels or int(found["band"].max()) < bands)):
            expected = "a rising curve of finite numbers for each band"
            raise InputError(name, expected, "another", _AGAIN)
        if np.isnan(found["thresholds"]).any():
            raise InputError(f"{name}, thresholds", "numbers", "a NaN", _AGAIN)
        if not (np.isfinite(found["weight"]) & (found["weight"] > 0)).all():
            raise InputError(f"{name}, weight", "finite numbers above 0", "another", _AGAIN)
        return cls(
            found["band"],
            found["knots"],
            found["thresholds"],
            found["weight"],
            told["precision"],
            told["f1_cut"],
            tuple(told["methods"]),
            tuple(told["counts"]),
            told["identity"],
        )


def sigmoid(log_odds: np.ndarray) -> np.ndarray:
    """Return probabilities, without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * np.asarray(log_odds, np.float64))))


def calibration_beside(folder: str | Path, labels: int, identity: str) -> Calibration | None:
    """Load the calibration of a folder; None where there is none.

    One of another model, as where a run was resumed since, is left alone with a warning, as is one
    of an older version, which had no highest micro-F1. One that metrics.json tells of and that is
    not there, as where a folder was copied in part, is missed with a warning.

    Raises:
        InputError: a damaged one.
    """
    if not (Path(folder) / CALIBRATION).is_file():
        if _is_told(Path(folder)):
            note = f"{Path(folder) / CALIBRATION} is not there, though metrics.json tells of it"
            mend = "copy the whole folder again, or calibrate anew: xmlkernels calibrate"
            note = f"{note}: probabilities are not calibrated ({mend})"
            warnings.warn(note, CalibrationWarning, stacklevel=3)
        return None
    of = "an older version" if _is_older(Path(folder) / CALIBRATION) else "another checkpoint"
    if of == "another checkpoint":
        found = Calibration.load(folder, labels)
        if found.identity == identity:
            return found
    note = f"{Path(folder) / CALIBRATION} is of {of}: probabilities are not calibrated"
    warnings.warn(f"{note} (xmlkernels calibrate does it)", CalibrationWarning, stacklevel=3)
    return None


def _is_told(folder: Path) -> bool:
    """Return whether the metrics of a ranker, a forest or a run's checkpoints tell of curves."""
    above = folder.parent if folder.name == "checkpoint" else folder
    try:
        return bool(json.loads((above / "metrics.json").read_text("utf-8")).get("calibration"))
    except (OSError, ValueError, AttributeError):
        return False


def _is_older(path: Path) -> bool:
    head, _ = read_tensors(path, "a calibration", _AGAIN)
    try:
        told = json.loads(head.get("calibration", ""))
        return told.get("format") == FORMAT and "f1_cut" not in told
    except (ValueError, AttributeError):
        return False  # damaged: `Calibration.load` says how
