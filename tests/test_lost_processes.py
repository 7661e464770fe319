"""One of several processes is killed, stands still or is stopped: the others say which, or stop at
the same step.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from patience import PATIENCE, until
from processes import together
from train_runs import ROOT, make_dataset

from xmlkernels import dist
from xmlkernels.dist import group
from xmlkernels.heartbeat import Heartbeat, Standing
from xmlkernels.life import Idleness, Turn


class Shelf(dict[str, str]):
    """A store in this process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self[key].encode() for key in keys]


def test_a_silent_process_is_named_and_one_that_says_why_it_ends_is_not() -> None:
    store, told = Shelf(), []
    hearts = [
        Heartbeat(store, rank, 3, 0.5, told.append if rank == 0 else None) for rank in range(3)
    ]
    for heart in hearts:
        heart.start()
    time.sleep(0.7)
    assert told == [] and all(heart.missing(0.4) == [] for heart in hearts), "they live"
    hearts[2]._stopped.set()  # as SIGKILL or SIGSTOP would: without a word
    until(lambda: told)
    assert (
        f"process 2 of 3 (process {os.getpid()} on {socket.gethostname()}) has ended or stands "
        "still" in told[0]
    )
    assert hearts[0].speaks()
    assert not hearts[1].speaks()
    assert "process 2 of 3" in str(hearts[1].find())
    hearts[1].stop(failed=True)
    until(hearts[0].failed)
    assert hearts[0].find() is None
    hearts[0].stop()


def test_a_process_that_stood_still_itself_blames_nobody() -> None:
    store, told = Shelf(), []
    heart, other = Heartbeat(store, 0, 2, 0.5, told.append), Heartbeat(store, 1, 2, 0.5)
    other.start()
    heart.start()
    read = heart._read

    def slow(what: str) -> list[bytes]:
        heart._read = read  # type: ignore[method-assign]
        time.sleep(1.5)  # both of them, as a suspended machine
        return read(what)

    until(lambda: heart._seen[1] != b"0")
    heart._read = slow  # type: ignore[method-assign]
    time.sleep(2.2)
    assert told == []
    other.stop()
    time.sleep(1)
    assert told == [], "it ended in order"
    heart.stop()


def locked() -> None:
    """A call that keeps Python's lock is no silence: the other process does not miss this one."""
    heart, told = group._heart, list[str]()
    assert heart is not None and group._beater is not None
    dist.when_lost(told.append)
    dist.sum_(torch.zeros(1))
    heart.patience = 4.0
    if dist.rank() == 1:
        ctypes.PyDLL(None).sleep(8)
    dist.sum_(torch.zeros(1))
    assert told == []
    standing_still(heart, told)


def standing_still(heart: Heartbeat, told: list[str]) -> None:
    """A process that lives in a lock is lost where all do the same; one that works is not, nor one
    that does something alone.
    """

    def alone() -> None:
        with dist.abreast(), dist.apart():
            time.sleep(3.5 * dist.rank())
            dist.sum_(torch.zeros(1))

    def works() -> None:
        end = time.monotonic() + 3.5 * dist.rank()
        while time.monotonic() < end:
            time.sleep(0.09)
            sum(range(300_000))
        dist.sum_(torch.zeros(1))

    def locks() -> None:
        lock = threading.Lock()
        lock.acquire()
        lock.acquire(timeout=6 * dist.rank())
        dist.sum_(torch.zeros(1))

    heart.patience = 2.0
    alone()
    with dist.abreast():
        works()
        assert told == []
        locks()
    if dist.rank() == 1:
        assert told == []
    else:
        (sentence,) = told
        assert sentence.startswith("process 1 of 2 (process ")
        assert "stands still: alive, but without any work for" in sentence


def test_a_process_that_lives_is_lost_only_where_it_holds_up_the_others(tmp_path: Path) -> None:
    assert dist.PATIENCE + 10 <= 60, "a minute after one is lost the others have ended"
    together(2, locked, tmp_path)


