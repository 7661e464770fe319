"""A place belongs to one process at a time, and to nobody once that process is gone."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from patience import limited

from xmlkernels import InputError, locks
from xmlkernels.locks import LOCK, own_folder, own_place

HOLD = """
import sys, time
from xmlkernels.locks import own_folder, own_place
with {kind}({path!r}) as place:
    print("held", flush=True)
    sys.stdin.readline()
"""
COUNT = """
import sys, time
from pathlib import Path
from xmlkernels.locks import own_place
number = Path({path!r})
for _ in range(40):
    with own_place(number, wait=lambda line: None):
        found = int(number.read_text())
        time.sleep(0.001)
        number.write_text(str(found + 1))
"""


@contextmanager
def holder(kind: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD.format(kind=kind, path=str(path))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        with limited(process):
            assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("kind", "own"), [("own_folder", own_folder), ("own_place", own_place)])
def test_who_holds_a_place_is_told_and_a_killed_holder_holds_nothing(
    kind: str, own, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    place = tmp_path / "place"
    with holder(kind, place) as process:
        with pytest.raises(InputError) as refused, own(place):
            pytest.fail("two hold it")
        told = str(refused.value)
        assert f"held by process {process.pid} (" in told
        assert socket.gethostname() in told and time.strftime("since %Y-") in told
        process.kill()
        process.wait(60)
        left = [path.name for path in tmp_path.rglob(f"*{LOCK}")]
        assert len(left) == 1, "what a kill leaves behind"
        with own(place):
            pass
    assert list(tmp_path.rglob(f"*{LOCK}")) == []


@pytest.mark.parametrize(("kind", "own"), [("own_folder", own_folder), ("own_place", own_place)])
def test_a_waiting_process_says_so_once_and_goes_on(kind: str, own, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Also where the holder removes the empty folder that it had made."""
    told: list[str] = []

    def wait(line: str) -> None:
        told.append(line)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()

    with holder(kind, tmp_path / "place") as process, own(tmp_path / "place", wait=wait):
        assert (tmp_path / "place").is_dir() == (kind == "own_folder")
    assert list(tmp_path.iterdir()) == []
    assert len(told) == 1 and f"in use: held by process {process.pid}" in told[0]


def test_many_at_once_hold_it_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    command = [sys.executable, "-c", COUNT.format(path=str(tmp_path / "number"))]
    for process in [subprocess.Popen(command) for _ in range(3)]:
        assert process.wait(60) == 0
    assert (tmp_path / "number").read_text() == "120"


def test_a_lock_of_another_machine_says_how_to_remove_it(tmp_path: Path) -> None:
    lock = tmp_path / LOCK
    lock.write_text(
        json.dumps(
            {"pid": 1, "host": "elsewhere", "boot": "another", "command": "run.py", "since": "1999"}
        )
    )
    told = f"on elsewhere since 1999; .*if that process is gone, remove {lock}"
    with pytest.raises(InputError, match=told), own_folder(tmp_path):
        pytest.fail("it was taken over")
    lock.unlink()
    with own_folder(tmp_path):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    lock.write_text("{ cut sho")
    with own_folder(tmp_path):
        pass


def test_without_locks_of_the_file_system_the_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    lock, own = tmp_path / LOCK, {"host": socket.gethostname()}
    with subprocess.Popen(["sleep", "60"]) as process:
        monkeypatch.setattr(locks.fcntl, "flock", none)
        lock.write_text(json.dumps(own | {"pid": process.pid}))
        with (
            pytest.raises(InputError, match=f"held by process {process.pid} "),
            own_folder(tmp_path),
        ):
            pytest.fail("two hold it")
        process.send_signal(signal.SIGKILL)
    with own_folder(tmp_path):
        pass
    assert not lock.exists()


def test_what_a_killed_writer_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    left = ".metrics.json.0123456789ab.part"
    other = ".other.json.0123456789ab.part"
    folder.mkdir()
    for name in (left, other, ".metrics.json.note.part", "metrics.json"):
        (folder / name).touch()
    with own_folder(folder, writes=["metrics.json"]):
        pass
    assert {path.name for path in folder.iterdir()} == {
        other,
        ".metrics.json.note.part",
        "metrics.json",
    }
    (tmp_path / ".set.0123456789ab.part" / "train").mkdir(parents=True)
    with own_place(tmp_path / "set"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    for path, told in (
        ("file/below", r"Not a directory"),
        ("file", r"a file"),
        ("dangling", "a symbolic link to nowhere"),
    ):
        with pytest.raises(InputError, match=f"--output: .*{told}"), own_folder(tmp_path / path):
            pytest.fail(path)
    with (
        pytest.raises(InputError, match="--metrics: .*below a file"),
        own_place(tmp_path / "file" / "x", "--metrics"),
    ):
        pytest.fail("below a file")
    with (
        pytest.raises(InputError, match="in a folder that is not there"),
        own_place(tmp_path / "a" / "b"),
    ):
        pytest.fail("nowhere")
    with own_folder(tmp_path / "link") as folder:
        (folder / "x").touch()
    assert (tmp_path / "real" / "x").exists() and (tmp_path / "link").is_symlink()
    with own_folder(tmp_path / "a" / "b" / "c"):
        assert (tmp_path / "a" / "b" / "c" / LOCK).exists()
    assert not (tmp_path / "a").exists(), "what stays empty goes again"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["/x/xmlkernels/__main__.py", "train", "tiny"], "xmlkernels train"),
        (["/bin/xmlkernels", "tree", "d"], "xmlkernels tree"),
        (["train/run.py", "tiny"], "run.py"),
        ([""], "python"),
    ],
)
def test_the_holder_is_named_as_one_types_it(
    words: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", words)
    assert locks._command() == name
