"""Train, evaluate, save, load and predict in one process, again and again: it must not grow.

    python tests/faults/soak.py --minutes 30 [--growth 1] [--folder FOLDER]

Each turn trains both models with both encoders, half of them in runs that are resumed and half with
the label table in a file, and a ranker. It loads what was trained and answers texts that nobody has
seen before, by the new models and by those of the first turn, which stay as a server's do. It is
refused a damaged run, too.

After each turn the process's memory (RSS, with the pages of files and without), open files and
threads are counted. The first fifth of the time is for warming up. Prints a line of JSON per tenth
of the time and one of all; exits with 1 if either has grown by more than `growth` percent of the
memory, or if open files or threads were not constant.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
from ranker_runs import options as ranker_options
from train_runs import cascade, make_dataset, make_tree, tiny

import xmlkernels as xk

CONSTANT = ("files", "threads")
LEAST = 10  # turns, however short the time
WARM = 0.2  # of the time
_LOOKS = 5  # at the threads, after each turn
KINDS = [(model, encoder) for model in ("end", "cascade") for encoder in ("bow", "transformer")]


@dataclass(frozen=True)
class Sample:
    """What the process holds after a turn.

    Attributes:
        mb: its resident memory, 10⁶ bytes.
        own_mb: of these, without pages of files, which the system takes and gives back as it likes.
    """

    seconds: float
    mb: float
    own_mb: float
    files: int
    threads: int


def sample(begin: float) -> Sample:
    """Count what this process holds now."""
    gc.collect()
    told = Path("/proc/self/statm").read_text().split()
    held, of_files = (int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6 for pages in told[1:3])
    # Listing them opens one more.
    files = len(os.listdir("/proc/self/fd")) - 1
    return Sample(time.monotonic() - begin, held, held - of_files, files, threads())


def threads() -> int:
    """Count the threads that stay: one that has ended and was joined is listed a moment longer."""
    found = []
    for _ in range(_LOOKS):
        found.append(len(os.listdir("/proc/self/task")))
        time.sleep(0.02)
    return min(found)


class Work:
    """What a turn does; the predictors of the first turn stay, and answer in every other one.

    Args:
        folder: an empty one, for data and runs.
    """

    def __init__(self, folder: Path) -> None:
        self.dataset = make_dataset(folder / "raw", keep_texts=True)
        self.tree = make_tree(self.dataset, folder / "tree.safetensors")
        self.folder, self.turns, self.random = folder, 0, np.random.default_rng(0)
        self.staying: list[Any] = []

    def turn(self) -> None:
        """Train, evaluate, save, load and predict with each model and encoder, and a ranker."""
        made = []
        for number in range(len(KINDS)):
            output = self.train(number)
            # Half of those whose table was in memory are read from the file, and the other way.
            store = ("ram", "file")[self.turns // 2 % 2]
            made.append(xk.Predictor.load(output, threads=1, table_store=store))
        output = self.folder / "ranker"
        xk.train_ranker(ranker_options(self.dataset, output, checkpoint=str(self.at(0))))
        made.append(xk.RankedPredictor.load(output, self.at(0), threads=1))
        for predictor in made + self.staying:
            self.ask(predictor)
        self.refused()
        self.staying = self.staying or made
        for folder in (output, *map(self.at, range(len(KINDS)))):
            shutil.rmtree(folder)
        self.turns += 1

    def at(self, number: int) -> Path:
        """Return the folder of a run."""
        return self.folder / f"run-{number}"

    def train(self, number: int) -> Path:
        """Train a run of the kind of that number, and return its folder."""
        model, encoder = KINDS[number]
        output = self.at(number)
        more: dict[str, Any] = {"epochs": 1, "save_every": 4, "device": "cpu", "table": "bf16"}
        if (self.turns + number // 2) % 2:
            more["table_store"] = f"file:{self.folder / 'table'}"
        if encoder == "bow":
            more |= {"encoder": "bow", "min_df": 1}
        if model == "cascade":
            layers = {"layers": ()} if encoder == "bow" else {}
            config = cascade(self.dataset, output, self.tree, **more | layers)
        else:
            config = tiny(self.dataset, output, **more)
        xk.train(config)
        if number % 2:
            shutil.rmtree(output / "checkpoint" / "last")  # go on from the one before
            (output / "metrics.json").unlink()
            xk.train(replace(config, resume=True))
        return output

    def ask(self, predictor: Any) -> None:
        """Have some texts answered together, and some one by one."""
        texts = self.texts(32)
        # Few sizes: oneDNN keeps what it has made for each shape, up to 1,024 of them.
        k, batch = int(self.random.integers(1, 9)), int(self.random.choice([8, 32]))
        assert len(list(predictor.predict(texts, k, batch_size=batch))) == len(texts)
        for text in texts[:4]:
            [found] = predictor.predict([text], k, batch_size=1, window=1, prefetch=0)
            assert len(found) <= k

    def texts(self, count: int) -> list[str]:
        """Draw texts of words that the models know and of words that nobody has seen before."""
        new = self.random.integers(1 << 40, size=(count, 4))
        known = self.random.integers(90, size=(count, 12))
        long = self.random.integers(13, size=count)
        return [
            " ".join([f"w{word}" for word in line[:length]] + [f"{word:x}" for word in words])
            for line, length, words in zip(known, long, new, strict=True)
        ]

    def refused(self) -> None:
        """Load a run without a whole checkpoint."""
        folder = self.at(0) / "checkpoint"
        for path in folder.glob("*/tensors.safetensors"):
            os.truncate(path, path.stat().st_size - 1)
        with suppress(xk.InputError):
            xk.Predictor.load(folder)
            raise AssertionError("a damaged run was loaded")


def figures(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return what became of memory, files and threads after the warm-up."""
    end = samples[-1].seconds
    # At least as many turns as there are kinds of them, whose first uses take memory.
    warm = [one for one in samples[4:] if one.seconds >= WARM * end]
    tenth = max(len(warm) // 10, 2)
    found: dict[str, Any] = {"turns": len(samples), "seconds": round(end)}
    for name in ("mb", "own_mb"):
        parts = (warm[:tenth], warm[-tenth:])
        first, last = (median(getattr(one, name) for one in part) for part in parts)
        found |= {f"{name}_after_warm_up": round(first, 1), f"{name}_at_the_end": round(last, 1)}
        percent = 100 * (last - first) / median(one.mb for one in warm[:tenth])
        found[f"{name}_growth_percent"] = round(percent, 2)
    for name in CONSTANT:
        found[name] = sorted({getattr(one, name) for one in warm})
    return found


def faults(found: dict[str, Any], growth: float) -> list[str]:
    """Return what is wrong with these figures."""
    names = {"mb": "memory", "own_mb": "memory without files"}
    grown = {told: found[f"{name}_growth_percent"] for name, told in names.items()}
    told = [f"{name} grew by {percent} %" for name, percent in grown.items() if percent > growth]
    return told + [f"{what} were not constant" for what in CONSTANT if len(found[what]) > 1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--growth", type=float, default=1, help="percent that are allowed")
    parser.add_argument("--folder", type=Path, help="a new one, which is kept")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    work = Work(folder)
    begin, samples, told = time.monotonic(), [], 0
    while len(samples) < LEAST or samples[-1].seconds < 60 * options.minutes:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            work.turn()
        samples.append(sample(begin))
        if samples[-1].seconds >= 6 * options.minutes * (told + 1):
            told = int(samples[-1].seconds / (6 * options.minutes))
            print(json.dumps({"turn": len(samples)} | asdict(samples[-1])), flush=True)
    found = figures(samples)
    wrong = faults(found, options.growth)
    print(json.dumps(found | {"faults": wrong}), flush=True)
    if not options.folder:
        with suppress(OSError):
            shutil.rmtree(folder)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
