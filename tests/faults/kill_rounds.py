"""Kill runs at random moments, resume them, and compare them with runs that nobody touched.

    python tests/faults/kill_rounds.py --rounds 50 [--first 0] [--seed 0] [--folder FOLDER]

Each round is one run, end to end or a cascade, with a transformer or a bag of words, of one process
or of two that torchrun's agent starts. It is killed (SIGKILL) or stopped (SIGTERM, SIGINT, SIGHUP)
in a step, a save or an evaluation, as a whole or one process of two, one to three times, and
resumed until it ends. A stopped run must have saved, have said so, and have ended with 143, 130 or
129. Weights, predictions, metrics and log must then be those of the untouched run, bit for bit.

Prints a line of JSON per round, and one of all; exits with 1 if a run differs, or if 20 rounds or
more did not hit every moment.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # threads do not survive a fork
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from killed import HOW, Blow, Part
from moments import END, EVALUATION, SAVE, STEP, Moments
from train_runs import cascade, make_dataset, make_tree, tiny, weights

from xmlkernels.locks import LOCK
from xmlkernels.training.loop import train

AIMS = (STEP, SAVE, EVALUATION)  # of the first blow, in turn
TIMING = ("documents_per_second", "seconds", "memory_mb", "peak_rss_mb")
# In an order in which the first few have both of everything.
RUNS = (
    ("end to end", "bow", 1),
    ("cascade", "transformer", 2),
    ("cascade", "bow", 1),
    ("end to end", "transformer", 2),
    ("end to end", "transformer", 1),
    ("cascade", "bow", 2),
    ("cascade", "transformer", 1),
    ("end to end", "bow", 2),
)
AGAIN = 3  # blows at most that are added where the first has missed its moment
MOST = 12  # parts of one run: with more it makes no progress


@dataclass(frozen=True)
class Whole:
    """A run that nobody touched: what came of it, and how often and how long it did what."""

    found: dict[str, Any]
    moments: Moments


class Rounds:
    """Runs, and what they are compared with.

    Args:
        folder: an empty one.
        seed: of the blows.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.dataset = make_dataset(folder / "raw", keep_texts=True)
        self.tree = make_tree(self.dataset, folder / "tree.safetensors")
        for model, encoder in (("end to end", "bow"), ("cascade", "transformer")):
            # What it imports and compiles when it is first used, no child has to.
            train(replace(self.config(model, encoder, folder / f"warm {encoder}"), epochs=1))
        self._wholes: dict[tuple[str, str, int], Whole] = {}
        self.hit: Counter[str] = Counter()  # moments
        self.signals: Counter[str] = Counter()

    def config(self, model: str, encoder: str, output: Path) -> Any:
        """Return the settings of a run of a second or two."""
        more: dict[str, Any] = {"device": "cpu", "loss_every": 1, "table": "bf16", "batch": 8}
        if encoder == "bow":
            more |= {"encoder": "bow", "min_df": 1, "epochs": 4, "save_every": 16}
            # A bag of words has no layers to read.
            more |= {"layers": ()} if model == "cascade" else {}
        else:
            more |= {"epochs": 2, "save_every": 8}
        if model == "cascade":
            return cascade(self.dataset, output, self.tree, **more)
        return tiny(self.dataset, output, **more)

    def whole(self, model: str, encoder: str, processes: int) -> Whole:
        """Return the untouched run of this kind; train it where there is none yet."""
        key = model, encoder, processes
        if key not in self._wholes:
            name = f"{model} {encoder} {processes}".replace(" ", "-")
            part = Part(
                self.config(model, encoder, self.folder / name),
                processes,
                self.folder / f"{name}.log",
            )
            assert part.end() == 0, part.told()
            self._wholes[key] = Whole(seen(self.folder / name), part.moments)
        return self._wholes[key]

    def round(self, number: int) -> dict[str, Any]:
        """Do one round; return its line."""
        chance = random.Random(f"{self.seed} {number}")
        model, encoder, processes = RUNS[number % len(RUNS)]
        whole = self.whole(model, encoder, processes)
        aim, how = AIMS[number % len(AIMS)], HOW[number % len(HOW)]

        def draw(**given: Any) -> Blow:
            return Blow.draw(chance, whole.moments, processes, **given)

        blows = [draw(moment=aim, how=how), *(draw() for _ in range(chance.randrange(3)))]
        # A busy machine may let an instant go by: then it is aimed at again.
        again = [draw(moment=aim, how=how) for _ in range(AGAIN)]
        place = self.folder / f"round-{number}"
        place.mkdir()
        config = replace(self.config(model, encoder, place / "run"), resume=True)
        run = Run(config, processes, place / "log", whole.moments)
        for blow in blows:
            run.hit(blow)
        for blow in again:
            if all(moment != aim for _, moment in run.met):
                run.hit(blow)
        run.finish()
        self.hit.update(moment for _, moment in run.met)
        self.signals.update(blow.how.name for blow, _ in run.met)
        other = differing(whole.found, place / "run")
        if not other:
            shutil.rmtree(place)
        name = f"{model}, {encoder}, {processes} process{'es' * (processes > 1)}"
        told = [f"{blow} in {moment}" for blow, moment in run.met]
        return {"round": number, "run": name, "blows": told, "differ": other}


