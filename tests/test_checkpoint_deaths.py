"""A process that dies anywhere in a save leaves the old checkpoint or the new one."""

import itertools
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import names_of, value, whole
from damage import flip
from patience import PATIENCE, killed, status_of, until

from xmlkernels.checkpoint import (
    CheckpointFolder,
    save,
)


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process, which can be killed as a crash would; gives its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def test_kill_at_any_time_leaves_one_whole(tmp_path: Path) -> None:
    folder, told = tmp_path / "c", tmp_path / "told"
    save(folder, value(0), {"number": 0})
    told.write_text("0")

    def endless(first: int) -> None:
        for number in range(first, first + 100_000):
            save(folder, value(number), {"number": number})
            with open(tmp_path / "told.new", "w") as file:
                file.write(str(number))
            os.replace(tmp_path / "told.new", told)

    rng, number, kills = random.Random(0), 0, 0
    end = time.monotonic() + PATIENCE
    # A loaded machine saves rarely: three saves are waited for, whatever number of kills it takes.
    while kills < 30 or (number < 3 and time.monotonic() < end):
        kills += 1
        pid = in_child(lambda: endless(number + 1))  # noqa: B023
        time.sleep(rng.uniform(0.002, 0.08))
        killed(pid)
        done, before, number = int(told.read_text()), number, whole(folder)
        assert max(done, before) <= number <= max(done, before) + 1
    assert number >= 3
    save(folder, value(-1), {"number": -1})
    assert whole(folder) == -1
    assert sorted(os.listdir(tmp_path)) == ["c", "told"] or sorted(os.listdir(tmp_path)) == [
        "c",
        "told",
        "told.new",
    ]


STEPS = ("open", "fsync", "rename", "mkdir", "rmdir", "unlink", "link")


def dying(at: int, work: Callable[[], None]) -> Callable[[], None]:
    """`work`, dead without any clean-up as it enters the `at`-th system call that changes the
    disk.
    """

    def run() -> None:
        left = [at]

        def guard(original: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **options: object) -> object:
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return original(*args, **options)

            return call

        for name in STEPS:
            setattr(os, name, guard(getattr(os, name)))
        work()

    return run


@pytest.mark.parametrize("kept", [1, 2])
def test_death_while_the_earlier_ones_move_on(tmp_path: Path, kept: int) -> None:
    """Whatever stands under any name is whole; the newest two are among them; the next save clears
    up and counts right.
    """
    deaths = 0
    for at in range(1, 100):
        root = tmp_path / str(at)
        both = CheckpointFolder(root, kept)
        for number in range(1, 4):
            both.save_last(value(number), {"number": number})
        pid = in_child(dying(at, lambda: both.save_last(value(4), {"number": 4})))  # noqa: B023
        status = status_of(pid)
        found = {whole(root / name) for name in os.listdir(root) if not name.startswith(".")} | {
            whole(root / "last")
        }
        assert max(found) >= 3 and whole(root / "last") in (3, 4) and len(found) >= kept, (
            at,
            found,
        )
        both.save_last(value(5), {"number": 5})
        names = names_of(root)
        assert (
            names == ["last", *(f"last.{n}" for n in range(1, len(names)))]
            and len(names) <= kept + 1
        ), at
        numbers = [whole(root / name) for name in names]
        assert (
            numbers[0] == 5
            and numbers == sorted(numbers, reverse=True)
            and len(names) >= min(kept, 1) + 1
        ), at
        if status == 0:
            break
        assert status == 9
        deaths += 1
        shutil.rmtree(root)
    assert 8 <= deaths < 90


def test_death_while_one_is_put_back(tmp_path: Path) -> None:
    for at in range(1, 100):
        root = tmp_path / str(at)
        both = CheckpointFolder(root)
        for number in (1, 2):
            both.save_last(value(number), {"number": number})
        flip(root / "last" / "state.json", 400)
        pid = in_child(dying(at, lambda: both.put_back("last.1")))  # noqa: B023
        status = status_of(pid)
        assert both.resumable() and both.load_first(("last", "earlier", "best"))[1] == {
            "number": 1
        }, at
        both.put_back("last.1")
        both.save_last(value(3), {"number": 3})
        assert names_of(root) == ["last", "last.1"]
        assert [whole(root / name) for name in names_of(root)] == [3, 1]
        if status == 0:
            break
    assert at > 4


@pytest.mark.parametrize("kind", ["replace", "first", "best"])
def test_death_between_any_two_steps(tmp_path: Path, kind: str) -> None:
    deaths = 0
    for at in range(1, 100):
        root = tmp_path / str(at)
        both = CheckpointFolder(root)
        if kind != "first":
            both.save_last(value(1), {"number": 1})
            both.save_best()
        if kind == "best":
            both.save_last(value(2), {"number": 2})
        which = "best" if kind == "best" else "last"
        work = both.save_best if kind == "best" else lambda: both.save_last(value(2), {"number": 2})  # noqa: B023
        pid = in_child(dying(at, work))
        status = status_of(pid)
        if kind != "first" or both.exists(which):
            assert whole(root / which) in ((2,) if status == 0 or kind == "first" else (1, 2)), at
        if kind == "best":
            assert whole(root / "last") == 2
        work()  # the next save finds its way and clears up
        assert whole(root / which) == 2
        assert not [name for name in os.listdir(root) if name.startswith(".")]
        if status == 0:
            break
        assert status == 9
        deaths += 1
        shutil.rmtree(root)
    assert 8 <= deaths < 60


def test_empty_folder_in_the_way_does_not_cost_the_old_one(tmp_path: Path) -> None:
    save(tmp_path / "c", value(1), {"number": 1})
    os.rename(tmp_path / "c", tmp_path / ".c.old")  # as a crash between the two renames leaves it
    (tmp_path / "c").mkdir()
    assert whole(tmp_path / "c") == 1
    pid = in_child(dying(3, lambda: save(tmp_path / "c", value(2), {"number": 2})))
    status_of(pid)
    assert whole(tmp_path / "c") == 1


def test_failure_keeps_the_old_and_clears_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "c", value(1), {"number": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space"):
                save(tmp_path / "c", value(2), {"number": 2})
        assert whole(tmp_path / "c") == 1
        assert os.listdir(tmp_path) == ["c"]


def test_reader_beside_a_writer(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    save(folder, value(0), {"number": 0})

    def endless() -> None:
        for number in range(1, 100_000):
            save(folder, value(number), {"number": number})

    pid = in_child(endless)
    seen: set[int] = set()
    reads = itertools.count(1)

    def enough() -> bool:
        seen.add(whole(folder))
        return next(reads) >= 150 and len(seen) > 3

    try:
        until(enough, pause=0)
    finally:
        killed(pid)
