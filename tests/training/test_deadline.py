"""A deadline ends a training between two steps, with a run that is whole and goes on later."""

import itertools
import json
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from train_runs import make_dataset, opened, threads_kept, tiny, weights

import xmlkernels as xk
from xmlkernels.parallel import in_parallel
from xmlkernels.ticks import Ticks, TimeOver, given_up
from xmlkernels.training.clock import Deadline
from xmlkernels.training.loop import train

SETTINGS: dict[str, Any] = {
    "encoder": "bow", "bow_width": 16, "min_df": 1, "table_optimizer": "adam", "bias": True,
    "encoder_lr": 0.1, "table_lr": 0.1, "warmup": 5, "save_every": 0,
}  # fmt: skip


def test_a_run_ends_whole_and_goes_on_bit_for_bit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "xmlkernels")
    dataset = make_dataset(tmp_path / "raw", keep_texts=True)
    config = tiny(dataset, tmp_path / "run", **SETTINGS, report=True)
    hours = itertools.count()  # each look at the clock is an hour later
    with threads_kept():
        report = train(config, Deadline(14 * 3600, lambda: 3600.0 * next(hours)))
        told = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert told["time_over"] == {"minutes": 840, "epochs": 1.3, "planned": 3}
        assert report["steps"] == 13 and {"validation", "test"} <= told.keys()
        assert "the time is over (--minutes 840) after 1.3 of 3 epochs" in caplog.text
        lines = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        assert [x["epoch"] for x in lines if x.get("split") == "validation"] == [1, 1.3]
        assert [x["epoch"] for x in lines if x.get("time_over")] == [1.3]
        page = (tmp_path / "run" / "report.html").read_text("utf-8")
        assert "Its time was over (--minutes 840) after 1.3 of 3 epochs" in page
        xk.load(tmp_path / "run").predict(["w3 w4"], k=2)
        # Time for all of it: the weights are those of a run that nobody ended.
        report = train(replace(config, resume=True), Deadline(1e9))
        assert "time_over" not in report and report["steps"] == 30
        train(replace(config, output=str(tmp_path / "whole"), report=False))
    ours, theirs = (weights(tmp_path / name, "last") for name in ("run", "whole"))
    assert ours == theirs


def test_evaluation_has_its_share_of_the_time(tmp_path: Path) -> None:
    """Training ends the earlier, the longer an evaluation takes: 40 and 50 documents are left."""
    dataset = make_dataset(tmp_path / "raw", keep_texts=True)
    _, run = opened(tiny(dataset, tmp_path / "run", **SETTINGS))
    deadline = Deadline(1000, lambda: 0.0)
    assert not run.time_is_over(None) and not run.time_is_over(deadline)
    for seconds, over in ((700.0, False), (800.0, True)):
        run.measured = (90, seconds)  # and a third more, for the machine may have other work
        assert run.time_is_over(deadline) is over
    run.measured = (900, 800.0)
    assert not run.time_is_over(deadline), "of ten times as many documents"


def test_work_in_pieces_is_given_up_between_two_of_them() -> None:
    done, over = [], threading.Event()
    ticks_of = logging.getLogger("xmlkernels")

    def work(begin: int, end: int) -> None:
        done.append(begin)
        if len(done) == 5:
            over.set()
        ticks.add()

    for workers in (1, 3):
        done.clear()
        over.clear()
        with given_up(over.is_set):
            ticks = Ticks(ticks_of, "work", 1000, "pieces")
            with pytest.raises(TimeOver):
                in_parallel(work, 1000, 1, workers)
        assert 5 <= len(done) < 20
    ticks = Ticks(ticks_of, "work", 1000, "pieces")
    done.clear()
    in_parallel(work, 1000, 1, 2)
    assert len(done) == 1000, "nothing is given up outside the block"
