"""Prediction: order, filters, files and pipes, and what the command says to a mistake."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from damage import without_checksums
from patience import limited
from train_runs import LABELS, finished_run, make_dataset

from xmlkernels import InputError
from xmlkernels.cli import predict
from xmlkernels.data.batches.tokens import Batches
from xmlkernels.data.dataset import Dataset, Split
from xmlkernels.evaluation import (
    _excluded,
    embed_split,
    evaluate_split,
    predict_and_embed_split,
    predict_split,
    score_matrix,
)
from xmlkernels.files import DataWarning
from xmlkernels.predict.base import Label
from xmlkernels.predict.model import CheckpointWarning, Predictor

# Lengths differ much and in no order, so that batches of like length are not batches of neighbours.
TEXTS = [" ".join(f"w{(7 * i + j) % 90}" for j in range(1 + (5 * i) % 13)) for i in range(41)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(dataset, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def predictor(finished: Path) -> Predictor:
    return Predictor.load(finished)


@pytest.fixture(scope="module")
def validation(dataset: Path) -> Split:
    return Dataset.open(dataset).splits["val"]


def alone(predictor: Predictor, text: str, k: int) -> list[Label]:
    return next(predictor.predict([text], k, batch_size=1, window=1, prefetch=0))


# ---- Predictor ----


@pytest.mark.parametrize(
    ("batch_size", "window", "prefetch"), [(4, 3, 2), (64, 16, 2), (1, 1, 0), (7, 1, 2)]
)
def test_answers_come_in_the_order_of_the_texts(
    predictor: Predictor, batch_size: int, window: int, prefetch: int
) -> None:
    got = list(
        predictor.predict(iter(TEXTS), 5, batch_size=batch_size, window=window, prefetch=prefetch)
    )
    assert len(got) == len(TEXTS)
    for text, labels in zip(TEXTS, got, strict=True):
        own = alone(predictor, text, 5)
        assert [x.score for x in labels] == pytest.approx([x.score for x in own], abs=1e-4), text
        assert labels[0].name == f"w{3 * labels[0].id}" and 0 < labels[0].probability < 1


def test_arrays_are_the_same_answers(predictor: Predictor) -> None:
    values, rows = predictor.predict_arrays(TEXTS, 6, batch_size=8)
    assert values.shape == rows.shape == (len(TEXTS), 6)
    assert values.dtype == np.float32
    assert rows.dtype == np.int64
    for own, value, row in zip(
        predictor.predict(TEXTS, 6, batch_size=8), values, rows, strict=True
    ):
        assert [x.id for x in own] == row.tolist() and [x.score for x in own] == value.tolist()
    empty = predictor.predict_arrays([], 6)
    assert empty[0].shape == empty[1].shape == (0, 6)


def test_more_labels_asked_than_there_are(predictor: Predictor) -> None:
    values, rows = predictor.predict_arrays(TEXTS[:3], LABELS + 4)
    assert (rows[:, LABELS:] == -1).all() and np.isneginf(values[:, LABELS:]).all()
    assert [sorted(row[:LABELS]) for row in rows.tolist()] == [list(range(LABELS))] * 3
    assert [len(labels) for labels in predictor.predict(TEXTS[:3], LABELS + 4)] == [LABELS] * 3


def test_one_text_is_answered_before_the_next_is_read(predictor: Predictor) -> None:
    read: list[str] = []

    def texts() -> Any:
        for text in TEXTS[:3]:
            read.append(text)
            yield text

    threads = threading.active_count()
    for number, _ in enumerate(
        predictor.predict(texts(), 2, batch_size=1, window=1, prefetch=0), 1
    ):
        assert len(read) == number and threading.active_count() == threads


def test_which_checkpoint(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint" / "best")
    with pytest.warns(CheckpointWarning, match="no best checkpoint yet; the last one is used"):
        found = Predictor.load(tmp_path / "run")
    assert torch.equal(
        found.model.head.weight, Predictor.load(finished, which="last").model.head.weight
    )
    with pytest.raises(InputError, match="best"):
        Predictor.load(tmp_path / "run", which="best")
    with pytest.raises(InputError, match="nowhere: expected the output folder of a run, got no"):
        Predictor.load(tmp_path / "nowhere")


def test_a_checkpoint_from_before_the_cascade_is_read(
    finished: Path, predictor: Predictor, tmp_path: Path
) -> None:
    """It names encoder and head without a kind of model, and tokens per text without a kind of
    inputs.
    """
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint" / "best" / "state.json"
    without_checksums(path.parent)
    head = json.loads(path.read_text())
    model, inputs = head["state"].pop("model"), head["state"].pop("inputs")
    head["state"] |= {
        "encoder": model["encoder"],
        "head": model["head"],
        "max_length": inputs["max_length"],
    }
    path.write_text(json.dumps(head))
    old = Predictor.load(tmp_path / "run")
    for ours, theirs in zip(
        old.predict_arrays(TEXTS, 5), predictor.predict_arrays(TEXTS, 5), strict=True
    ):
        assert np.array_equal(ours, theirs)
    for state in (head["state"] | {"model": {"kind": "bayes"}}, {"inputs": inputs}):
        path.write_text(json.dumps({**head, "state": state}))
        with pytest.raises(InputError, match="checkpoint.*: expected"):
            Predictor.load(tmp_path / "run")


# ---- splits ----


def test_filter_pairs_never_appear_and_the_cut_is_still_full(
    predictor: Predictor, validation: Split
) -> None:
    """The pairs are the best labels of each document, so that the unfiltered top k would hold
    nothing else.
    """
    k, excluded = 5, 7
    _, all_rows = predict_split(predictor.model, validation, LABELS, batch_size=16)
    few = {3: 2, 11: 0}  # documents with fewer pairs
    pairs = np.array(
        [
            (row, int(label))
            for row in range(len(validation))
            for label in all_rows[row, : few.get(row, excluded)]
        ],
        np.int64,
    )
    np.random.default_rng(0).shuffle(pairs)
    values, rows = predict_split(
        predictor.model, replace(validation, filter_pairs=pairs), k, batch_size=16
    )
    for row in range(len(validation)):
        skip = few.get(row, excluded)
        assert rows[row].tolist() == all_rows[row, skip : skip + k].tolist(), row
    assert np.isfinite(values).all() and (np.diff(values, axis=1) <= 0).all()


def test_each_document_of_a_batch_has_its_own_filter_pairs() -> None:
    pairs = np.array([(0, 5), (0, 7), (2, 1)])
    batch = SimpleNamespace(index=torch.tensor([2, 0, 1]))
    assert _excluded(batch, pairs).tolist() == [[1, -1], [5, 7], [-1, -1]]  # type: ignore[arg-type, union-attr]
    assert _excluded(SimpleNamespace(index=torch.tensor([1, 3])), pairs) is None  # type: ignore[arg-type]


def test_the_model_keeps_its_mode(predictor: Predictor, validation: Split) -> None:
    predictor.model.train()
    predict_split(predictor.model, validation, 2)
    evaluate_split(predictor.model, validation, 1)
    assert predictor.model.training
    predictor.model.eval()


def test_the_loss_is_the_binary_cross_entropy_of_torch(
    predictor: Predictor, validation: Split
) -> None:
    model, total = predictor.model, 0.0
    for batch in Batches(validation, 9, shuffle=False).epoch(0):
        with torch.no_grad():
            x = model.encoder(batch.input_ids, batch.attention_mask).double()
        target = torch.zeros(len(batch), LABELS, dtype=torch.float64)
        target[batch.pos_sample.long(), batch.pos_row] = 1
        logits = x @ model.head.weight.double().T
        total += float(
            torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        )
    tolerance = 1e-5 if model.head.weight.dtype == torch.float32 else 1e-2
    assert evaluate_split(model, validation, 1, batch_size=16).loss == pytest.approx(
        total / len(validation), rel=tolerance
    )


def test_one_pass_gives_predictions_and_loss(predictor: Predictor, validation: Split) -> None:
    found = evaluate_split(predictor.model, validation, 4, batch_size=16)
    own = predict_split(predictor.model, validation, 4, batch_size=16)
    assert np.array_equal(found.values, own[0]) and np.array_equal(found.labels, own[1])
    assert found.loss == evaluate_split(predictor.model, validation, 1, batch_size=16).loss


def test_one_pass_gives_predictions_and_embeddings(predictor: Predictor, validation: Split) -> None:
    *own, x = predict_and_embed_split(predictor.model, validation, 4, batch_size=16)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(
            own, predict_split(predictor.model, validation, 4, batch_size=16), strict=True
        )
    )
    assert np.array_equal(x, embed_split(predictor.model, validation, batch_size=16))
    assert x.shape[1] == predictor.model.width


def test_score_matrix_keeps_zero_and_negative_logits() -> None:
    values = np.array([[0.0, -1.5, -2.0], [3.0, -np.inf, -np.inf], [-np.inf] * 3], np.float32)
    rows = np.array([[4, 1, 3], [0, -1, -1], [-1, -1, -1]])
    matrix = score_matrix(values, rows, 6)
    assert matrix.shape == (3, 6) and matrix.getnnz(1).tolist() == [3, 1, 0]
    assert matrix.indices.tolist() == [1, 3, 4, 0]
    assert matrix.data.tolist() == [
        -1.5,
        -2.0,
        0.0,
        3.0,
    ]


# ---- the command ----


def ask(finished: Path, **options: Any) -> None:
    predict.run(predict.Options(str(finished), **options))


def test_files_in_and_out(
    finished: Path, predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["w0 w1 w2", "w30 w31", ""]
    (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in lines))
    records = [
        json.dumps(lines[0]),
        json.dumps({"title": "w30", "content": "w31"}),
        json.dumps({"text": ""}),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(records) + "\n")
    for source, out in (("in.txt", "a.jsonl"), ("in.jsonl", "b.jsonl")):
        ask(finished, input=str(tmp_path / source), top_k=4, output=str(tmp_path / out))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    found = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    for number, x in enumerate(found):
        own = alone(predictor, lines[number], 4)
        assert x["text"] == number
        assert [label["id"] for label in x["labels"]] == [label.id for label in own]
    ask(finished, input=str(tmp_path / "in.txt"), top_k=4, output=str(tmp_path / "out.npz"))
    scores = scipy.sparse.load_npz(tmp_path / "out.npz")
    assert scores.shape == (3, LABELS) and scores.getnnz(1).tolist() == [4, 4, 4]
    assert capsys.readouterr().out == ""


def test_an_empty_text_is_a_text(
    finished: Path, predictor: Predictor, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(finished, text="", top_k=3)
    assert [x["id"] for x in json.loads(capsys.readouterr().out)["labels"]] == [
        x.id for x in alone(predictor, "", 3)
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"text": "a", "input": "-"}, "either --text or --input, got both"),
        ({}, "either --text or --input, got neither"),
        ({"text": "a", "top_k": 0}, "--top-k"),
        ({"text": "a", "batch": 0}, "--batch"),
        ({"text": "a", "threads": -1}, "--threads"),
        ({"text": "a", "device": "gpu"}, "--device"),
        ({"text": "a", "output": "x.csv"}, ".jsonl or .npz"),
        ({"text": "a", "output": "x.npz", "latency": True}, "--latency"),
        ({"input": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], expected: str, finished: Path) -> None:
    with pytest.raises(InputError) as told:
        ask(finished, **options)
    assert expected in str(told.value)


def test_a_broken_line_of_json_is_named(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('"w0"\n{"label": 3}\n')
    with pytest.raises(InputError, match="in.jsonl:2"):
        ask(finished, input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_latency_counts_each_text_and_not_the_first_call(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "in.txt").write_text("w0\nw1 w2\n")
    made = []
    real = Predictor.predict

    def counted(self: Predictor, texts: list[str], *arguments: Any, **options: Any) -> Any:
        made.append((texts, options["prefetch"]))
        return real(self, texts, *arguments, **options)

    monkeypatch.setattr(Predictor, "predict", counted)
    ask(finished, input=str(tmp_path / "in.txt"), latency=True)
    assert made == [(["w0"], 0), (["w0"], 0), (["w1 w2"], 0)]
    assert "2 texts one by one: median" in capsys.readouterr().err


def test_broken_utf8_on_standard_input_is_counted_and_told_once(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"w0 w1\r\n\xff w2\nw3\n\xfe\xfe"))
    )
    with pytest.warns(DataWarning, match=r"replaced in 2 lines \(first: line 2\)") as told:
        ask(finished, input="-", top_k=1)
    assert len([w for w in told if w.category is DataWarning]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_lines_are_answered_one_by_one_and_a_closed_pipe_ends_it_quietly(finished: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "xmlkernels",
            "predict",
            "--checkpoint",
            str(finished),
            "--input",
            "-",
            "--threads",
            "1",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    with limited(process):
        for number in range(2):
            process.stdin.write(b"w0 w1\n")
            process.stdin.flush()
            # While standard input stays open.
            assert json.loads(process.stdout.readline())["text"] == number
        process.stdout.close()
        process.stdin.write(b"w2\n")
        process.stdin.close()
        complaint = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 128 + 13 and complaint == ""
