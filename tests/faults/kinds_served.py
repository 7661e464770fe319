"""Models and rankers as they are served.

They are loaded with all that predictions need, and must give the answers of the good files.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from harness import Kind
from scipy.sparse import csr_matrix

from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.checksums import of_files
from xmlkernels.predict.base import RANKER
from xmlkernels.predict.calibrate import Answers, fit_calibration
from xmlkernels.predict.calibration import Calibration
from xmlkernels.predict.model import BESIDE, Predictor
from xmlkernels.predict.ranked import RankedPredictor
from xmlkernels.ranker.blend import Reranker
from xmlkernels.ranker.matcher import ClusterMatcher

V1 = Path(__file__).resolve().parents[1] / "fixtures" / "v1"
TEXTS = ["w0 w1 w2", "w30 w31", "", "w7 w8 w9 w50 w51"]
_ANSWERS: dict[str, tuple[np.ndarray, np.ndarray, list[str] | None]] = {}


def _serve(name: str) -> Kind:
    def make(folder: Path) -> None:
        """Write the old run of that name anew by today's writers."""
        inner = folder / "checkpoint"
        shutil.copytree(
            V1 / name / "checkpoint",
            inner,
            ignore=shutil.ignore_patterns("best", "last", "tree.safetensors"),
        )
        tensors, state = CheckpointFolder(V1 / name / "checkpoint").load("best")
        checkpoints = CheckpointFolder(inner)
        checkpoints.save_last(tensors, state | {"beside": of_files(inner, BESIDE)})
        shutil.move(inner / "last", inner / "best")

    def consume(folder: Path) -> None:
        predictor = Predictor.load(folder, which="best", threads=1)
        _same(name, (*predictor.predict_arrays(TEXTS, 4), predictor.label_names))

    return Kind(f"served {name}", make, consume)


def make_ranker(folder: Path) -> None:
    shutil.copytree(V1 / "ranker_tree", folder, dirs_exist_ok=True)
    ClusterMatcher.load(folder / "clusters").save(folder / "clusters")
    old = Reranker.load(folder / RANKER)
    facts = old.ranker.facts | {
        "beside": of_files(folder, ("label_names.txt", "vectorizer", "clusters"))
    }
    replace(old, ranker=replace(old.ranker, facts=facts)).save(folder / RANKER)


def consume_ranker(folder: Path) -> None:
    predictor = RankedPredictor.load(folder, threads=1)
    _same("ranker", (*predictor.predict_arrays(TEXTS, 4), predictor.label_names))


def _same(name: str, answers: tuple[np.ndarray, np.ndarray, list[str] | None]) -> None:
    """Compare with the first answers, which are those of the good files."""
    values, labels, names = _ANSWERS.setdefault(name, answers)
    assert (
        np.array_equal(values, answers[0])
        and np.array_equal(labels, answers[1])
        and names == answers[2]
    ), "other answers"


def make_calibration(folder: Path) -> None:
    random = np.random.default_rng(0)
    scores, labels = random.normal(size=(200, 4)), np.tile(np.arange(4), (200, 1))
    truth = csr_matrix((random.random((200, 4)) < 0.5).astype(np.float32))
    train = csr_matrix(np.eye(4, dtype=np.float32)[[0, 0, 1, 1, 2, 3, 3]])
    fit_calibration(Answers.of(scores, labels, truth), train, bands=2).save(folder)


def consume_calibration(folder: Path) -> None:
    found = Calibration.load(folder, 4)
    scores, labels = np.tile(np.linspace(-9, 9, 50), (4, 1)), np.tile(np.arange(4), (50, 1)).T
    odds = found.log_odds(scores, labels)
    assert np.isfinite(odds).all() and (np.diff(odds, axis=1) >= 0).all(), "no rising curve"
    _same("calibration", (odds, found.good_enough(scores, labels), None))


KINDS = [
    Kind("calibration", make_calibration, consume_calibration),
    *map(_serve, ("run", "cascade", "bow")),
    Kind("served ranker", make_ranker, consume_ranker),
]
