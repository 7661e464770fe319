"""Filtered pairs are never predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from prediction_inputs import RUN, ask
from train_runs import make_dataset, run, tiny

from xmlkernels import InputError
from xmlkernels.cli import predict
from xmlkernels.cli.filters import Barred
from xmlkernels.predict.model import Predictor

# ---- pairs that are never predicted ----


def test_filter_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["w0 w1 w2", "w30 w31", "w60", "w3"]
    (tmp_path / "x.txt").write_text("".join(f"{text}\n" for text in texts))
    plain = [[label.id for label in labels] for labels in Predictor.load(RUN).predict(texts, 6)]
    pairs = [
        (0, plain[0][0]),
        (0, plain[0][2]),
        (2, plain[2][1]),
        (2, 29),
        (2, 29),
        (3, plain[3][3]),
    ]
    (tmp_path / "pairs.txt").write_text("".join(f"{text} {label}\n" for text, label in pairs))
    expected = [[x for x in row if (text, x) not in pairs][:4] for text, row in enumerate(plain)]
    given: dict[str, Any] = {
        "input": str(tmp_path / "x.txt"),
        "filter": str(tmp_path / "pairs.txt"),
        "top_k": 4,
    }
    for more in ({}, {"batch": 1}, {"latency": True}):
        ask(**given, **more, output=str(tmp_path / "out.jsonl"))
        found = [
            json.loads(line)["labels"] for line in (tmp_path / "out.jsonl").read_text().splitlines()
        ]
        assert [[label["id"] for label in labels] for labels in found] == expected
    ask(**given, output=str(tmp_path / "out.npz"))
    matrix = scipy.sparse.load_npz(tmp_path / "out.npz")
    assert [sorted(matrix[row].indices.tolist()) for row in range(4)] == [
        sorted(row) for row in expected
    ]
    ask(**given)
    assert len(capsys.readouterr().out.splitlines()) == 4
    ask(**{**given, "top_k": 30}, output=str(tmp_path / "all.npz"))
    assert scipy.sparse.load_npz(tmp_path / "all.npz").getnnz(1).tolist() == [28, 30, 28, 29]


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ("0 30\n", "pairs.txt:1: expected a label from 0 to 29"),
        ("0 1\n2 1\n", "pairs.txt: expected texts from 0 to 1"),
        ("a\n", "pairs.txt:1"),
    ],
)
@pytest.mark.parametrize("output", ["out.jsonl", "out.npz"])
def test_filter_pairs_of_other_texts(tmp_path: Path, pairs: str, told: str, output: str) -> None:
    (tmp_path / "x.txt").write_text("w0\nw1\n")
    (tmp_path / "pairs.txt").write_text(pairs)
    with pytest.raises(InputError, match=told):
        ask(
            input=str(tmp_path / "x.txt"),
            filter=str(tmp_path / "pairs.txt"),
            output=str(tmp_path / output),
        )
    assert not (tmp_path / output).exists()


def test_filter_pairs_of_a_ranker(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("w0 w1 w2\nw30 w31\n")
    given: dict[str, Any] = {
        "ranker": (str(RUN.parent / "ranker_tree"),),
        "input": str(tmp_path / "x.txt"),
        "top_k": 3,
    }
    for name in ("plain", "barred"):
        predict.run(predict.Options(**given, output=str(tmp_path / f"{name}.jsonl")))
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        given |= {"filter": str(tmp_path / "pairs.txt")}
        if name == "plain":
            first = [[label["id"] for label in json.loads(line)["labels"]] for line in lines]
            (tmp_path / "pairs.txt").write_text(f"0 {first[0][1]}\n1 {first[1][0]}\n")
    left = [[label["id"] for label in json.loads(line)["labels"]] for line in lines]
    assert left[0][:2] == [first[0][0], first[0][2]]
    assert left[1][:2] == first[1][1:]
    assert len(left[0]) == 3
    assert first[0][1] not in left[0] and first[1][0] not in left[1]


def test_what_is_left_of_fewer_labels() -> None:
    barred = Barred("x", np.array([[0, 2], [1, 0], [1, 1], [1, 2]]), 3)
    assert barred.needed(2) == 3  # all there are
    values = np.array([[3, 2, 1], [3, 2, -np.inf]], np.float32)
    rows = np.array([[2, 0, 1], [1, 0, -1]])
    kept, left = barred.kept_arrays(values, rows, 2)
    assert left.tolist() == [[0, 1], [-1, -1]] and kept.tolist() == [[2, 1], [-np.inf, -np.inf]]


def test_a_run_writes_no_filtered_pair(tmp_path: Path) -> None:
    """predictions.npz of train/run.py, and predict.py of the same texts and pairs."""
    raw = tmp_path / "raw"
    raw.mkdir()
    pairs = sorted({(n, (7 * n) % 30) for n in range(50)} | {(n, n % 30) for n in range(50)})
    (raw / "pairs.txt").write_text("".join(f"{text} {label}\n" for text, label in pairs))
    dataset = make_dataset(raw, test_filter=raw / "pairs.txt", keep_texts=True)
    run(tiny(dataset, tmp_path / "run", epochs=1))
    written = scipy.sparse.load_npz(tmp_path / "run" / "predictions.npz")
    assert written.nnz and not any(written[text, label] for text, label in pairs)
    options = predict.Options(
        str(tmp_path / "run"),
        input=str(raw / "tst_X.txt"),
        filter=str(raw / "pairs.txt"),
        top_k=5,
        output=str(tmp_path / "out.npz"),
    )
    predict.run(options)
    own = scipy.sparse.load_npz(tmp_path / "out.npz").tocsr()
    stored = set(zip(*own.nonzero(), strict=True))
    assert stored and not stored & set(pairs)
