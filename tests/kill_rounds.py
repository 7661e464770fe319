"""Kill runs at random moments, resume them, and compare them with a run that nobody touched.

    python tests/kill_rounds.py FOLDER ROUNDS SEED

Each round is one run: it is started, killed (SIGKILL) or stopped (SIGTERM, SIGINT, SIGHUP) after a
random time, and resumed until it ends; at least one signal must hit it. Its weights, predictions,
metrics and log must then be those of the untouched run, bit for bit. Prints a line of JSON per
round; exits with 1 if one differs.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from patience import status_of
from train_runs import make_dataset, tiny, weights

from xmlkernels.cli import console
from xmlkernels.locks import LOCK
from xmlkernels.training.loop import train

HOW = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TIMING = ("documents_per_second", "seconds", "peak_rss_mb")
MOST = 60  # parts of one run: with more it makes no progress


def settings(dataset: Path, output: Path) -> Any:
    more = {
        "encoder": "bow",
        "epochs": 8,
        "batch": 8,
        "min_df": 1,
        "save_every": 10,
        "loss_every": 1,
        "table": "bf16",
    }
    return tiny(dataset, output, **more)


def started(config: Any, log: Path) -> int:
    """Start a child that trains as the command does; return its id.

    It is forked, since starting Python and torch takes seconds.
    """
    pid = os.fork()
    if pid == 0:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 1
        try:
            console.command(lambda: train(config))
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid


def whole(config: Any, log: Path) -> float:
    """Train without a stop; return the seconds that it took."""
    before = time.monotonic()
    assert status_of(started(config, log), told=log.read_text) == 0, log.read_text()
    return time.monotonic() - before


def killed(dataset: Path, folder: Path, seconds: float, chance: random.Random) -> list[str]:
    """Train in one round; return how each of its parts ended."""
    from dataclasses import replace

    config, ends = replace(settings(dataset, folder / "run"), resume=True), []
    while len(ends) < MOST:
        pid, how = started(config, folder / "log"), chance.choice(HOW)
        # Longer each time: on a busy machine a run may not reach a checkpoint otherwise.
        time.sleep(chance.uniform(0.1, 0.9) * seconds * (1 + len(ends) / 4))
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        else:
            os.kill(pid, how)
            code = status_of(pid, told=(folder / "log").read_text)
        ends.append(f"{how.name} {code}" if not done else f"end {code}")
        if code == 0 and any(not end.endswith(" 0") for end in ends):
            return ends
        if code == 0:  # no signal has hit it: begin again, and send one earlier
            shutil.rmtree(folder / "run")
            seconds /= 2
            continue
        assert code in (-how, 128 + how), (folder / "log").read_text()
    raise AssertionError(f"no end after {MOST} parts")


def seen(output: Path) -> dict[str, Any]:
    """Read everything that must be the same, whatever happened on the way."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    metrics = json.loads((output / "metrics.json").read_text())
    for found in (*lines, metrics):
        for name in TIMING:
            found.pop(name, None)
    # Earlier epochs that were not the best have no checkpoint left.
    found = {which: weights(output, which) for which in ("last", "best")}
    return found | {
        "log": lines,
        "metrics": metrics,
        "predictions": (output / "predictions.npz").read_bytes(),
    }


def main(folder: Path, rounds: int, seed: int) -> int:
    dataset, chance = make_dataset(folder / "raw", keep_texts=True), random.Random(seed)
    seconds = whole(settings(dataset, folder / "whole"), folder / "whole.log")
    reference, bad = seen(folder / "whole"), 0
    for number in range(rounds):
        place = folder / str(number)
        place.mkdir()
        ends = killed(dataset, place, seconds, chance)
        found = seen(place / "run")
        other = [name for name in reference if found[name] != reference[name]]
        other += [
            path.name
            for path in (place / "run").rglob("*")
            if path.name == LOCK or path.name.endswith(".part")
        ]
        bad += bool(other)
        print(json.dumps({"round": number, "ends": ends, "differ": other}), flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