def test_work_is_seen_in_a_process_and_its_children() -> None:
    busy = "while :; do :; done"
    words = {"idle": "sleep 60", "busy": busy, "child": f"({busy}) & wait"}
    started = {k: subprocess.Popen(["sh", "-c", w], process_group=0) for k, w in words.items()}
    try:
        turn = Turn()
        assert turn.go(abreast=True) is False
        looks = {k: Idleness(process.pid, turn) for k, process in started.items()}
        found: dict[str, float] = {}

        def seen() -> bool:
            found.update({k: look.seconds() for k, look in looks.items()})
            return found["idle"] > 0.5 and max(found["busy"], found["child"]) < 0.3

        until(seen, pause=0.2)
    finally:
        for process in started.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
    assert looks["idle"].seconds() > 0.5, "of a process that has ended there is nothing to see"
    turn.go(abreast=False)
    assert looks["idle"].seconds() == 0, "alone it may"


def test_the_last_one_alone_is_behind() -> None:
    """Of three processes the second waits for the third, in a message that the first has left."""
    store, turn = Shelf(), Turn()
    heart = Heartbeat(store, 0, 3, 0.5, turn=turn)
    for _ in range(5):
        turn.arrive()
    seen = {1: Standing(4, True, 9.0), 2: Standing(3, True, 9.0)}

    def behind() -> list[int]:
        heart._seen = {r: f"7 {s.told()}".encode() for r, s in seen.items()}
        return heart.behind(0.1)

    assert behind() == []
    time.sleep(0.2)
    assert behind() == [2] and "process 2 of 3" in heart.sentence_behind([2])
    heart._stuck = [2]
    assert heart.speaks()
    for busy in (Standing(3, True, 0.0), Standing(3, False, 9.0), Standing(5, True, 9.0)):
        seen[2] = busy
        assert behind() == ([1] if busy.count == 5 else []), busy
    heart._seen = {1: b"7", 2: b"8"}
    assert heart.behind(0.1) == [], "no word of where they stand"
    turn.arrive()
    assert behind() == []


