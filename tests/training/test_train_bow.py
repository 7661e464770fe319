"""A bag of words under either model: trained, resumed, served, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs_compared import assert_same_run, log_of, stopped_in_second_epoch
from train_runs import (
    ROOT,
    TRAIN_DOCUMENTS,
    Config,
    cascade,
    check,
    make_dataset,
    make_tree,
    run,
    tiny,
    weights,
)

from xmlkernels import InputError
from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.vectorizer import Vectorizer
from xmlkernels.evaluation import predict_split
from xmlkernels.parallel import most_threads
from xmlkernels.predict.model import Predictor

BOW: dict[str, Any] = {
    "encoder": "bow",
    "bow_width": 24,
    "min_df": 1,
    "encoder_lr": 0.1,
    "table_lr": 0.1,
    "table_optimizer": "adam",
    "bias": True,
    "warmup": 5,
    "top_k": 20,
}
CASCADE: dict[str, Any] = {
    "encoder": "bow",
    "bow_width": 24,
    "min_df": 1,
    "encoder_lr": 0.02,
    "layers": (),
    "warmup": 5,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"), keep_texts=True)


@pytest.fixture(scope="module")
def tree(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(dataset, tmp_path_factory.mktemp("tree") / "tree.safetensors")


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(tiny(dataset, output, **BOW))
    return output


def test_it_learns_and_is_served_by_its_own_vocabulary(finished: Path, dataset: Path) -> None:
    report = json.loads((finished / "metrics.json").read_text())
    assert report["test"]["P@1"] > 60  # the words give the labels away
    assert {path.name for path in (finished / "checkpoint").iterdir()} >= {
        "last",
        "best",
        "vocabulary",
    }
    predictor, split = Predictor.load(finished), Dataset.open(dataset).splits["test"]
    values, labels = predict_split(predictor.model, split, 5, inputs=predictor.inputs)
    served = predictor.predict_arrays(split.texts, 5, batch_size=7)
    assert np.array_equal(served[1][:, 0], labels[:, 0])
    assert np.allclose(served[0], values, atol=1e-4)


def test_a_killed_run_resumes_bit_for_bit(dataset: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    names = (*BOW, "dataset", "output", "batch", "epochs", "log_every", "threads", "dropout")
    config = tiny(dataset, output, save_every=1, **BOW)
    flags = [
        f"--{n.replace('_', '-')}" + ("" if n == "bias" else f"={getattr(config, n)}")
        for n in (*names, "save_every")
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train" / "run.py"), "tiny", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    log, deadline = output / "log.jsonl", time.monotonic() + 120
    while (
        time.monotonic() < deadline
        and process.poll() is None
        and not (log.exists() and '"step": 14,' in log.read_text())
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, complaint.decode()
    run(tiny(dataset, output, resume=True, **BOW))
    assert_same_run(output, finished)


def test_under_a_cascade_with_label_texts(dataset: Path, tree: Path, tmp_path: Path) -> None:
    """Words of the label names are documents too; stopped and resumed it ends as the whole run
    does.
    """
    options = CASCADE | {
        "label_text": True,
        "epochs": 4,
        "word_dropout": 0.1,
        "bow_activation": "none",
        "save_every": 5,
    }
    report = run(cascade(dataset, tmp_path / "whole", tree, **options))
    assert report["test"]["P@1"] > 30 and len(report["test"]["levels"]) == 2
    stopped_in_second_epoch(cascade(dataset, tmp_path / "parts", tree, **options))
    run(cascade(dataset, tmp_path / "parts", tree, **options, resume=True))
    assert weights(tmp_path / "parts", "last") == weights(tmp_path / "whole", "last")
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    served = Predictor.load(tmp_path / "parts")
    assert served.model.encoder.activation == "none"
    assert len(next(served.predict(["w0 w1"], 3))) == 3


def test_a_dataset_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="prepare the data with --keep-texts"):
        run(tiny(make_dataset(tmp_path / "raw"), tmp_path / "out", **BOW))
    assert not (tmp_path / "out").exists()


def test_no_frequent_words_are_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="words in at least 400 texts"):
        run(tiny(dataset, tmp_path / "out", **BOW | {"min_df": 400}))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def bags(tmp_path: Path) -> Path:
    """A dataset of bags of words: label l of 8 goes with the words 2 l and 2 l + 1."""
    random = np.random.default_rng(0)
    for name, documents in (("train", 120), ("val", 30), ("test", 30)):
        lines = [f"{documents} 16 8"]
        for _ in range(documents):
            own = sorted(random.choice(8, 2, replace=False).tolist())
            words = sorted({2 * label + int(random.integers(2)) for label in own})
            lines.append(f"{own[0]},{own[1]} " + " ".join(f"{word}:1.5" for word in words))
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    prepare(
        PrepareConfig(
            tmp_path / "bags",
            source="bow",
            train_text=tmp_path / "train.txt",
            validation_text=tmp_path / "val.txt",
            test_text=tmp_path / "test.txt",
        )
    )
    return tmp_path / "bags"


def test_a_dataset_of_bags_is_trained_and_says_that_it_cannot_read_texts(
    bags: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(tiny(bags, tmp_path / "run", **BOW | {"epochs": 6}))
    assert report["test"]["P@1"] > 80
    predictor = Predictor.load(tmp_path / "run")
    with pytest.raises(
        InputError,
        match="texts: expected a model with a vocabulary, got one trained on a bag-of-words file",
    ):
        list(predictor.predict(["w0"]))
    split = Dataset.open(bags).splits["test"]
    _, labels = predict_split(predictor.model, split, 1, inputs=predictor.inputs)
    assert 100 * split.labels[np.arange(len(split)), labels[:, 0]].mean() == pytest.approx(
        report["test"]["P@1"]
    )
    assert "--ngrams, --min-df and --max-features do nothing" in capsys.readouterr().out
    with pytest.raises(InputError, match="bags of words"):
        run(tiny(bags, tmp_path / "out"))
    with pytest.raises(InputError, match="--label-text: expected a dataset with label texts"):
        run(tiny(bags, tmp_path / "out", **BOW | {"label_text": True}))
    assert not (tmp_path / "out").exists()


def test_a_cascade_on_a_dataset_of_bags(bags: Path, tmp_path: Path) -> None:
    """The tree is made of the same columns."""
    options = CASCADE | {
        "tree_depths": (1, 2),
        "topk": (2, 3),
        "epochs": 6,
        "cache": str(tmp_path / "cache"),
        "bow_width": 16,
    }
    report = run(
        replace(
            cascade(bags, tmp_path / "run", Path(), **options), tree="", threads=most_threads() + 1
        )
    )
    assert report["test"]["P@1"] > 60
    assert [x["clusters"] for x in report["test"]["levels"]] == [
        2,
        4,
    ]


def test_biases_that_start_at_frequencies(dataset: Path, tmp_path: Path) -> None:
    """With a rate of 0 they are the frequencies at the end."""
    run(tiny(dataset, tmp_path, **BOW | {"frequency_bias": True, "table_lr": 0.0, "epochs": 1}))
    tensors, _ = CheckpointFolder(tmp_path / "checkpoint").load("last")
    share = (np.asarray(Dataset.open(dataset).splits["train"].labels.sum(0)).ravel() + 0.5) / (
        TRAIN_DOCUMENTS + 1
    )
    assert np.allclose(torch.sigmoid(tensors["head.bias"]).numpy(), share, atol=1e-6)
    with pytest.raises(InputError, match="--frequency-bias: expected --bias beside it"):
        check(replace(Config(), frequency_bias=True))


def test_rows_that_start_at_centroids(dataset: Path, tmp_path: Path) -> None:
    """With rates of 0 words and rows stay as they began, and the nearest centroid finds most labels
    already.
    """
    rates = {"table_lr": 0.0, "encoder_lr": 0.0, "epochs": 1, "table": "fp32", "bow_width": 64}
    found = {}
    for norm in (0.0, 0.5):
        found[norm] = run(
            tiny(dataset, tmp_path / str(norm), **BOW | rates | {"centroid_norm": norm})
        )["test"]["P@1"]
    tensors, _ = CheckpointFolder(tmp_path / "0.5" / "checkpoint").load("last")
    assert torch.allclose(tensors["head.weight"].norm(dim=1), torch.tensor(0.5), atol=1e-5)
    assert found[0.5] > 50 > found[0.0]
    with pytest.raises(InputError, match="--centroid-norm: expected 0 or more"):
        check(replace(Config(), centroid_norm=-1.0))
    with pytest.raises(InputError, match="--centroid-norm: expected --model end_to_end"):
        check(replace(Config(), model="cascade", centroid_norm=0.5))
    # What a recipe sets may be switched off.
    check(replace(Config(), model="cascade", centroid_norm=0.0), given={"centroid_norm"})


def test_a_checkpoint_beside_another_vocabulary_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    other = Vectorizer(longest=1, min_df=1)
    other.fit(["w0 w1", "w2"])
    other.save(tmp_path / "run" / "checkpoint" / "vocabulary")
    with pytest.raises(
        InputError, match=r"checkpoint/vocabulary/\S+: expected .*, as it was written, got"
    ):
        Predictor.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "given", "expected"),
    [
        ({"micro_batch": 4}, (), "--micro-batch: expected a transformer, got --encoder bow"),
        ({"accumulate": 2}, (), "--accumulate: expected a transformer"),
        ({"freeze": 1}, (), "--freeze: expected a transformer"),
        ({"clip": 1.0}, (), "--clip: expected a transformer"),
        ({"bottleneck": 8}, (), "--bottleneck: expected a transformer"),
        ({}, ("pooling",), "--pooling: expected a transformer"),
        ({}, ("max_length",), "--max-length: expected an encoder that reads tokens"),
        ({"ngrams": 0}, (), "--ngrams: expected 1 or more"),
        ({"min_df": 0}, (), "--min-df: expected 1 or more"),
        ({"max_features": -1}, (), "--max-features: expected 0 or more"),
        ({"word_dropout": 1.0}, (), "--word-dropout: expected from 0 to below 1"),
        ({"word_std": 0.0}, (), "--word-std: expected more than 0"),
        ({"bow_activation": "gelu"}, (), "--bow-activation: expected one of relu, none"),
        (
            {"encoder": "tiny"},
            ("bow_width",),
            "--bow-width: expected --encoder bow, got --encoder tiny",
        ),
    ],
)
def test_flags_that_do_not_belong_to_it_are_refused(
    changes: dict[str, Any], given: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(InputError) as told:
        check(replace(Config(), **{"encoder": "bow"} | changes), given)
    assert expected in str(told.value)
