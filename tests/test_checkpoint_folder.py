"""The checkpoints of a run: the last, the best and the earlier ones."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import names_of, value, whole
from damage import flip

from xmlkernels import checkpoint
from xmlkernels.checkpoint import (
    CheckpointFolder,
    save,
)
from xmlkernels.errors import InputError


def test_earlier_checkpoints_are_kept_and_counted(tmp_path: Path) -> None:
    for keep in (0, 1, 3):
        both = CheckpointFolder(tmp_path / str(keep), keep)
        for number in range(1, 8):
            both.save_last(value(number), {"number": number})
            if number == 2:
                both.save_best()
            kept = [f"last.{n}" for n in range(1, keep + 1) if number - n >= 1]
            assert names_of(both.folder) == [*(["best"] if number >= 2 else []), "last", *kept]
            assert [whole(both.folder / name) for name in ("last", *kept)] == list(
                range(number, number - len(kept) - 1, -1)
            )
    CheckpointFolder(tmp_path / "3", 1).save_last(value(8), {"number": 8})  # fewer from now on
    assert names_of(tmp_path / "3") == ["best", "last", "last.1"]
    assert whole(tmp_path / "3" / "last.1") == 7


def test_a_folder_of_something_else_among_the_earlier_ones_stays(tmp_path: Path) -> None:
    both = CheckpointFolder(tmp_path, 0)
    (tmp_path / "last.7").mkdir()
    (tmp_path / "last.7" / "thesis.txt").write_text("mine")
    for number in (1, 2):
        both.save_last(value(number), {"number": number})
    assert names_of(tmp_path) == ["last", "last.7"]
    assert names_of(tmp_path / "last.7") == ["thesis.txt"]


def test_the_first_whole_one_is_found_and_put_back(tmp_path: Path) -> None:
    both, order = CheckpointFolder(tmp_path / "run", 2), ("last", "earlier", "best")
    for number in (1, 2, 3, 4):
        both.save_last(value(number), {"number": number})
        if number == 1:
            both.save_best()
    assert both.load_first(order)[1:] == ({"number": 4}, "last", None)
    for name, number in (("last", 3), ("last.1", 2), ("last.2", 1)):
        flip(tmp_path / "run" / name / "tensors.safetensors", 5000)
        _, state, which, reason = both.load_first(order)
        assert state == {"number": number}
        assert which == {3: "last.1", 2: "last.2", 1: "best"}[number]
        assert reason is not None and "run/last/tensors" in str(reason)
    both.put_back("best")
    assert whole(tmp_path / "run" / "last") == whole(tmp_path / "run" / "best") == 1
    both.save_last(value(5), {"number": 5})
    assert whole(tmp_path / "run" / "last") == 5 and whole(tmp_path / "run" / "last.1") == 1
    for name in ("last", "last.1", "last.2", "best"):
        (tmp_path / "run" / name / "state.json").unlink()
    with pytest.raises(InputError, match="run/last/state.json"):
        both.load_first(order)
    # There is something that must not be started over.
    assert both.exists("last")
    assert both.resumable()
    shutil.rmtree(tmp_path / "run" / "last")
    with pytest.raises(InputError, match="last.1/state.json"):
        both.load_first(order)


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in (home, tmp_path / "file"):
        with pytest.raises(InputError, match="choose another"):
            save(place, value(1), {"number": 1})
    (home / "state.json").write_text("{}")
    with pytest.raises(InputError, match="choose another"):
        save(home, value(1), {"number": 1})
    assert (home / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    with pytest.raises(InputError, match="dense"):
        save(tmp_path / "c", {"s": torch.eye(2).to_sparse()}, {})
    assert sorted(os.listdir(tmp_path)) == ["file", "home"]


def test_last_and_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = CheckpointFolder(tmp_path / "run")
    assert not both.exists("last")
    with pytest.raises(InputError, match="save_last first"):
        both.save_best()
    both.save_last(value(1), {"number": 1})
    both.save_best()
    name = checkpoint.TENSORS
    assert os.path.samefile(tmp_path / "run/last" / name, tmp_path / "run/best" / name)
    both.save_last(value(2), {"number": 2})
    assert whole(tmp_path / "run/last") == 2 and whole(tmp_path / "run/best") == 1

    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    both.save_best()
    assert whole(tmp_path / "run/best") == 2
    both.save_last(value(3), {"number": 3})
    assert both.load("best")[1] == {"number": 2} and both.load()[1] == {"number": 3}
    with pytest.raises(InputError, match="'last' or 'best'"):
        both.load("first")


def test_a_look_between_two_saves_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader may look at both places just when a save has taken the checkpoint from each."""
    target, away = tmp_path / "c", tmp_path / "away"
    checkpoint.save(target, value(3), {"number": 3})
    os.rename(target, away)
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            os.rename(away, target)

    monkeypatch.setattr("xmlkernels.checkpoint.folder.time.sleep", sleep)
    assert whole(target) == 3 and len(slept) == 2
    shutil.rmtree(target)
    slept[:] = [0.0] * 2
    with pytest.raises(InputError, match="expected a checkpoint, got no such file"):
        checkpoint.load(target)
    assert 10 < len(slept) < 20 and sum(slept) < 0.2


def test_one_is_there_while_a_save_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save_last(value(3), {"number": 3})
    os.rename(tmp_path / "last", tmp_path / ".last.old")

    def moved(target: Path) -> Path:
        """Name the old one's place, as `old` does, when a save has just removed it."""
        if (tmp_path / ".last.old").exists():
            os.rename(tmp_path / ".last.old", target)
        return target.with_name(f".{target.name}.old")

    monkeypatch.setattr("xmlkernels.checkpoint.folder.old", moved)
    assert folder.exists("last")
