"""Train, evaluate, save and predict in one process, again and again: it must not grow.

    python tests/faults/soak.py --minutes 30 [--growth 1] [--folder FOLDER]

Each turn does so for both models and both encoders, half of it in runs that are resumed. After each
turn the process's memory (RSS), open files and threads are counted. The first fifth of the time is
for warming up. Prints a line of JSON per tenth of the time and one of all; exits with 1 if the
memory has grown by more than `growth` percent, or if open files or threads were not constant.
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
from train_runs import cascade, make_dataset, make_tree, tiny

from xmlkernels.predict.model import Predictor
from xmlkernels.training.loop import train

LEAST = 10  # turns, however short the time
WARM = 0.2  # of the time
TEXTS = ["w0 w1 w2", "w30 w31", "", "w7 w8 w9 w50 w51"] * 8


@dataclass(frozen=True)
class Sample:
    """What the process holds after a turn; `mb` is its resident memory, 10⁶ bytes."""

    seconds: float
    mb: float
    files: int
    threads: int


def sample(begin: float) -> Sample:
    """Count what this process holds now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    # Listing them opens one more.
    files = len(os.listdir("/proc/self/fd")) - 1
    threads = len(os.listdir("/proc/self/task"))
    return Sample(
        time.monotonic() - begin, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, files, threads
    )


def turn(dataset: Path, tree: Path, folder: Path) -> None:
    """Train, evaluate, save and predict with each model and encoder."""
    for number, (model, encoder) in enumerate(
        (model, encoder) for model in ("end", "cascade") for encoder in ("bow", "transformer")
    ):
        output = folder / f"run-{number}"
        more: dict[str, Any] = {"epochs": 1, "save_every": 4, "device": "cpu", "table": "bf16"}
        if encoder == "bow":
            more |= {"encoder": "bow", "min_df": 1}
        if model == "cascade":
            layers = {"layers": ()} if encoder == "bow" else {}
            config = cascade(dataset, output, tree, **more | layers)
        else:
            config = tiny(dataset, output, **more)
        train(config)
        if number % 2:
            shutil.rmtree(output / "checkpoint" / "last")  # go on from the one before
            (output / "metrics.json").unlink()
            train(replace(config, resume=True))
        predictor = Predictor.load(output, threads=1)
        assert len(list(predictor.predict(TEXTS, 5))) == len(TEXTS)
        shutil.rmtree(output)


def figures(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return what became of memory, files and threads after the warm-up."""
    end = samples[-1].seconds
    # At least as many turns as there are kinds of work, whose first uses take memory.
    warm = [one for one in samples[2:] if one.seconds >= WARM * end]
    tenth = max(len(warm) // 10, 2)
    first, last = (median(one.mb for one in part) for part in (warm[:tenth], warm[-tenth:]))
    return {
        "turns": len(samples),
        "seconds": round(end),
        "mb_after_warm_up": round(first, 1),
        "mb_at_the_end": round(last, 1),
        "growth_percent": round(100 * (last / first - 1), 2),
        "files": sorted({one.files for one in warm}),
        "threads": sorted({one.threads for one in warm}),
    }


def faults(found: dict[str, Any], growth: float) -> list[str]:
    """Return what is wrong with these figures."""
    told = []
    if found["growth_percent"] > growth:
        told.append(f"memory grew by {found['growth_percent']} %")
    constant = ("files", "threads")
    return told + [f"{what} were not constant" for what in constant if len(found[what]) > 1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--growth", type=float, default=1, help="percent that are allowed")
    parser.add_argument("--folder", type=Path, help="a new one, which is kept")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    dataset = make_dataset(folder / "raw", keep_texts=True)
    tree = make_tree(dataset, folder / "tree.safetensors")
    begin, samples, told = time.monotonic(), [], 0
    while len(samples) < LEAST or samples[-1].seconds < 60 * options.minutes:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            turn(dataset, tree, folder)
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