class Run:
    """A run of one round: its parts, and the blows that it met, each with what it did then.

    Args:
        config: with `resume`.
        processes: that train it.
        log: what they print.
        usual: the moments of a run that nobody touched.
    """

    def __init__(self, config: Any, processes: int, log: Path, usual: Moments) -> None:
        self.config, self.processes, self.log, self.usual = config, processes, log, usual
        self.met: list[tuple[Blow, str]] = []
        self.parts = 0
        self._start()

    def _start(self) -> None:
        assert self.parts < MOST, f"no end after {MOST} parts: {self.part.told()}"
        self.part = Part(self.config, self.processes, self.log)
        self.parts, self.attempt = self.parts + 1, 1

    def hit(self, blow: Blow) -> None:
        """Hit it, where it gets there; it then runs on, or in a new part."""
        usual = self.usual.length(blow.moment)
        moment = self.part.strike(blow, usual, self.attempt)
        if moment is None and not self.met and self.part.end() == 0:
            shutil.rmtree(self.config.output)  # nothing has hit it yet: begin anew
            self._start()
            moment = self.part.strike(replace(blow, number=1), 0.0, self.attempt)
        if moment is None:
            return
        self.met.append((blow, moment))
        hit = self.part.moments.attempts(blow.rank)
        self.part.check(blow, hit)
        if self.part.runs():
            self.attempt = hit + 1  # torchrun has started all again
        elif self.part.end() != 0:
            self._start()

    def finish(self) -> None:
        """Let it run to its end."""
        while self.part.end() != 0:
            self._start()


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


def differing(whole: dict[str, Any], output: Path) -> list[str]:
    """Return what is not as in the untouched run, and files that no run leaves behind."""
    found = seen(output)
    left = [
        path.name
        for path in output.rglob("*")
        if path.name == LOCK or path.name.endswith((".part", ".old")) or ".new-" in path.name
    ]
    return [name for name in whole if found[name] != whole[name]] + left


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--seed", type=int, default=0, help="of the signals and their moments")
    parser.add_argument("--folder", type=Path, help="a new one, which is kept")
    options = parser.parse_args()
    begin, bad = time.monotonic(), 0
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kill-rounds-"))
    folder.mkdir(parents=True, exist_ok=True)
    rounds = Rounds(folder, options.seed)
    for number in range(options.first, options.first + options.rounds):
        line = rounds.round(number)
        bad += bool(line["differ"])
        print(json.dumps(line), flush=True)
    missed = [moment for moment in AIMS if not rounds.hit[moment]]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = {
        "rounds": options.rounds,
        "differing": bad,
        "hit": {moment: rounds.hit[moment] for moment in (*AIMS, "opening", END)},
        "signals": dict(sorted(rounds.signals.items())),
        "seconds": round(time.monotonic() - begin),
        "cpu_seconds": round(used.ru_utime + used.ru_stime),
    }
    print(json.dumps(summary), flush=True)
    if not options.folder and not bad:
        shutil.rmtree(folder)
    return int(bad > 0 or (options.rounds >= 20 and bool(missed)))


if __name__ == "__main__":
    sys.exit(main())
