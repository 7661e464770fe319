"""What a run says while it trains: how far it is, how long it takes, what its loss is to be read
against, what comes next.
"""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from patience import limited
from scipy.sparse import csr_matrix
from train_runs import RECIPES, cascade, make_dataset, make_tree, run, threads_kept, tiny

from xmlkernels.cli import train
from xmlkernels.ticks import duration
from xmlkernels.training import progress
from xmlkernels.training.progress import Frequencies, Progress


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"), keep_texts=True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass only where a test says so."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_tells_how_far_and_how_long(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Progress(1000, 200, reference="frequencies alone: 31.0")
    clock[0] += 50
    lines.tell(300, 0.3, 12.34, 64.0, a_sum=True)
    expected = (
        "step 300 of 1,000 (30%)  epoch 0.30  loss 12.3 per document (frequencies alone: 31.0)  64 "
        "documents/s"
    )
    assert capsys.readouterr().out == f"{expected}  about 6 min left\n"
    lines.tell(1000, 1.0, None, 64.0, a_sum=True)
    assert capsys.readouterr().out == "step 1,000 of 1,000 (100%)  epoch 1.00  64 documents/s\n"


def test_lines_come_by_time(clock: list[float]) -> None:
    lines = Progress(10, 0)
    assert lines.due(logged=True) and not lines.due()  # the first of the log at once
    lines.tell(1, 0.1, 1.0, 1.0, a_sum=True)
    for seconds, logged, slow in (
        (9, False, False),
        (2, True, False),
        (18, True, False),
        (2, True, True),
    ):
        clock[0] += seconds
        assert (lines.due(logged=True), lines.due()) == (logged, slow)
    silent = Progress(10, 0)
    assert not silent.due()
    clock[0] += 10
    assert silent.due()  # --log-every may be far away


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 41, 130, 5900, 12345)] == [
        "0 s",
        "41 s",
        "2 min",
        "98 min",
        "3 h 26 min",
    ]


def test_a_mean_is_read_against_the_first(
    clock: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    fresh = Progress(10, 0, log=log)
    fresh.tell(1, 0.1, 0.05, 1.0, a_sum=False)
    fresh.tell(2, 0.2, 0.01, 1.0, a_sum=False)
    log.write_text('{"step": 1, "lo\n[1]\n{"loss": "x"}\n')  # lines that a kill cut short
    with log.open("a") as lines:
        lines.write(
            '{"step": 1, "split": "validation", "loss": 9}\n{"step": 1, "loss": null}\n{"step": 2, '
            '"loss": 0.25}\n'
        )
    Progress(10, 5, log=log).tell(6, 0.6, 0.01, 1.0, a_sum=False)
    told = [re.findall(r"loss .*?(?=  )", line)[0] for line in capsys.readouterr().out.splitlines()]
    assert told == ["loss 0.05", "loss 0.01 (at first: 0.05)", "loss 0.01 (at first: 0.25)"]


@pytest.mark.parametrize("label_texts", [False, True])
def test_the_loss_of_frequencies(label_texts: bool) -> None:
    """As binary cross-entropy has it of a model whose logits are the log-odds of the
    frequencies.
    """
    labels = csr_matrix(np.array([[1, 0, 1], [1, 0, 0], [1, 0, 1], [0, 0, 1]], np.float32))
    other = csr_matrix(np.array([[0, 1, 0], [1, 0, 0]], np.float32))
    found = Frequencies(labels, label_texts=label_texts)
    seen = np.vstack([labels.toarray(), np.eye(3)]) if label_texts else labels.toarray()
    chance = (seen.sum(0) + 0.5) / (len(seen) + 1)
    logits = torch.tensor(np.log(chance / (1 - chance)))
    for targets, value in ((seen, found.loss()), (other.toarray(), found.loss(other))):
        rows = logits.expand(len(targets), -1)
        expected = torch.nn.functional.binary_cross_entropy_with_logits(
            rows, torch.tensor(targets).double(), reduction="sum"
        )
        assert math.isclose(value, float(expected) / len(targets), rel_tol=1e-6)
    assert found.told(other) == f"frequencies alone: {found.loss(other):.1f}"


def test_a_run_tells_its_progress(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny(dataset, tmp_path / "run", log_every=2))
    told = capsys.readouterr().out
    line = re.search(
        r"step 2 of \d+ \(\d+%\)  epoch \d.\d\d  loss [\d.]+ per document \(frequencies alone: "
        r"[\d.]+\)",
        told,
    )
    assert line
    assert re.search(
        r"validation after epoch 1: .* loss [\d.]+ per document \(frequencies alone: [\d.]+\)", told
    )


def test_lines_between_do_not_change_the_log(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of the terminal takes nothing from the next one of the log, and reads the device only
    when it comes.
    """
    asked = []
    run(tiny(dataset, tmp_path / "plain", log_every=4, loss_every=1))
    monkeypatch.setattr(Progress, "due", lambda self, *, logged=False: not logged)
    monkeypatch.setattr(Progress, "tell", lambda self, step, *rest, **more: asked.append(step))
    run(tiny(dataset, tmp_path / "told", log_every=4, loss_every=1))
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").open()]
        for name in ("plain", "told")
    ]
    assert [(x["step"], x["loss"]) for x in logs[0]] == [(x["step"], x["loss"]) for x in logs[1]]
    steps = logs[0][-1]["step"]
    assert asked == [step for step in range(1, steps + 1) if step % 4]


def test_a_cascade_has_the_first_loss_beside_it(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Progress, "due", lambda self, *, logged=False: logged)
    run(
        cascade(
            dataset,
            tmp_path / "run",
            make_tree(dataset, tmp_path / "tree.safetensors"),
            log_every=1,
            loss_every=1,
        )
    )
    told = capsys.readouterr().out
    first = re.search(r"step 1 of .*?loss ([\d.e-]+)  ", told)
    assert first and f"(at first: {first[1]})" in told


def test_a_finished_run_names_the_next_command(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    config = tiny(dataset, output, epochs=1)
    monkeypatch.setattr(train, "RECIPES", {"tiny": replace(RECIPES["tiny"], config=config)})
    with threads_kept():
        train.main(["tiny", "--epochs", "1"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("ask it: ")
    assert f"xmlkernels predict --checkpoint {output} --text" in last


def test_a_reader_that_leaves_ends_a_command_with_141() -> None:
    """`… | head`: rich would end it with status 1."""
    code = (
        "from xmlkernels.cli import console as report; report.command(lambda: [report.say('a line "
        "' * 1000) for _ in range(1000)])"
    )
    paths = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    with limited(process):
        process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 141 and process.stderr.read() == b""
    process.stderr.close()