def test_a_beater_stands_still_and_ends_with_its_process(tmp_path: Path) -> None:
    """Beats stop while the process is stopped, go on after it, and end with SIGKILL."""
    told = tmp_path / "beats"
    told.touch()
    code = (
        "import sys, time; from pathlib import Path; from xmlkernels.life import Beater\n"
        f"told = Path({str(told)!r})\n"
        "Beater(lambda: lambda number: told.write_text(str(number)), 0.05); time.sleep(600)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE)

    def beats_more() -> bool:
        before = told.read_text()
        time.sleep(0.5)
        return told.read_text() not in (before, "")

    try:
        until(beats_more, 60)
        process.send_signal(signal.SIGSTOP)
        until(lambda: not beats_more(), 60)
        assert not beats_more()
        process.send_signal(signal.SIGCONT)
        until(beats_more, 60)
        process.kill()
        process.communicate(timeout=60)  # whose output the beater does not hold open
        until(lambda: not beats_more(), 60)
        assert not beats_more()
    finally:
        process.kill()
        process.wait(60)


# What the second process runs: train/run.py, whose steps stand in a lock once a file is there.
LOCKS = """
import runpy, sys, threading
from pathlib import Path
from xmlkernels.models.end_to_end import EndToEnd
there, sys.argv = Path(sys.argv[1]), sys.argv[2:]
step = EndToEnd.step
def stepped(*values, **more):
    if there.exists():
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    return step(*values, **more)
EndToEnd.step = stepped
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@contextmanager
def pair(dataset: Path, output: Path, *words: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes of one endless run, without torchrun, which would end the other one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        names = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": "2",
        }
    names["OMP_NUM_THREADS"] = "1"
    command = [
        sys.executable,
        str(ROOT / "train" / "run.py"),
        "tiny",
        "--encoder",
        "bow",
        "--min-df",
        "1",
        "--device",
        "cpu",
    ]
    command += [
        "--dataset",
        str(dataset),
        "--output",
        str(output),
        "--epochs",
        "100000",
        "--save-every",
        "5",
    ]
    started = []
    for rank in range(2):
        env = os.environ | names | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        program = [*command, *words]
        if rank == 1:
            program[1:1] = ["-c", LOCKS, str(output / "lock")]
        one = subprocess.Popen(
            program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        started.append(one)
    try:
        until(
            lambda: (
                (output / "checkpoint" / "last" / "state.json").exists()
                or started[0].poll() is not None
            ),
            120,
        )
        assert started[0].poll() is None, started[0].communicate(timeout=60)
        yield started
    finally:
        for one in started:
            one.kill()
            one.wait(60)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), keep_texts=True)


@pytest.mark.parametrize(
    ("how", "patience"), [(signal.SIGSTOP, "3"), (signal.SIGKILL, "600"), (None, "3")]
)
def test_a_lost_process_ends_the_other_with_its_name(
    how: signal.Signals | None, patience: str, dataset: Path, tmp_path: Path
) -> None:
    with pair(dataset, tmp_path / "run", "--timeout", patience) as (first, second):
        if how is None:
            (tmp_path / "run" / "lock").touch()
        else:
            second.send_signal(how)
        _, told = first.communicate(timeout=60)
        errors = [line for line in told.splitlines() if line.startswith("error: ")]
        assert first.returncode == 1 and len(errors) == 1 and "Traceback" not in told, told
        assert f"process 1 of 2 (process {second.pid} on " in errors[0]
        still = "stands still: alive, but" if how is None else "has ended or stands still"
        assert still in errors[0]
        assert "is whole: go on from it with --resume" in errors[0]


def test_torchrun_starts_again_from_the_last_checkpoint(dataset: Path, tmp_path: Path) -> None:
    output, told = tmp_path / "run", tmp_path / "told"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1", str(ROOT / "train" / "run.py")]
    command += ["tiny", "--encoder", "bow", "--min-df", "1", "--device", "cpu", "--resume"]
    command += ["--dataset", str(dataset), "--output", str(output)]
    command += ["--epochs", "100000", "--save-every", "5"]
    with told.open("w") as file:
        started = subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        last = output / "checkpoint" / "last" / "state.json"
        until(lambda: last.exists() or started.poll() is not None, PATIENCE)
        assert started.poll() is None, told.read_text()
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        workers = [pid for pid in children if "run.py" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(workers) == 2
        os.kill(int(workers[1]), signal.SIGKILL)
        until(lambda: "resumed at step" in told.read_text() or started.poll() is not None, PATIENCE)
        assert "resumed at step" in told.read_text(), told.read_text()
    finally:
        started.terminate()
        try:
            started.wait(60)
        finally:
            started.kill()
            started.wait(60)


def test_a_signal_to_one_stops_both_at_the_same_step(dataset: Path, tmp_path: Path) -> None:
    with pair(dataset, tmp_path / "run") as (first, second):
        second.send_signal(signal.SIGTERM)
        _, told = first.communicate(timeout=60)
        second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (143, 143) and "Traceback" not in told
    state = json.loads((tmp_path / "run" / "checkpoint" / "last" / "state.json").read_text())[
        "state"
    ]
    assert f"stopped at step {state['steps']:,}, whose checkpoint is written" in told


def test_a_heart_that_has_not_begun_may_be_asked_and_stopped() -> None:
    """Another process may end, or a signal come, before all have met."""
    heart = Heartbeat(Shelf(), 0, 2, 0.1)
    assert heart.all_alive() and not heart.failed() and heart.missing(1000) == []
    found = heart.find()
    assert found is None or "process 1 of 2" in found
    heart.stop()


def test_processes_meet_in_the_store_of_those_before_and_name_one_that_does_not_come() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "meeting_again.py")],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    told = {(line["attempt"], line["rank"]): line["told"] for line in lines}
    met = [told.get((attempt, rank)) for attempt in (0, 1) for rank in (0, 1)]
    assert met == ["met"] * 4, done.stdout + done.stderr
    assert "process 1 of 2 (process " in told[2, 0] and "has ended or stands still" in told[2, 0]
