"""What `make test` runs beside each other: every output in its turn, a failure anywhere counts."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import stages
from patience import limited

ROOT = Path(__file__).resolve().parents[1]


def stage(name: str, code: str) -> stages.Stage:
    return stages.Stage(name, [sys.executable, "-c", code], {"ASKED": name})


def test_each_tells_in_its_turn_and_all_run_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first ends only when both others have begun, and they are less urgent."""
    others = [tmp_path / "b", tmp_path / "c"]
    waits = (
        "import os, time\n"
        f"while not all(map(os.path.exists, {list(map(str, others))})): time.sleep(0.01)\n"
    )
    says = "import os, sys; print('out', os.environ['ASKED']); sys.stderr.write('err\\n')\n"
    began = "; open({path!r}, 'w').write(str(os.getpriority(os.PRIO_PROCESS, 0)))"
    first = stage("a", waits + says)
    beside = [stage(p.name, f"import os{began.format(path=str(p))}\n" + says) for p in others]
    assert stages.run(first, beside)
    told = capfd.readouterr()
    assert [w for w in told.out.split() if w in ("a", "b", "c", "err")][:3] == ["a", "b", "b"]
    assert told.out.index("a: passed") < told.out.index("out b") < told.out.index("b: passed")
    assert told.out.index("b: passed") < told.out.index("out c") < told.out.index("c: passed")
    assert told.err == "err\n" and told.out.count("err\n") == 2
    here = os.getpriority(os.PRIO_PROCESS, 0)
    assert [int(p.read_text()) > here for p in others] == [True, True]


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_failure_anywhere_fails_all(bad: int, capfd: pytest.CaptureFixture[str]) -> None:
    first, *beside = [stage(str(n), f"raise SystemExit({3 * (n == bad)})") for n in range(3)]
    assert not stages.run(first, beside)
    told = capfd.readouterr().out
    assert f"{bad}: FAILED with status 3" in told and told.count("passed") == 2


def test_a_run_that_stands_still_is_killed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "LONGEST", 0.5)
    assert not stages.run(stage("a", "pass"), [stage("b", "import time; time.sleep(600)")])
    assert "b: FAILED with status -9" in capfd.readouterr().out


def test_what_still_runs_when_it_is_interrupted_is_ended(tmp_path: Path) -> None:
    code = (
        "import signal, stages, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sleep = [sys.executable, '-c', 'import os, sys, time; open(sys.argv[1] + str(os.getpid()),"
        ' "w"); time.sleep(600)\', sys.argv[1]]\n'
        "stages.run(stages.Stage('a', sleep), [stages.Stage('b', sleep)])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-c", code, f"{tmp_path}/"]
    with (
        subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process,
        limited(process),
    ):
        while len(list(tmp_path.iterdir())) < 2 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
    for path in tmp_path.iterdir():
        assert not lives(path.name)


def lives(pid: str, seconds: float = 60) -> bool:
    """Whether a process that was killed is still there after so long, and not only its entry."""
    end = time.monotonic() + seconds
    with suppress(FileNotFoundError):
        while Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z":
            if time.monotonic() > end:
                return True
            time.sleep(0.01)
    return False


def test_a_test_that_stands_still_ends_its_run(tmp_path: Path) -> None:
    (tmp_path / "test_stands.py").write_text(
        "import threading\ndef test_stands(): threading.Event().wait()\n"
    )
    guard = [word.replace(str(stages.LIMIT), "1") for word in stages.GUARD]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *guard, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 1 and "Timeout (0:00:01)!" in done.stderr
    assert "in test_stands" in done.stderr


def test_the_stages_are_all_tests() -> None:
    """What the suite leaves out by itself, the others run."""
    settings = (ROOT / "pyproject.toml").read_text("utf-8")
    apart = [Path(stage.command[-1]) for stage in stages.KERNELS]
    assert all((ROOT / path).is_dir() and f'"{path.name}"' in settings for path in apart)
    assert "tests/stages.py" in (ROOT / "Makefile").read_text("utf-8")
