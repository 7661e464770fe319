"""Whether threads may spin: what a command chooses before torch is loaded, and that every command
does.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from xmlkernels.cli import main, waiting

CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_cores", lambda: {0, 1})


def machine(root: Path, *busy: float) -> Callable[[float], None]:
    """A /proc/stat of three cores, of which this process may use the first two; returns what lets
    time pass there.

    Args:
        busy: how many of the two cores others use in each stretch of time, one after the other.
    """
    (root / "proc").mkdir(parents=True, exist_ok=True)
    idle, used, left = [1000, 1000, 1000], [50, 50, 50], list(busy)

    def write() -> None:
        lines = [
            "cpu  0 0 0 0 0 0 0 0",
            *(f"cpu{n} {used[n]} 0 0 {idle[n]} 0 0 0 0 7 7" for n in range(3)),
            "intr 5",
        ]
        (root / "proc" / "stat").write_text("\n".join(lines))

    def sleep(seconds: float) -> None:
        share = left.pop(0) / 2
        for core in (0, 1):
            used[core] += round(1000 * seconds * share)
            idle[core] += round(1000 * seconds * (1 - share))
        used[2] += round(1000 * seconds)  # a core that is not ours is busy all the time
        write()

    write()
    return sleep


@pytest.mark.parametrize(
    ("busy", "expected"),
    [
        ((0.0,), ""),
        ((0.6,), ""),
        ((1.8, 0.2), ""),  # what was there at first is over
        ((1.0, 1.0), "other programs use 1.0 of 2 cores"),
        ((2.0, 1.6), "other programs use 1.6 of 2 cores"),
    ],
)
def test_others_are_seen(
    busy: tuple[float, ...], expected: str, tmp_path: Path, two_cores: None
) -> None:
    assert waiting.crowded(tmp_path, machine(tmp_path, *busy)) == expected


@pytest.mark.parametrize(
    ("place", "text", "expected"),
    [
        ("cpu.max", "150000 100000\n", "this process may use 1.5 of 2 cores"),
        ("cpu.max", "max 100000\n", ""),
        ("cpu.max", "400000 100000\n", ""),
        ("cpu/cpu.cfs_quota_us", "100000\n", "this process may use 1 of 2 cores"),
        ("cpu/cpu.cfs_quota_us", "-1\n", ""),
    ],
)
def test_a_share_of_the_cores_is_seen(
    place: str, text: str, expected: str, tmp_path: Path, two_cores: None
) -> None:
    file = tmp_path / "sys" / "fs" / "cgroup" / place
    file.parent.mkdir(parents=True)
    file.write_text(text)
    if place.startswith("cpu/"):
        file.with_name("cpu.cfs_period_us").write_text("100000\n")
    assert waiting.crowded(tmp_path, machine(tmp_path, 0.0)) == expected


def test_a_system_that_does_not_say_and_one_core_choose_nothing(
    tmp_path: Path, two_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert waiting.crowded(tmp_path, lambda seconds: None) == ""
    monkeypatch.setattr(waiting, "_cores", lambda: {0})
    assert waiting.crowded(tmp_path, machine(tmp_path, 2.0, 2.0)) == ""


CHOICE = """
import os, sys
from xmlkernels.cli import waiting
assert "torch" not in sys.modules and "numpy" not in sys.modules
waiting.crowded = lambda: REASON
if TORCH == "before":
    sys.modules["torch"] = os
waiting.choose(sys.argv[1:])
if TORCH == "after":
    import torch
print(os.environ.get("OMP_WAIT_POLICY"))
"""


def choice(
    *words: str, reason: str = "others are here", torch: str = "", **environment: str
) -> tuple[str, str]:
    """OMP_WAIT_POLICY after a choice in a fresh process with this environment, and what stands on
    standard error.
    """
    clean = {name: value for name, value in os.environ.items() if name not in CHOSEN} | environment
    code = f"REASON, TORCH = {reason!r}, {torch!r}\n{CHOICE}"
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_threads_sleep_where_others_are_and_the_user_has_not_chosen() -> None:
    told = (
        "note: others are here; threads sleep while they wait (OMP_WAIT_POLICY=ACTIVE has them "
        "spin)\n"
    )
    assert choice() == ("PASSIVE", told)
    assert choice(RANK="1", WORLD_SIZE="2") == ("PASSIVE", "")
    assert choice(RANK="1") == ("PASSIVE", told)  # of a job array, not of torchrun
    assert choice(reason="") == ("None", "")
    assert choice(torch="before") == ("None", "")  # too late: OpenMP has read its environment
    assert choice("bow", "--help") == ("None", "")
    assert choice(OMP_WAIT_POLICY="ACTIVE") == ("ACTIVE", "")
    for name, value in (
        ("GOMP_SPINCOUNT", "1000"),
        ("KMP_BLOCKTIME", "0"),
        ("OMP_NUM_THREADS", "1"),
    ):
        assert choice(**{name: value}) == ("None", ""), name


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP on Linux")
def test_torch_sees_what_was_chosen() -> None:
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in choice(torch="after", OMP_DISPLAY_ENV="TRUE")[1]


LOADED = """
import sys
from xmlkernels.cli import main, waiting

def choose(words):
    assert "torch" not in sys.modules, "too late"
    print(words)
    sys.exit(7)

waiting.choose = choose
main.main(sys.argv[1:])
"""


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_chooses_before_torch_is_loaded(name: str) -> None:
    words = [sys.executable, "-c", LOADED, name, "--word"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (7, "['--word']\n"), done.stderr


def test_asked_by_itself_it_says_what_a_command_would_choose() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xmlkernels.cli.waiting"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "spin\n" or done.stdout.startswith("sleep: "), done.stderr
