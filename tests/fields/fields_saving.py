"""How the settings of writing checkpoints are tested."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from config_runs import PER_EPOCH, STEPS, Config, Runs, recorded
from train_runs import weights

from xmlkernels.checkpoint import writing
from xmlkernels.errors import Failed
from xmlkernels.training import forecast, run_state


def beside_the_loop(runs: Runs, folder: Path) -> None:
    """Checkpoints are written beside the loop where memory has room for a copy, or as asked."""
    waits: list[bool] = []
    real = run_state.Saver.save

    def saved(self: run_state.Saver, *args: Any, **options: Any) -> None:
        waits.append(self.waits)
        real(self, *args, **options)

    note = "training waits while a checkpoint is written: memory has no room to spare"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_state.Saver, "save", saved)
        for free, value, expected, noted in (
            (None, "auto", False, False),
            (1 << 40, "auto", False, False),
            (1 << 10, "auto", True, True),
            (1 << 10, "on", False, False),
            (1 << 40, "off", True, False),
        ):
            patch.setattr(forecast, "free_memory", lambda free=free: free)
            place = folder / f"{value}{free}"
            config = runs.config("tiny", epochs=1, background_save=value, output=str(place))
            waits.clear()
            assert (note in recorded(config).told) == noted, (free, value)
            assert waits == [expected] * len(waits) and waits, (free, value)


def disk_full(runs: Runs, folder: Path) -> None:
    """The second of five checkpoints, which is the best by then, finds the disk full."""
    tried: list[str] = []
    put = writing.TensorFile._put

    def full(self: writing.TensorFile, values: memoryview, place: int) -> int:
        if str(self.path) not in tried:
            tried.append(str(self.path))
        if tried.index(str(self.path)) == 1:
            raise OSError(28, "No space left on device", str(self.path))
        return put(self, values, place)

    def config(value: str) -> Config:
        output = str(folder / value)
        return runs.config("tiny", save_every=3, save_failure=value, output=output)

    whole = recorded(replace(config("end"), output=str(folder / "whole")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing.TensorFile, "_put", full)
        told = "checkpoint/last/tensors.safetensors could not be written: No space left on device"
        with pytest.raises(Failed, match=f"{told}; .*the checkpoint of step 3 in .* is whole"):
            recorded(config("end"))
        tried.clear()
        seen = recorded(config("continue"))
        assert len(tried) > 3
    assert f"note: no checkpoint of step {PER_EPOCH}: " in seen.told and told in seen.told
    assert "the one of step 3 is whole; training goes on" in seen.told
    # The best of the first epoch is lost, so the second is the best that there is.
    assert seen.report["best"]["epoch"] == 2 and seen.report["steps"] == STEPS
    assert weights(folder / "continue", "last") == weights(folder / "whole", "last")
    assert weights(folder / "continue", "best") == weights(folder / "continue", "last")
    assert recorded(replace(config("end"), resume=True)).report["best"] == whole.report["best"]
    assert weights(folder / "end", "last") == weights(folder / "whole", "last")

    def always(self: writing.TensorFile, values: memoryview, place: int) -> int:
        raise OSError(5, "Input/output error", str(self.path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing.TensorFile, "_put", always)
        seen = recorded(replace(config("continue"), output=str(folder / "never")))
    assert "there is none yet; training goes on" in seen.told
    assert "the last step is measured, of which there is no checkpoint" in seen.told
    assert seen.report["best"] == {"epoch": 2, "step": STEPS}
    assert not list((folder / "never" / "checkpoint").glob("*/state.json"))


FIELDS = {"background_save": (beside_the_loop,), "save_failure": (disk_full,)}
