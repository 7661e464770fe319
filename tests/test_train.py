"""The commands, as a user runs them: train, stop, resume, predict, and what they say to a mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "data"))
from tiny_tokenizer import make_tokenizer  # noqa: E402

TRAIN_DOCUMENTS, LABELS = 160, 30


def texts_and_labels(documents: int, seed: int) -> tuple[list[str], list[list[int]]]:
    """Documents whose words give their labels away: label l goes with the words w3l, w3l+1, w3l+2."""
    random = np.random.default_rng(seed)
    texts, labels = [], []
    for _ in range(documents):
        own = sorted(random.choice(LABELS, 2, replace=False).tolist())
        words = [f"w{3 * label + int(random.integers(3))}" for label in own for _ in range(3)]
        texts.append(" ".join(words[: int(random.integers(4, 7))]))
        labels.append(own)
    return texts, labels


def write_part(folder: Path, part: str, documents: int, seed: int) -> None:
    texts, labels = texts_and_labels(documents, seed)
    (folder / f"{part}_X.txt").write_text("".join(f"{t}\n" for t in texts))
    lines = [f"{documents} {LABELS}", *(" ".join(f"{label}:1" for label in own) for own in labels)]
    (folder / f"{part}_X_Y.txt").write_text("".join(f"{line}\n" for line in lines))


def call(script: str, *arguments: str, good: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "train" / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode == 0) == good, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for number, (part, documents) in enumerate((("trn", TRAIN_DOCUMENTS), ("val", 40), ("tst", 50))):
        write_part(folder, part, documents, number)
    (folder / "Y.txt").write_text("".join(f"w{3 * label}\n" for label in range(LABELS)))
    tokenizer = make_tokenizer(folder / "tokenizer")
    out = folder / "dataset"
    call(
        "prepare.py",
        *(f"--train-text {folder}/trn_X.txt --train-labels {folder}/trn_X_Y.txt").split(),
        *(f"--validation-text {folder}/val_X.txt --validation-labels {folder}/val_X_Y.txt").split(),
        *(f"--test-text {folder}/tst_X.txt --test-labels {folder}/tst_X_Y.txt --label-text {folder}/Y.txt").split(),
        *(f"--tokenizer {tokenizer} --max-length 16 --output {out}").split(),
    )
    return out


def settings(dataset: Path, output: Path, *more: str) -> list[str]:
    fixed = f"tiny --dataset {dataset} --output {output} --batch 16 --epochs 3 --log-every 2 --threads 1 --dropout 0.1"
    return [*fixed.split(), *more]


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    call("run.py", *settings(dataset, output, "--save-every", "4"))
    return output


def test_a_run_writes_all_it_promises(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["batch"] == 16 and config["encoder"] == "tiny"
    metrics = json.loads((finished / "metrics.json").read_text())
    for split in ("validation", "test"):
        for kind in ("P", "nDCG", "PSP", "PSnDCG", "R"):
            assert all(0 <= metrics[split][f"{kind}@{k}"] <= 100 for k in range(1, 6))
    assert metrics["steps"] == 3 * (TRAIN_DOCUMENTS // 16)
    assert metrics["seconds"]["train"] > 0 and metrics["seconds"]["evaluate"] > 0
    assert metrics["peak_rss_mb"] > 50 and metrics["commit"]
    predictions = scipy.sparse.load_npz(finished / "predictions.npz")
    assert predictions.shape == (50, LABELS)
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    assert losses[-1] < losses[0]
    assert [line["split"] for line in lines if "split" in line].count("test") == 1  # looked at once, at the end


def test_predictions_file_agrees_with_the_metrics(finished: Path, dataset: Path) -> None:
    scores = scipy.sparse.load_npz(finished / "predictions.npz").toarray()
    target = scipy.sparse.load_npz(dataset / "test" / "labels.npz").toarray()
    hit = float(target[np.arange(len(target)), scores.argmax(1)].astype(np.float64).mean() * 100)
    assert hit == pytest.approx(json.loads((finished / "metrics.json").read_text())["test"]["P@1"], abs=1e-6)


@pytest.mark.parametrize("moment", [0.35, 0.7])
def test_a_killed_run_resumes_bit_for_bit(dataset: Path, finished: Path, tmp_path: Path, moment: float) -> None:
    """SIGKILL at a random step, then --resume: weights, optimizer states, metrics as in the run nobody stopped."""
    output = tmp_path / "killed"
    arguments = settings(dataset, output, "--save-every", "4")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    target = int(moment * 30) + int.from_bytes(os.urandom(1)) % 4
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train" / "run.py"), *arguments], env=environment, stdout=subprocess.DEVNULL
    )
    log, deadline = output / "log.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and f'"step": {target - target % 2},' in log.read_text():
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "metrics.json").exists(), "the run was over before it could be killed"
    told = call("run.py", *arguments, "--resume").stdout
    assert "resumed at step" in told
    for which in ("last", "best"):
        ours = load_all(output / "checkpoint", which)
        theirs = load_all(finished / "checkpoint", which)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[k], theirs[k]) for k in ours), which
    ours, theirs = (json.loads((f / "metrics.json").read_text()) for f in (output, finished))
    assert ours["test"] == theirs["test"] and ours["best"] == theirs["best"]


def load_all(folder: Path, which: str) -> dict[str, np.ndarray]:
    from xmlkernels.checkpoint import CheckpointFolder

    tensors, _ = CheckpointFolder(folder).load(which)
    return {k: v.flatten().view(torch.uint8).numpy().copy() for k, v in tensors.items()}


def test_checkpoints_are_safetensors(finished: Path) -> None:
    files = list((finished / "checkpoint").rglob("*.safetensors"))
    assert files and all(load_file(f) for f in files)


def test_label_texts_and_micro_batches_train_too(dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "augmented"
    options = ("--label-text", "--micro-batch", "5", "--epochs", "1", "--table", "bf16", "--momentum", "0")
    call("run.py", *settings(dataset, output, *options))
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["steps"] == -(-(TRAIN_DOCUMENTS + LABELS) // 16)


def test_predict_from_text_files_and_standard_input(finished: Path, tmp_path: Path) -> None:
    source, lines = tmp_path / "in.txt", ["w0 w1 w2", "w30 w31", ""]
    source.write_text("".join(f"{line}\n" for line in lines))
    out = tmp_path / "out.jsonl"
    call("predict.py", "--checkpoint", str(finished), "--input", str(source), "--top-k", "4", "--output", str(out))
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(x["labels"]) for x in found] == [4, 4, 4]
    for x in found:
        scores = [label["score"] for label in x["labels"]]
        assert scores == sorted(scores, reverse=True)
    assert found[0]["labels"][0]["name"].startswith("w")
    one = json.loads(call("predict.py", "--checkpoint", str(finished), "--text", lines[0], "--top-k", "4").stdout)
    assert [x["id"] for x in one["labels"]] == [x["id"] for x in found[0]["labels"]]
    matrix = tmp_path / "out.npz"
    call("predict.py", "--checkpoint", str(finished), "--input", str(source), "--output", str(matrix), "--top-k", "4")
    scores = scipy.sparse.load_npz(matrix)
    assert scores.shape == (3, LABELS) and scores.getnnz(1).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tiny", "--epoch", "3"], "--epochs"),
        (["tiney"], "tiny"),
        (["tiny", "--dataset", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_of_run_are_told(arguments: list[str], expected: str, tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "out")] if len(arguments) > 1 else []
    done = call("run.py", *arguments, *output, good=False)
    assert done.returncode == 2
    assert expected in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_not_overwritten(finished: Path, dataset: Path) -> None:
    before = (finished / "metrics.json").read_bytes()
    done = call("run.py", *settings(dataset, finished), good=False)
    assert "--overwrite" in done.stderr
    assert (finished / "metrics.json").read_bytes() == before


def test_resume_with_other_settings_is_refused(finished: Path, dataset: Path) -> None:
    done = call("run.py", *settings(dataset, finished, "--save-every", "4", "--seed", "9", "--resume"), good=False)
    assert "seed: expected 0" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--text", "a", "--input", "-"], "either --text or --input"),
        ([], "either --text or --input"),
        (["--text", "a", "--top-k", "0"], "--top-k"),
        (["--text", "a", "--output", "x.csv"], ".jsonl or .npz"),
    ],
)
def test_mistakes_of_predict_are_told(arguments: list[str], expected: str, finished: Path) -> None:
    done = call("predict.py", "--checkpoint", str(finished), *arguments, good=False)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr
