"""A run from start to end: what it writes, how it stops and goes on, what it refuses to
overwrite.
"""

import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import scipy.sparse
import torch
from runs_compared import Stopped, assert_same_run, log_of, metrics_of, stopped_at_save
from safetensors.torch import load_file
from train_runs import (
    LABELS,
    ROOT,
    TRAIN_DOCUMENTS,
    Config,
    evaluator,
    make_dataset,
    opened,
    run,
    session,
    tiny,
    weights,
)

from xmlkernels import InputError
from xmlkernels.checkpoint import CheckpointFolder, Content
from xmlkernels.predict.model import Predictor
from xmlkernels.training import stops
from xmlkernels.training.config import recorded
from xmlkernels.training.run_state import RunState

STEPS = 3 * (TRAIN_DOCUMENTS // 16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(tiny(dataset, output))
    return output


def test_a_run_writes_all_it_promises(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["batch"] == 16
    assert config["encoder"] == "tiny"
    assert len(config) == len(fields(Config))
    metrics = metrics_of(finished)
    for split in ("validation", "test"):
        for kind in ("P", "nDCG", "PSP", "PSnDCG", "R"):
            assert all(0 <= metrics[split][f"{kind}@{k}"] <= 100 for k in range(1, 6))
        assert metrics[split]["loss"] > 0
    assert metrics["steps"] == STEPS and metrics["skipped_steps"] == 0
    assert metrics["seconds"]["train"] > 0 and metrics["seconds"]["evaluate"] > 0
    assert metrics["peak_rss_mb"] > 50 and metrics["commit"] and "commits" not in metrics
    now = metrics["environment"]
    assert now["torch"] == torch.__version__ and now["threads"] == 1 and now["device"] == "cpu"
    assert now["autocast"] == "fp32" and now["table"] in ("fp32", "bf16") and now["state"] == "fp32"
    lines = log_of(finished)
    losses = [line["loss"] for line in lines if "split" not in line and line["loss"] is not None]
    assert losses[-1] < losses[0]
    evaluations = [line for line in lines if "split" in line]
    assert [line["split"] for line in evaluations].count("test") == 1  # looked at once, at the end
    # Validation once an epoch, and once more where the best epoch is not the last, whose figures
    # are known.
    again = [] if metrics["best"]["step"] == STEPS else [metrics["best"]["epoch"]]
    assert [line["epoch"] for line in evaluations if line["split"] == "validation"] == [
        1,
        2,
        3,
        *again,
    ]
    assert all(
        line["dataset"] == metrics["dataset_hash"] and line["loss"] > 0 for line in evaluations
    )
    files = list((finished / "checkpoint").rglob("*.safetensors"))
    assert sorted(f.parent.name for f in files if f.stem != "calibration") == [
        "best",
        "last",
        "last.1",
    ]
    assert all(load_file(f) for f in files)


def test_predictions_file_agrees_with_the_metrics(finished: Path, dataset: Path) -> None:
    scores = scipy.sparse.load_npz(finished / "predictions.npz").toarray()
    target = scipy.sparse.load_npz(dataset / "test" / "labels.npz").toarray()
    assert scores.shape == (50, LABELS)
    hit = float(target[range(len(target)), scores.argmax(1)].astype(float).mean() * 100)
    assert hit == pytest.approx(metrics_of(finished)["test"]["P@1"], abs=1e-6)


@pytest.mark.parametrize("part", [0.2, 0.7])
def test_a_killed_run_resumes_bit_for_bit(
    dataset: Path, finished: Path, tmp_path: Path, part: float
) -> None:
    """SIGKILL at a random moment, saves included (there is one after each step), then on as if
    nothing had been.
    """
    seed = int(os.environ.get("XMLKERNELS_KILL_SEED", secrets.randbits(32)))
    told, chance, output = f"XMLKERNELS_KILL_SEED={seed}", random.Random(seed), tmp_path / "killed"
    config = tiny(dataset, output, save_every=1)
    flags = [
        f"--{f.name.replace('_', '-')}={getattr(config, f.name)}"
        for f in fields(Config)
        if f.name
        in ("dataset", "output", "batch", "epochs", "log_every", "threads", "dropout", "save_every")
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train" / "run.py"), "tiny", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    wanted = f'"step": {2 * int(STEPS * part / 2) + 2 * chance.randrange(3)},'
    log, deadline = output / "log.jsonl", time.monotonic() + 120
    while (
        time.monotonic() < deadline
        and process.poll() is None
        and not (log.exists() and wanted in log.read_text())
    ):
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, (told, complaint.decode())
    assert not (output / "metrics.json").exists(), f"over before it could be killed; {told}"
    run(tiny(dataset, output, save_every=4, resume=True))
    assert_same_run(output, finished, told)


def test_without_save_every_the_best_and_the_last_epoch_alone_are_written(
    dataset: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation after epochs 2 and 3, the metric of the last no better: each is written, the first
    epoch is not.
    """
    written = []
    write = CheckpointFolder.write_last

    def told(self: CheckpointFolder, content: Content, *rest: Any) -> None:
        state = json.loads(content.text)
        written.append((state["epoch"], state["best"]["epoch"]))
        write(self, content, *rest)

    found = iter([7.0, 5.0])
    monkeypatch.setattr(CheckpointFolder, "write_last", told)
    better = RunState.improved
    monkeypatch.setattr(
        RunState, "improved", lambda self, metrics: better(self, metrics | {"P@1": next(found)})
    )
    run(tiny(dataset, tmp_path / "few", save_every=0, evaluate_every=2))
    assert written == [(2, 2), (3, 2)]
    assert weights(tmp_path / "few", "last") == weights(finished, "last")


@pytest.mark.parametrize("table", ["bf16", "fp8"])
def test_a_rich_run_resumes_bit_for_bit(table: str, dataset: Path, tmp_path: Path) -> None:
    """Label texts, micro-batches, a stochastically rounded table and state, running means: all of
    it is in the checkpoint.
    """
    options: dict[str, Any] = {
        "label_text": True,
        "micro_batch": 5,
        "table": table,
        "state": "bf16",
        "epochs": 2,
        "save_every": 5,
        "loss_every": 1,
        "ema": 0.9,
        "ema_start": 0.5,
        "ema_every": 3,
        "ema_tables": table != "fp8",
    }
    run(tiny(dataset, tmp_path / "whole", **options))
    assert metrics_of(tmp_path / "whole")["steps"] == 2 * -(-(TRAIN_DOCUMENTS + LABELS) // 16)
    # The last checkpoint is of step 15, between two log lines.
    stopped_at_save(tiny(dataset, tmp_path / "parts", **options), 5)
    run(tiny(dataset, tmp_path / "parts", **options, resume=True))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_stop_between_last_and_best_is_mended(
    dataset: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`last` says that it is the best, but `best` was not linked to it: resuming does it."""
    link = CheckpointFolder.save_best

    def stop(self: CheckpointFolder) -> None:
        raise Stopped

    monkeypatch.setattr(CheckpointFolder, "save_best", stop)
    with pytest.raises(Stopped):
        run(tiny(dataset, tmp_path))
    assert not CheckpointFolder(tmp_path / "checkpoint").exists("best")
    monkeypatch.setattr(CheckpointFolder, "save_best", link)
    opened(tiny(dataset, tmp_path, resume=True))
    assert weights(tmp_path, "best") == weights(tmp_path, "last")
    run(tiny(dataset, tmp_path, resume=True))
    assert_same_run(tmp_path, finished)


def test_a_run_stopped_in_its_validation_goes_on_from_the_step_before(
    dataset: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint is one of the end of the second epoch, not validated yet."""
    evaluate = evaluator.Evaluator.evaluate

    def asked_to_stop(self: evaluator.Evaluator, split: Any, **how: Any) -> Any:
        if self.run.epoch == 2:
            raise stops.Stopped(signal.SIGTERM)
        return evaluate(self, split, **how)

    with monkeypatch.context() as patch, pytest.raises(stops.Stopped, match="15"):
        patch.setattr(evaluator.Evaluator, "evaluate", asked_to_stop)
        run(tiny(dataset, tmp_path / "run", save_every=0))
    _, state = CheckpointFolder(tmp_path / "run" / "checkpoint").load("last")
    assert (state["epoch"], state["position"], state["steps"]) == (1, STEPS // 3, 2 * STEPS // 3)
    run(tiny(dataset, tmp_path / "run", save_every=0, resume=True))
    assert_same_run(tmp_path / "run", finished)


def test_a_run_stopped_after_its_last_save_writes_its_validation_once(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tiny(dataset, whole, epochs=1))

    def asked_to_stop(self: evaluator.Evaluator) -> Any:
        raise stops.Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(stops.Stopped, match="15"):
        patch.setattr(evaluator.Evaluator, "finish", asked_to_stop)
        run(tiny(dataset, parts, epochs=1))
    run(tiny(dataset, parts, epochs=1, resume=True))
    assert_same_run(parts, whole)
    lines = [json.loads(line) for line in (parts / "log.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines if "split" in line] == ["validation", "test"]


def test_counters_are_those_of_the_run_not_of_its_best_step(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first epoch is made the best; one step after it is skipped."""
    real = RunState.improved
    monkeypatch.setattr(
        RunState, "improved", lambda self, metrics: self.epoch == 1 and real(self, metrics)
    )
    calls = []

    def once_infinite(
        self: torch.nn.Module, inputs: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        calls.append(self.training)
        return output * float("inf") if sum(calls) == 15 and self.training else None

    build = session.build_model

    def hooked(*arguments: Any, **options: Any) -> Any:
        model = build(*arguments, **options)
        model.encoder.register_forward_hook(once_infinite)
        return model

    monkeypatch.setattr(session, "build_model", hooked)
    metrics = run(tiny(dataset, tmp_path))
    assert metrics["steps"] == STEPS and metrics["skipped_steps"] == 1
    assert (metrics["best"]["epoch"], metrics["best"]["step"]) == (1, STEPS // 3)
    _, state = CheckpointFolder(tmp_path / "checkpoint").load("best")
    assert state["steps"] == STEPS // 3
    lines = log_of(tmp_path)  # strict JSON, whatever the loss of that step was
    validated = [line for line in lines if line.get("split") == "validation"]
    assert [line["epoch"] for line in validated] == [1, 2, 3, 1]
    assert validated[3] == validated[0] != validated[2]


@pytest.mark.parametrize("splits", [("train", "test"), ("train",)])
def test_without_validation_the_last_step_is_the_best(
    splits: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(tiny(make_dataset(tmp_path / "raw", splits=splits), tmp_path / "run"))
    assert report["steps"] == report["best"]["step"] == STEPS and "validation" not in report
    told = " ".join(capsys.readouterr().out.split())
    assert "no validation split: the last step is kept" in told
    assert ("no metrics and no predictions.npz" in told) == ("test" not in splits)
    assert weights(tmp_path / "run", "best") == weights(tmp_path / "run", "last")
    assert (
        (tmp_path / "run" / "predictions.npz").exists() == ("test" in splits) == ("test" in report)
    )
    assert len(next(Predictor.load(tmp_path / "run").predict(["w0 w1"], 3))) == 3


# ---- folders, resuming, overwriting ----


def test_a_folder_that_holds_a_run_is_refused_before_any_work(
    finished: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (finished / "metrics.json").read_bytes()
    monkeypatch.setattr(session, "open_dataset", lambda config: pytest.fail("the data were opened"))
    with pytest.raises(InputError, match="--overwrite"):
        run(tiny(dataset, finished))
    with pytest.raises(InputError, match="seed: expected 0"):
        run(tiny(dataset, finished, seed=9, resume=True))
    assert (finished / "metrics.json").read_bytes() == before


def test_overwrite_leaves_nothing_of_the_old_run(
    dataset: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    stopped_at_save(tiny(dataset, tmp_path / "run", seed=5, overwrite=True), 1)
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == ["checkpoint", "config.json", "log.jsonl", "profile.json"]
    assert not list((tmp_path / "run" / "checkpoint").rglob("*.safetensors"))
    report = run(tiny(dataset, tmp_path / "run", seed=5, resume=True))
    assert report["steps"] == STEPS and log_of(tmp_path / "run")[0]["step"] == 2


def test_resume_without_a_run_says_so_and_begins(
    dataset: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny(dataset, tmp_path / "new", resume=True))
    assert "holds no run; starting from the beginning" in capsys.readouterr().out
    assert_same_run(tmp_path / "new", finished)


@pytest.mark.parametrize("left", ["longer", "none", "cut"])
def test_the_log_after_a_stop(
    left: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_at_save(tiny(dataset, tmp_path), 2)  # the checkpoint is of step 4, the log has 8 steps
    log = tmp_path / "log.jsonl"
    content = log.read_bytes()
    if left == "none":
        log.unlink()
    elif left == "cut":
        log.write_bytes(content[: content.index(b"\n") + 9])
    run(tiny(dataset, tmp_path, epochs=3, resume=True))
    steps = [line["step"] for line in log_of(tmp_path) if "split" not in line]
    first = {"longer": 2, "none": 6, "cut": 2}[left]
    assert steps == [
        step for step in range(first, STEPS + 1, 2) if not (left == "cut" and step == 4)
    ]
    assert ("lost lines" in capsys.readouterr().out) == (left != "longer")


def test_what_changed_before_a_resume_is_told_and_recorded(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(session, "commit", lambda: "aaa")
    stopped_at_save(tiny(dataset, tmp_path), 2)
    monkeypatch.setattr(session, "commit", lambda: "bbb")
    report = run(tiny(dataset, tmp_path, threads=2, resume=True))
    assert "threads 2 instead of 1; the run goes on, but not bit for bit" in capsys.readouterr().out
    assert report["commit"] == "aaa" and report["commits"] == ["aaa", "bbb"]


def test_losses_that_are_not_finite_stay_out_of_the_mean(dataset: Path, tmp_path: Path) -> None:
    _, state = opened(tiny(dataset, tmp_path))
    infinite, four = torch.tensor([float("inf")]), torch.tensor([4.0])
    for pending in ([(infinite, 2), (four, 2)], [(infinite, 2)]):
        state.pending = pending
        state.log_progress()
    assert [line["loss"] for line in log_of(tmp_path)] == [2.0, None]


def test_a_config_file_of_the_run_is_complete(finished: Path, dataset: Path) -> None:
    assert json.loads((finished / "config.json").read_text()) == recorded(tiny(dataset, finished))
