"""Calibrated probabilities: what they promise on planted data, and a run, a ranker and a forest
that training has calibrated.
"""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix, load_npz
from train_runs import make_dataset

import xmlkernels as xk
from xmlkernels import InputError
from xmlkernels.cli import calibrate as command
from xmlkernels.cli import ensemble, predict
from xmlkernels.data.dataset import Dataset
from xmlkernels.evaluation import predict_split
from xmlkernels.metrics import inverse_propensity
from xmlkernels.predict.calibrate import (
    Answers,
    calibration_error,
    fit_calibration,
    measure_calibration,
)
from xmlkernels.predict.calibration import (
    CALIBRATION,
    Calibration,
    CalibrationWarning,
    sigmoid,
)
from xmlkernels.training.calibrating import CalibrateConfig, calibrate

TEXTS = ["w0 w1 w2", "w30 w31", "w7 w8 w9 w50 w51"]
RARE, FREQUENT = 30, 30


def planted(documents: int, seed: int) -> Answers:
    """Rare labels' scores are log-odds 2 too high, frequent ones' are twice too far apart."""
    random = np.random.default_rng(seed)
    labels = np.stack([random.permutation(RARE + FREQUENT)[:10] for _ in range(documents)])
    odds = random.normal(-1, 2, labels.shape)
    true = random.random(labels.shape) < sigmoid(odds)
    scores = np.where(labels < RARE, odds + 2, odds * 2)
    order = np.argsort(-scores, axis=1)
    labels, scores = np.take_along_axis(labels, order, 1), np.take_along_axis(scores, order, 1)
    true = np.take_along_axis(true, order, 1)
    places = np.nonzero(true)
    rows = (places[0], labels[places])
    truth = csr_matrix((np.ones(len(rows[0])), rows), (documents, RARE + FREQUENT))
    return Answers.of(scores, labels, truth)


@pytest.fixture(scope="module")
def train() -> csr_matrix:
    """Labels below RARE have one document, the others ten."""
    own = [*range(RARE), *(label for label in range(RARE, RARE + FREQUENT) for _ in range(10))]
    return csr_matrix((np.ones(len(own)), (np.arange(len(own)), own)))


@pytest.mark.parametrize("method", ["auto", "isotonic", "platt"])
def test_planted_scores_become_probabilities(method: Any, train: csr_matrix) -> None:
    fitted = fit_calibration(planted(3000, 0), train, bands=2, method=method, precision=0.7)
    assert set(fitted.methods) == {"isotonic" if method == "auto" else method}
    assert fitted.counts == (1, 10)
    assert fitted.band.tolist() == [0] * RARE + [1] * FREQUENT
    report = measure_calibration(fitted, planted(3000, 1))
    assert report["before"] > 0.1 and report["after"] < 0.02
    assert report["before_10"] > 0.05 and report["after_10"] < 0.02
    assert abs(report["precision"] - 0.7) < 0.03 and report["recall"] > 0.3
    # Bands that compete on one scale rank better than scores of two scales.
    assert report["ranked"]["P@1"] > report["ranked_by_score"]["P@1"] + 1
    assert np.diff(fitted.knots, axis=1).min() >= 0


def test_one_curve_cannot_serve_both_groups(train: csr_matrix) -> None:
    fitted = fit_calibration(planted(3000, 0), train, bands=1)
    assert len(fitted.methods) == 1 and set(fitted.band) == {0}
    assert (
        measure_calibration(fitted, planted(3000, 1))["ranked"]["P@1"]
        < (
            measure_calibration(fit_calibration(planted(3000, 0), train), planted(3000, 1))[
                "ranked"
            ]["P@1"]
        )
    )


def test_within_a_band_the_order_stays(train: csr_matrix) -> None:
    fitted = fit_calibration(planted(1000, 0), train, bands=2)
    x = np.linspace(-50, 50, 4001)
    for label in (0, RARE):
        odds = fitted.log_odds(x, np.full(len(x), label))
        assert np.isfinite(odds).all() and (np.diff(odds) > 0).all()
    assert fitted.log_odds(np.array([1.0]), np.array([-1])) == -np.inf


