"""Train and evaluate on made documents of very many labels, and say what memory and time it took.

    python benchmarks/many_labels.py --labels 20_000_000 --steps 300 --output /scratch/many
    python benchmarks/many_labels.py --labels 100_000_000 --steps 4 --batch 8 --test 16 \
        --output /scratch/many --table-store file:/scratch/table

It is the loop of `xmlkernels train`, with a bag of words, a bf16 table and SGD without momentum;
the data are written first. Labels are drawn with a frequency of one over their rank, and a document
names each of its labels in three words, so that there is something to learn.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from xmlkernels import RECIPES, Dataset, train
from xmlkernels.training.config import Config

_WORDS = 997  # of each place in a label's name


def documents(count: int, labels: int, seed: int) -> tuple[list[str], list[list[int]]]:
    """Make texts and the labels of each: one to three, the frequent ones often."""
    generator = np.random.default_rng(seed)
    texts, truth = [], []
    for _ in range(count):
        drawn = np.floor(labels ** generator.random(generator.integers(1, 4))).astype(np.int64) - 1
        own = sorted(set(drawn.tolist()))
        words = [f"{a}{label // _WORDS**n % _WORDS}" for label in own for n, a in enumerate("abc")]
        texts.append(" ".join([*words, f"noise{generator.integers(50)}"]))
        truth.append(own)
    return texts, truth


def write(folder: Path, labels: int, count: int, test: int) -> Dataset:
    """Write the dataset, or open it where it is there."""
    return Dataset.from_texts(
        folder,
        train=documents(count, labels, 0),
        test=documents(test, labels, 1),
        num_labels=labels,
    )


def config(args: argparse.Namespace) -> Config:
    """Return the settings of the run."""
    found: Config = RECIPES["bow"].config.replace(
        dataset=str(args.output / "data"),
        output=str(args.output / "run"),
        overwrite=True,
        bow_width=args.width,
        ngrams=1,
        min_df=1,
        bias=False,
        frequency_bias=False,
        centroid_norm=0.0,
        table="bf16",
        table_optimizer="sgd",
        momentum=0.0,
        table_lr=args.lr,
        table_store=args.table_store,
        batch=args.batch,
        epochs=1,
        warmup=0,
        loss_every=1,
        log_every=max(1, args.steps // 20),
        save_every=0,
        keep=0,
        top_k=5,
        evaluate_batch=args.test,
    )
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Write, train, evaluate; print and return gigabytes and seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, default=20_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--test", type=int, default=64, help="documents that are evaluated")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--table-store", default="ram")
    parser.add_argument("--output", type=Path, required=True, help="folder of data and run")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    write(args.output / "data", args.labels, args.steps * args.batch, args.test)
    written = time.perf_counter() - start
    report = train(config(args))
    lines = (args.output / "run" / "log.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "documents_per_second" in line]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found = {
        "steps": report["steps"],
        "first loss": losses[0],
        "last loss": losses[-1],
        "P@1": report["test"]["P@1"],
        "peak RSS, GB": usage.ru_maxrss * 1024 / 1e9,
        "seconds of data": written,
        **{f"seconds of {name}": spent for name, spent in report["seconds"].items()},
        "seconds": time.perf_counter() - start,
        "CPU seconds": usage.ru_utime + usage.ru_stime,
        "load average": os.getloadavg()[0],
    }
    print(f"{args.labels:,} labels x {args.width} bf16, {args.table_store.partition(':')[0]}")
    for name, value in found.items():
        print(f"  {name}: {value:,.2f}")
    return found


if __name__ == "__main__":
    main()
