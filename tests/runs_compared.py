"""How tests stop a run without a word, and how they compare two runs bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
from train_runs import Config, run, run_state, weights

TIMING = ("documents_per_second", "seconds", "memory_mb")


class Stopped(Exception):
    pass


def stopped_at_save(config: Config, number: int) -> None:
    """Run until just before the save of this number."""
    save, count = run_state.RunState.save, iter(range(1, 1000))

    def counted(self: run_state.RunState, *, best: bool = False) -> None:
        if next(count) == number:
            raise Stopped
        save(self, best=best)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(run_state.RunState, "save", counted)
        run(config)


def stopped_in_second_epoch(config: Config) -> None:
    """Run until the first line of the log after the second epoch's sixth step."""
    log = run_state.RunState.log_progress

    def stop(self: run_state.RunState) -> None:
        log(self)
        if self.epoch == 1 and self.position >= 6:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(run_state.RunState, "log_progress", stop)
        run(config)


def metrics_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def log_of(output: Path) -> list[dict[str, Any]]:
    """The log without what a clock says; NaN would be no JSON."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    lines = [
        json.loads(line, parse_constant=refuse)
        for line in (output / "log.jsonl").read_text().splitlines()
    ]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def assert_same_run(ours: Path, theirs: Path, told: str = "") -> None:
    for which in ("last", "best"):
        assert weights(ours, which) == weights(theirs, which), f"{which}; {told}"
    assert log_of(ours) == log_of(theirs), told
    same = (ours / "predictions.npz").read_bytes() == (theirs / "predictions.npz").read_bytes()
    assert same, told
    for key in ("validation", "test", "best", "steps"):
        assert metrics_of(ours)[key] == metrics_of(theirs)[key], told
