"""The command under torchrun, as one would type it: what is written and said once, and how a
failure ends all processes.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import PATIENCE
from train_runs import ROOT, make_dataset
from two_hosts import two_hosts

from xmlkernels import InputError, dist
from xmlkernels.cli import console

FAILING = """
import sys
sys.path[:0] = [{root!r}]
import torch
from xmlkernels.cli.console import command
from xmlkernels import InputError, dist

def main():
    dist.start(torch.device("cpu"))
    dist.wait()
    if dist.rank() == {rank}:
        {act}
    while True:
        dist.wait()

command(main, several=True)
"""


def torchrun(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            *map(str, words),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )


def on_two_hosts(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """One process on each of two hosts, by two agents of torchrun; what the first host's said."""
    with socket.socket() as free, two_hosts() as hosts:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        agents = []
        for number, host in enumerate(hosts):
            how = ["--nnodes", 2, "--nproc-per-node", 1, "--node-rank", number]
            how += ["--master-addr", hosts[0].address, "--master-port", port]
            command = [*host.prefix, sys.executable, "-m", "torch.distributed.run", *how, *words]
            agent = subprocess.Popen(
                [*map(str, command)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": host.interface},
            )
            agents.append(agent)
        try:
            told, errors = agents[0].communicate(timeout=PATIENCE)
            _, others = agents[1].communicate(timeout=PATIENCE)
            status = agents[0].returncode or agents[1].returncode
            return subprocess.CompletedProcess(words, status, told, errors + others)
        finally:
            for agent in agents:
                agent.kill()
                agent.wait(60)


def ours(text: str) -> list[str]:
    """Our own lines: torchrun adds a summary."""
    return [line for line in text.splitlines() if line.startswith("error: ")]


TWO_CARDS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("auto", marks=[pytest.mark.gpu, TWO_CARDS])]
)
def test_a_run_by_torchrun(tmp_path: Path, device: str) -> None:
    dataset, output = make_dataset(tmp_path / "raw"), tmp_path / "run"
    words = ("tiny", "--dataset", dataset, "--output", output, "--epochs", "1", "--batch", "15")
    words += ("--device", device)
    if device == "cpu":
        words += ("--shard-encoder", "on")
    start = on_two_hosts if device == "cpu" else torchrun
    done = start("-m", "xmlkernels", "train", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "metrics.json").read_text())["steps"] == 11
    # The best epoch is the last, whose figures are known.
    assert done.stdout.count("validation after epoch 1") == 1
    assert done.stdout.count("test after epoch 1") == 1
    # Said before the processes have met.
    assert done.stdout.count("note: batch 15 in place of the recipe's 32") == 1
    assert "1 threads in each of 2 processes; 11 steps" in done.stdout
    assert (
        len([line for line in (output / "log.jsonl").read_text().splitlines() if '"test"' in line])
        == 1
    )
    again = torchrun(ROOT / "train" / "run.py", *words)
    assert again.returncode != 0 and "Traceback" not in again.stderr.split("torch/distributed")[0]
    assert len(ours(again.stderr)) == 1 and "a folder that holds a run" in ours(again.stderr)[0]


@pytest.mark.parametrize(
    ("rank", "act", "told"),
    [
        (
            1,
            'raise InputError("shard 1", "a file", "none", "mend it")',
            "error: shard 1: expected a file",
        ),
        (
            0,
            'raise InputError("shard 0", "a file", "none", "mend it")',
            "error: shard 0: expected a file",
        ),
        (1, 'raise ValueError("a slip of the program")', "ValueError: a slip of the program"),
    ],
)
def test_a_failure_of_one_process_ends_all_with_its_message(
    tmp_path: Path, rank: int, act: str, told: str
) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT), rank=rank, act=act))
    done = torchrun(script)
    assert done.returncode != 0 and done.stderr.count(told) == 1
    assert len(ours(done.stderr)) == (1 if "error: " in told else 0)


def test_what_all_meet_is_told_once_and_never_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first tells it at once; the others only if nobody ends them meanwhile."""
    waited: list[float] = []
    monkeypatch.setattr(console.time, "sleep", waited.append)

    def ending(error: Exception) -> int:
        def main() -> None:
            raise error

        with pytest.raises(SystemExit) as end:
            console.command(main, several=True)
        return int(str(end.value.code))

    mistake = InputError("--flag", "a", "b", "c")
    assert ending(mistake) == 2 and waited == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert ending(mistake) == 2 and len(waited) == 1
    assert ending(dist.ProcessLost("no answer", speaks=False)) == 1 and len(waited) == 2
    assert ending(dist.ProcessLost("process 1 is lost")) == 1 and len(waited) == 2, "told at once"
    assert capsys.readouterr().err.splitlines() == [f"error: {mistake}"] * 2 + [
        "error: no answer",
        "error: process 1 is lost",
    ]
    with pytest.raises(SystemExit):
        console.command(lambda: pytest.fail("it ran"))
    assert "torchrun: expected one process for this command, got 2" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(SystemExit):
        console.command(lambda: pytest.fail("it ran"), several=True)
    assert "environment: expected numbers as RANK and WORLD_SIZE" in capsys.readouterr().err