def test_the_error_is_the_mean_gap_of_the_bins() -> None:
    p, true = np.array([0.1, 0.1, 0.9, 0.9]), np.array([False, True, True, True])
    assert abs(calibration_error(p, true) - (2 * 0.4 + 2 * 0.1) / 4) < 1e-12
    assert calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0


def test_thresholds_give_the_wanted_precision(train: csr_matrix) -> None:
    answers = planted(2000, 0)
    recalls = []
    for precision in (0.5, 0.8, 1.0):
        fitted = fit_calibration(answers, train, bands=2, precision=precision)
        own = fitted.band[answers.labels]
        for number, threshold in enumerate(fitted.thresholds):
            kept = (own == number) & (answers.scores >= threshold)
            assert not kept.any() or answers.true[kept].mean() >= precision
        recalls.append(measure_calibration(fitted, answers)["recall"])
    assert recalls == sorted(recalls, reverse=True)


def test_one_cut_gives_the_highest_micro_f1(train: csr_matrix) -> None:
    answers = planted(2000, 0)
    fitted = fit_calibration(answers, train, bands=2)
    odds = fitted.log_odds(answers.scores, answers.labels)

    def micro_f1(least: float) -> float:
        kept = odds >= least
        return float(200 * (kept & answers.true).sum() / (kept.sum() + answers.truth.nnz))

    found = measure_calibration(fitted, answers)["f1"]
    assert found["microF1"] == pytest.approx(micro_f1(fitted.f1_cut))
    assert found["microF1"] >= max(micro_f1(x) for x in np.linspace(-4, 4, 161)) > 60
    assert found["labels"] == (odds >= fitted.f1_cut).sum() / 2000
    # On other documents it is near the best, and no worse than all ten.
    other = measure_calibration(fitted, planted(2000, 1))["f1"]
    assert abs(other["microF1"] - found["microF1"]) < 2


def test_too_few_answers_and_wrong_options(train: csr_matrix) -> None:
    answers = planted(5, 0)
    with pytest.raises(InputError, match="50 right and 50 wrong answers"):
        fit_calibration(answers, train)
    for how, told in (({"bands": 0}, "--bands"), ({"precision": 1.5}, "--precision")):
        with pytest.raises(InputError, match=told):
            fit_calibration(planted(100, 0), train, **how)


def test_saved_loaded_and_damaged(train: csr_matrix, tmp_path: Path) -> None:
    fitted = fit_calibration(planted(500, 0), train, identity="a")
    fitted.save(tmp_path)
    again = Calibration.load(tmp_path, RARE + FREQUENT)
    x, labels = np.linspace(-5, 5, 60), np.arange(60)
    assert np.array_equal(again.log_odds(x, labels), fitted.log_odds(x, labels))
    assert (again.methods, again.counts, again.identity) == (fitted.methods, fitted.counts, "a")
    assert again.f1_cut == fitted.f1_cut != 0
    with pytest.raises(InputError, match=r"band: expected uint8 \[61\], got uint8 \[60\]"):
        Calibration.load(tmp_path, 61)
    data = bytearray((tmp_path / CALIBRATION).read_bytes())
    data[-3] ^= 1
    (tmp_path / CALIBRATION).write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        Calibration.load(tmp_path, RARE + FREQUENT)


# ---- trained ----


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(made, tmp_path / "made")
    yield tmp_path / "made"


