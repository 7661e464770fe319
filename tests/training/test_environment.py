"""What a run says about the code that made it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from xmlkernels import __version__
from xmlkernels.training import environment


def git(folder: Path, *words: str) -> str:
    person = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *person, *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The module in a folder of a repository with one commit, which does not track it yet."""
    git(tmp_path, "init", "-q")
    (tmp_path / "mine.txt").write_text("somebody's own file")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "theirs")
    module = tmp_path / "venv" / "environment.py"
    module.parent.mkdir()
    shutil.copy(environment.__file__, module)
    monkeypatch.setattr(environment, "__file__", str(module))
    return tmp_path


def test_another_repository_is_not_named(inside: Path) -> None:
    assert environment.commit() == f"version {__version__}"
    (inside / ".gitignore").write_text("venv\n")
    git(inside, "add", "-A")
    git(inside, "commit", "-qm", "more of theirs")
    assert environment.commit() == f"version {__version__}"


def test_the_repository_of_the_code_is_named_and_changes_are_told(inside: Path) -> None:
    git(inside, "add", "-A")
    git(inside, "commit", "-qm", "ours")
    head = git(inside, "rev-parse", "HEAD")[:12]
    assert environment.commit() == head and re.fullmatch(r"[0-9a-f]{12}", head)
    (inside / "mine.txt").write_text("changed")
    assert environment.commit() == f"{head}-dirty"


def test_no_repository_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment.commit() == f"version {__version__}"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.commit() == f"version {__version__}", "no git"
