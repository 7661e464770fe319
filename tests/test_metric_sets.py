"""RP and the F1 averages by hand and by scikit-learn; the 22 metrics of `annif eval` as Annif's."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.metrics import f1_score

from xmlkernels import InputError, metrics
from xmlkernels.cli import console
from xmlkernels.metrics import best_cut, cut_metrics

ANNIF = json.loads((Path(__file__).parent / "fixtures/annif/expected.json").read_text())
# Three points over four labels; the last point has no positive.
TOP = np.array([[0, 2, 1], [3, -1, -1], [1, 0, -1]])
TRUE = csr_matrix(np.array([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]], np.float32))


def padded(rows: list[list[int]]) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows), default=0)), -1)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return out


def case(name: str) -> tuple[np.ndarray, csr_matrix]:
    found = ANNIF[name]
    true = np.zeros((len(found["true"]), found["labels"]), np.float32)
    for number, row in enumerate(found["true"]):
        true[number, row] = 1
    return padded(found["suggested"]), csr_matrix(true)


def test_r_precision_by_hand():
    got = metrics.evaluate(TOP, TRUE, ks=(1, 2, 3))
    # hits by place: point 0: 1 0 1; point 1: 1 - -; two positives each
    assert got["RP@1"] == pytest.approx(100 * (1 / 1 + 1 / 1) / 3)
    assert got["RP@2"] == pytest.approx(100 * (1 / 2 + 1 / 2) / 3)
    assert got["RP@3"] == pytest.approx(100 * (2 / 2 + 1 / 2) / 3)


@pytest.mark.parametrize("name", ANNIF)
def test_f1_equals_scikit_learn(name):
    top, true = case(name)
    got = metrics.evaluate(top, true, ks=(1, 5)) | metrics.macro_metrics(top, true, ks=(5,))
    for k, average in ((1, "sample"), (5, "sample"), (1, "micro"), (5, "micro"), (5, "macro")):
        shown = np.zeros(true.shape)
        for number, row in enumerate(top[:, :k]):
            shown[number, row[row >= 0]] = 1
        kind = "samples" if average == "sample" else average
        theirs = f1_score(true.toarray(), shown, average=kind, zero_division=0)
        assert got[f"{average}F1@{k}"] == pytest.approx(100 * theirs, abs=1e-9)


@pytest.mark.parametrize("block", [1 << 20, 30])
@pytest.mark.parametrize("name", ANNIF)
def test_equals_annif_eval(name, block, monkeypatch):
    monkeypatch.setattr("xmlkernels.metrics.points.BLOCK", block)
    got = metrics.annif_metrics(*case(name), limit=ANNIF[name]["limit"])
    assert list(got) == list(ANNIF[name]["annif"]) and len(got) == 22
    for metric, theirs in ANNIF[name]["annif"].items():
        assert got[metric] == pytest.approx(theirs, abs=1e-6), metric


def test_annif_without_anything_predicted_or_true():
    got = metrics.annif_metrics(np.full((2, 3), -1), csr_matrix((2, 4), dtype=np.float32))
    assert got["NDCG"] == got["NDCG@5"] == 1 and sum(got.values()) == 3
    with pytest.raises(InputError, match="ks: expected whole numbers from 1"):
        metrics.annif_metrics(TOP, TRUE, limit=0)


def test_every_metric_has_its_sentence():
    weight = np.ones(4)
    names = (
        *metrics.evaluate(TOP, TRUE, weight),
        *metrics.macro_metrics(TOP, TRUE),
        *metrics.propensity_scored_recall(TOP, TRUE, weight),
        *metrics.annif_metrics(TOP, TRUE),
    )
    told = [metrics.sentence_of(name) for name in names]
    assert len(set(told)) == len(told)
    assert all(text.endswith(".") and text.count(".") == 1 and "{" not in text for text in told)


def test_a_cut_for_the_highest_micro_f1() -> None:
    # Kept down to 2.0: 3 of 4 answers right, of 4 true pairs: F1 = 6 / 8.
    rows = np.array([[0, 1, 2], [2, 0, -1]])
    scores = np.array([[5.0, 2.0, 1.0], [3.0, 2.0, -np.inf]])
    truth = csr_matrix(np.array([[1, 1, 0, 1], [0, 0, 1, 0]]))
    cut = best_cut(scores, rows, truth)
    assert cut == 1.5
    kept = np.where(scores >= cut, rows, -1)
    assert cut_metrics(kept, truth) == pytest.approx(
        {
            "microP": 75,
            "microR": 75,
            "microF1": 75,
            "sampleF1": (80 + 200 / 3) / 2,
            "labels": 2,
        }
    )
    # Equal scores go together, and the last answer has none below it.
    assert best_cut(np.full((2, 3), 7.0), rows, truth) == 7.0
    assert best_cut(np.zeros((1, 1)), np.array([[0]]), csr_matrix([[1]])) == 0
    empty = cut_metrics(np.full((2, 3), -1), truth)
    assert set(empty.values()) == {0.0}


def test_cuts_refuse() -> None:
    truth = csr_matrix(np.array([[1, 0]]))
    with pytest.raises(InputError, match=r"scores: expected shape \(1, 1\), got shape \(1, 2\)"):
        best_cut(np.zeros((1, 2)), np.array([[0]]), truth)
    with pytest.raises(InputError, match="expected one that is right, got none"):
        best_cut(np.zeros((1, 1)), np.array([[1]]), truth)


def test_tables_of_a_terminal_say_what_each_metric_is(capsys: pytest.CaptureFixture[str]):
    values = metrics.evaluate(TOP, TRUE, np.ones(4))
    console.print_comparison("all", {"test": values}, ("P", "PSnDCG"))
    shown = " ".join(capsys.readouterr().out.split())
    for kind in ("P", "PSnDCG"):
        assert f"{kind}@k: {metrics.sentence_of(f'{kind}@k')}" in shown
    report = {
        "dataset": "mine", "dataset_hash": "0" * 64, "propensity": (0.55, 1.5), "test": values,
        "macro": metrics.macro_metrics(TOP, TRUE), "steps": 1, "peak_rss_mb": 1.0,
        "seconds": {"train": 1.0, "evaluate": 1.0}, "skipped_steps": 0, "skipped_encoder_steps": 0,
    }  # fmt: skip
    console.print_metrics(report, Path("runs/mine"))
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for kind in ("P", "nDCG", "PSP", "R"):
        assert shown.count(f"{kind}@k: {metrics.sentence_of(f'{kind}@k')}") == 1
    for name in ("macroP@5", "macroR@5", "macroF1@5", "coverage@5", "abandonment@5"):
        assert f"{name} {report['macro'][name]:.2f} {metrics.sentence_of(name)}" in shown