def test_training_calibrates_and_predictions_use_it(made: Path) -> None:
    for name, checkpoint in (("whole", None), ("beside", "whole"), ("ranker", None)):
        report = json.loads((made / name / "metrics.json").read_text())["calibration"]
        assert report["test"]["after"] < report["test"]["before"]
        with warnings.catch_warnings():
            warnings.simplefilter("error", CalibrationWarning)
            found = xk.load(made / name, checkpoint and made / checkpoint)
        assert found.calibration is not None
        values, rows = found.predict_arrays(TEXTS, 5)
        odds = found.calibration.log_odds(values, rows)
        for at, labels in enumerate(found.predict(TEXTS, 5)):
            told = [label.probability for label in labels]
            assert np.allclose(told, sigmoid(odds[at])) and not np.allclose(
                told, sigmoid(values[at])
            )
            assert np.allclose(found.probabilities(values, rows)[at], told)


def test_a_forest_has_a_calibration_of_its_own(made: Path) -> None:
    whole = xk.load(made / "forest")
    trees = xk.load([made / "forest" / "tree0", made / "forest" / "tree1"])
    assert whole.calibration is not None and trees.calibration is not None
    one, two = (list(found.predict(TEXTS, 3)) for found in (whole, trees))
    assert one == two and one[0][0].log_odds is not None
    assert "calibration" in json.loads((made / "forest" / "metrics.json").read_text())


def test_thresholds_and_order_of_predictions(made: Path) -> None:
    found = xk.load(made / "ranker")
    assert found.calibration is not None
    every = list(found.predict(TEXTS, 20))
    half = list(found.predict(TEXTS, 20, threshold=0.5))
    assert half == [[label for label in labels if label.probability >= 0.5] for labels in every]
    kept = list(found.predict(TEXTS, 20, threshold="calibrated"))
    low = found.calibration.thresholds[found.calibration.band]
    assert kept == [[x for x in labels if x.score >= low[x.id]] for labels in every]
    assert 0 < sum(map(len, kept)) < sum(map(len, every))
    kept = list(found.predict(TEXTS, 20, threshold="f1"))
    least = found.calibration.f1_cut
    assert kept == [[x for x in labels if (x.log_odds or 0) >= least] for labels in every]
    assert 0 < sum(map(len, kept)) < sum(map(len, every))
    by_odds = list(found.predict(TEXTS, 3, order="probability"))
    assert by_odds == [
        sorted(labels, key=lambda label: -(label.log_odds or 0))[:3] for labels in every
    ]


def test_rare_labels_rise_by_propensity(made: Path, calibrated_set: Path) -> None:
    found, dataset = xk.load(made / "ranker"), Dataset.open(calibrated_set)
    weight = inverse_propensity(dataset.splits["train"].labels, *dataset.propensity)
    assert found.calibration is not None
    assert np.allclose(found.calibration.weight, weight, rtol=1e-6)
    texts = dataset.splits["test"].texts[:20]
    every = list(found.predict(texts, 20))
    for power, order in ((0.5, "score"), (3.0, "score"), (3.0, "probability")):
        got = list(found.predict(texts, 4, propensity=power, order=order))  # type: ignore[arg-type]
        for labels, own in zip(got, every, strict=True):

            def gain(x: xk.Label) -> float:
                odds = x.score if order == "score" else x.log_odds  # noqa: B023
                return float(sigmoid(np.array(odds)) * weight[x.id] ** power)  # noqa: B023

            assert [x.id for x in labels] == [x.id for x in sorted(own, key=gain, reverse=True)[:4]]
    assert got != [labels[:4] for labels in every]
    assert list(found.predict(texts, 4, propensity=0.0)) == [labels[:4] for labels in every]
    with pytest.raises(InputError, match="propensity: expected a finite number from 0, got -1"):
        found.predict(texts, propensity=-1)


def test_a_calibration_follows_its_labels(train: csr_matrix) -> None:
    fitted = fit_calibration(planted(1000, 0), train, bands=2)
    kept = np.array([40, 3, 50])
    found = fitted.of_labels(kept, 2, "new")
    assert found.band.tolist() == [1, 0, 1, 0, 0] and found.identity == "new"
    assert found.weight.tolist() == [*fitted.weight[kept], *[fitted.weight.max()] * 2]


