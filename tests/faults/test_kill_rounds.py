"""Runs that are killed and resumed end with the bits of one that was left alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("forks, and looks at /proc", allow_module_level=True)

from kill_rounds import AIMS, differing, seen


def rounds(count: int, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run the command in a process of its own; return its lines and the last."""
    script = Path(__file__).with_name("kill_rounds.py")
    words = ["--rounds", str(count), "--seed", "7", "--folder", folder]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, script, *words],
        capture_output=True,
        text=True,
        env=env,
        timeout=900 + 60 * count,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, all_ = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
    return lines, all_


def test_five_rounds(tmp_path: Path) -> None:
    lines, told = rounds(5, tmp_path)
    assert [line["differ"] for line in lines] == [[]] * 5 and all(line["blows"] for line in lines)
    assert told["differing"] == 0 and len(told["signals"]) >= 3
    assert sum(told["hit"].values()) == sum(told["signals"].values()) >= 5
    assert {line["run"].rpartition(", ")[2] for line in lines} == {"1 process", "2 processes"}
    _a_difference_is_seen(
        tmp_path / "end-to-end-bow-1", tmp_path / "cascade-bow-1", tmp_path / "copy"
    )


def _a_difference_is_seen(run: Path, other: Path, copy: Path) -> None:
    whole = seen(run)
    assert differing(whole, run) == []
    shutil.copytree(run, copy)
    (copy / ".metrics.json.part").touch()
    for name in ("log.jsonl", "metrics.json"):
        text = (copy / name).read_text()
        (copy / name).write_text(text.replace('"P@1": ', '"P@1": 1', 1))
    with open(copy / "predictions.npz", "ab") as file:
        file.write(b"\0")
    shutil.rmtree(copy / "checkpoint" / "last")
    shutil.copytree(other / "checkpoint" / "last", copy / "checkpoint" / "last")
    found = differing(whole, copy)
    assert found == ["last", "log", "metrics", "predictions", ".metrics.json.part"]


@pytest.mark.slow
def test_fifty_rounds(tmp_path: Path) -> None:
    lines, told = rounds(50, tmp_path)
    assert len(lines) == 50 and told["differing"] == 0
    assert all(told["hit"][moment] for moment in AIMS)
