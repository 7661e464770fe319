"""Children that do not end are killed, and no test waits for one without a limit."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import patience
import pytest
from processes import together

TESTS = Path(__file__).resolve().parent
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
# Calls that wait for as long as it takes; those of `patience.py` alone know a limit of their own.
RUNS = {f"subprocess.{name}" for name in ("run", "call", "check_call", "check_output")}
WAITS = {"communicate", "wait", "join"}


def child(seconds: float, status: int = 0) -> int:
    pid = os.fork()
    if pid == 0:
        time.sleep(seconds)
        os._exit(status)
    return pid


def test_a_child_that_ends_gives_its_status() -> None:
    assert patience.status_of(child(0.05, 7), 60) == 7
    assert patience.killed(child(600)) == -9


def test_a_child_that_does_not_end_is_killed_and_named() -> None:
    pid = child(600)
    with pytest.raises(AssertionError, match=rf"process {pid} still ran after 0\.1 s: its words"):
        patience.status_of(pid, 0.1, lambda: "its words")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_line_that_never_comes_is_waited_for_so_long() -> None:
    with subprocess.Popen(SLEEP, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with patience.limited(process, 0.1):
            assert process.stdout.readline() == b""
        assert process.wait(60) == -9


def stand_still() -> None:
    time.sleep(600)


def test_processes_that_stand_still_are_ended_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("processes.PATIENCE", 0.1)
    with pytest.raises(pytest.fail.Exception, match=r"2 of 2 processes still ran after 0\.1 s"):
        together(2, stand_still, tmp_path)


def endless(tree: ast.AST) -> list[ast.Call]:
    """Calls that may wait for ever: of children, threads, processes; of a method without any
    argument, whatever its object is.
    """
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        named = {keyword.arg for keyword in node.keywords}
        if name in RUNS:
            without = not named & {"timeout", None}
        elif name == "os.waitpid":
            without = "WNOHANG" not in ast.unparse(node)
        else:
            without = name.rpartition(".")[2] in WAITS and not node.args and not named
        if without:
            found.append(node)
    return found


# Here a limit stands around the wait.
ALLOWED = {
    "patience.py": "os.waitpid(pid, 0)",
    "mutants.py": "os.waitpid(child, 0)",
    "command_ends.py": "os.waitpid(self.pid, 0)",
    "processes.py": "dist.wait()",
    "meeting_again.py": "dist.wait()",
    "killed.py": "dist.wait()",
    "test_dist.py": "dist.wait()",
    "test_checkpoint_shards.py": "dist.wait()",
}


def test_no_test_waits_without_a_limit() -> None:
    found = [
        f"{path.relative_to(TESTS)}:{call.lineno}: {ast.unparse(call)[:60]}"
        for path in TESTS.rglob("*.py")
        for call in endless(ast.parse(path.read_text("utf-8")))
        if ast.unparse(call) != ALLOWED.get(path.name)
    ]
    assert not found, "give each a timeout, or take patience.py's:\n" + "\n".join(sorted(found))


@pytest.mark.parametrize(
    ("code", "waits"),
    [
        ("subprocess.run(['true'])", True),
        ("subprocess.run(['true'], timeout=9)", False),
        ("os.waitpid(pid, 0)", True),
        ("os.waitpid(pid, os.WNOHANG)", False),
        ("thread.join()", True),
        ("thread.join(60)", False),
        ("', '.join(words)", False),
        ("process.communicate()", True),
    ],
)
def test_endless_waits_are_told_apart(code: str, waits: bool) -> None:
    assert bool(endless(ast.parse(code))) == waits