def test_what_an_uncalibrated_model_refuses(copied: Path) -> None:
    (copied / "whole" / "checkpoint" / CALIBRATION).unlink()
    found = xk.load(copied / "whole")
    assert next(found.predict(TEXTS, 1))[0].log_odds is None
    wanted = {"threshold": "calibrated"}, {"threshold": "f1"}, {"propensity": 0.1}
    for how in (*wanted, {"order": "probability"}):
        with pytest.raises(InputError, match="expected a calibrated model, got one without"):
            found.predict(TEXTS, 1, **how)  # type: ignore[arg-type]
    for how, told in (({"threshold": 2}, "threshold"), ({"order": "name"}, "order")):
        with pytest.raises(InputError, match=told):
            found.predict(TEXTS, 1, **how)  # type: ignore[arg-type]


def test_the_calibration_of_another_checkpoint_is_left_alone(copied: Path) -> None:
    inner = copied / "whole" / "checkpoint"
    Calibration.load(copied / "ranker", 30).save(inner)
    with pytest.warns(CalibrationWarning, match="of another checkpoint"):
        assert xk.load(copied / "whole").calibration is None


def test_the_calibration_of_an_older_version_is_made_anew(copied: Path) -> None:
    path = copied / "ranker" / CALIBRATION
    with safe_open(path, "numpy") as file:
        head = json.loads(file.metadata()["calibration"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del head["f1_cut"]
    save_file(tensors, path, {"calibration": json.dumps(head)})
    with pytest.warns(CalibrationWarning, match="is of an older version"):
        assert xk.load(copied / "ranker").calibration is None
    with pytest.warns(CalibrationWarning, match="is of an older version"):
        command.main([str(copied / "ranker")])
    assert xk.load(copied / "ranker").calibration is not None


@pytest.mark.parametrize("name", ["whole", "ranker", "forest"])
def test_a_calibration_that_was_not_copied_is_missed(copied: Path, name: str) -> None:
    inner = copied / name / "checkpoint" if name == "whole" else copied / name
    (inner / CALIBRATION).unlink()
    with pytest.warns(CalibrationWarning, match="is not there, though metrics.json tells of it"):
        assert xk.load(copied / name).calibration is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", CalibrationWarning)
        (copied / name / "metrics.json").unlink()
        assert xk.load(copied / name).calibration is None  # nothing tells of one


@pytest.mark.parametrize("name", ["whole", "ranker", "beside", "forest"])
def test_the_command_finds_what_training_found(
    copied: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by other batches: the same curves, from the folder alone."""
    inner = copied / name / "checkpoint" if name == "whole" else copied / name
    before = Calibration.load(inner, 30)
    (inner / CALIBRATION).unlink()
    moved = {"checkpoint": str(copied / "whole")} if name == "beside" else {}
    command.main([str(copied / name), "--batch", "7", *(f"--{k}={v}" for k, v in moved.items())])
    after = Calibration.load(inner, 30)
    least = f"labels of a probability of {sigmoid(np.array(after.f1_cut)):.4g} or more"
    assert f"test: {least}, the highest micro-F1 on validation" in capsys.readouterr().out
    assert after.identity == before.identity and np.array_equal(after.band, before.band)
    assert np.allclose(after.knots, before.knots, rtol=1e-3, atol=1e-3)


def test_options_of_the_command(copied: Path, tmp_path: Path) -> None:
    run = str(copied / "whole")
    batches = []

    def watched(*args: Any, **more: Any) -> Any:
        batches.append(more["batch_size"])
        return predict_split(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xmlkernels.training.calibrating.predict_split", watched)
        report = calibrate(CalibrateConfig(run, bands=1, method="isotonic", batch=9))
    assert batches == [9, 9]
    assert [band["method"] for band in report["bands"]] == ["isotonic"]
    one = calibrate(CalibrateConfig(run, method="platt", precision=0.3))
    assert {band["method"] for band in one["bands"]} == {"platt"} and one["wanted_precision"] == 0.3
    assert one["validation"]["recall"] > report["validation"]["recall"]
    assert json.loads((Path(run) / "metrics.json").read_text())["calibration"] == one
    # Other data: the same documents but no validation split.
    raw = make_dataset(tmp_path / "raw", splits=("train", "test"), keep_texts=True)
    with pytest.raises(InputError, match="expected a validation split, got none"):
        calibrate(CalibrateConfig(run, dataset=str(raw)))
    with pytest.raises(InputError, match="names the data"):
        calibrate(CalibrateConfig(str(tmp_path / "nowhere")))
    assert not (tmp_path / "nowhere").exists()


def test_predict_cuts_at_thresholds(made: Path, tmp_path: Path) -> None:
    words = ["--ranker", str(made / "ranker"), "--text", TEXTS[0], "--top-k", "20"]
    told = {}
    for cut in ("0.5", "calibrated", "f1"):
        predict.main([*words, "--threshold", cut, "--output", str(tmp_path / "out.jsonl")])
        told[cut] = json.loads((tmp_path / "out.jsonl").read_text())["labels"]
    found = xk.load(made / "ranker")
    for cut, value in (("0.5", 0.5), ("calibrated", "calibrated"), ("f1", "f1")):
        ids = [x.id for x in next(found.predict(TEXTS[:1], 20, threshold=value))]  # type: ignore[arg-type]
        assert [x["id"] for x in told[cut]] == ids and len(ids) < 20
    for more, wrong in (([], "--threshold"), (["--latency"], "--latency")):
        with pytest.raises(InputError, match=wrong):
            predict.main([*words, "--threshold", "0.5" if more else "half", *more])


def test_predict_ranks_by_propensity(made: Path, tmp_path: Path) -> None:
    words = ["--ranker", str(made / "ranker"), "--text", TEXTS[0], "--top-k", "5"]
    output = tmp_path / "out.jsonl"
    predict.main([*words, "--propensity", "3", "--output", str(output)])
    ids = [x["id"] for x in json.loads(output.read_text())["labels"]]
    found = xk.load(made / "ranker")
    assert ids == [x.id for x in next(found.predict(TEXTS[:1], 5, propensity=3))]
    assert ids != [x.id for x in next(found.predict(TEXTS[:1], 5))]
    for more, wrong in ((["--propensity", "-1"], "finite"), (["--latency"], "--latency")):
        with pytest.raises(InputError, match=wrong):
            predict.main([*words, "--propensity", "1", *more])


def test_sums_on_one_scale(copied: Path, calibrated_set: Path) -> None:
    """--calibrated sums what the calibrations make of each file's scores."""
    files = tuple(str(copied / name / "predictions.npz") for name in ("whole", "ranker"))
    output = copied / "sum.npz"
    ensemble.run(
        ensemble.Options(files, str(calibrated_set), calibrated=True, output=str(output), top_k=30)
    )
    total = np.zeros((len(Dataset.open(calibrated_set).splits["test"]), 30))
    for path, inner in zip(files, ("whole/checkpoint", "ranker"), strict=True):
        matrix = load_npz(path).tocsr()
        odds = Calibration.load(copied / inner, 30).log_odds(matrix.data, matrix.indices)
        total += csr_matrix((sigmoid(odds), matrix.indices, matrix.indptr), total.shape) / 2
    found = load_npz(output)
    assert np.allclose(sigmoid(found.data), total[found.nonzero()], atol=1e-6)
    (copied / "ranker" / CALIBRATION).unlink()
    with pytest.raises(InputError, match=r"expected a calibration.safetensors, got no such file"):
        ensemble.run(ensemble.Options(files, str(calibrated_set), calibrated=True))
    with pytest.raises(InputError, match="--calibrated: expected logits"):
        ensemble.run(
            ensemble.Options(files, str(calibrated_set), calibrated=True, scores=("probability",))
        )
