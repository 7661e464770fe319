"""Measure how long training stands still for a checkpoint, and how long the checkpoint takes.

    python benchmarks/checkpoint_stall.py [--gb 1] [--folder DIR] [--repeats 5]

A label table of so many gigabytes (2^30 bytes, bf16, SGD without momentum) is trained step by step
on a few of its rows, so that the loop costs little itself. For each save it prints the seconds that
the loop stood still (waiting for the save before, and copying), the seconds until the new
checkpoint was in place, their ratio, and what a step took before the save and during it. The first
save alone waits for the memory of the copy. The checkpoint is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from xmlkernels.checkpoint import CheckpointFolder, Saver, new_identity
from xmlkernels.nn.full_head import FullHead

WIDTH, DOCUMENTS = 256, 4


def measured(head: FullHead, saver: Saver, number: int, steps: int) -> dict[str, float]:
    """Save once beside a loop of steps.

    Returns:
        Seconds: `still`, `save`, and a step's median `before` and `during` it.
    """
    x = torch.randn(DOCUMENTS, WIDTH)
    row, sample = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)

    def step() -> float:
        start = time.perf_counter()
        head.step(x, row, sample, lr=0.1)
        return time.perf_counter() - start

    before, during = [step() for _ in range(steps)], []
    start = time.perf_counter()
    saver.settle()
    state = {"number": number, "steps": int(head.counter[1])}
    held = {f"head.{name}": value for name, value in head.state_dict().items()}
    saver.save(held, state, {}, new_identity(), step=number)
    still = time.perf_counter() - start
    while saver.saved != number and not saver.failed:
        during.append(step())
    whole = time.perf_counter() - start
    saver.settle()
    return {
        "still": still,
        "save": whole,
        "share": still / whole,
        "step_before": statistics.median(before),
        "step_during": statistics.median(during or [0.0]),
        "steps_during": len(during),
    }


def main(words: list[str] | None = None) -> list[dict[str, float]]:
    """Run the command; return what it prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=1.0, help="size of the table")
    parser.add_argument("--folder", default=None, help="on the disk to be measured")
    parser.add_argument("--repeats", type=int, default=5, help="saves")
    parser.add_argument("--steps", type=int, default=3, help="before each save")
    given = parser.parse_args(words)
    rows = max(1, int(given.gb * 2**30 / (2 * WIDTH)))
    head = FullHead(rows, WIDTH, dtype="bf16", optimizer="sgd", std=0)
    found = []
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        saver = Saver(CheckpointFolder(Path(place)), None, lambda size: True)
        saver.prepare({f"head.{name}": value for name, value in head.state_dict().items()})
        for number in range(1, given.repeats + 1):
            load = os.getloadavg()[0]
            found.append(measured(head, saver, number, given.steps) | {"load": load})
            print(json.dumps({key: round(value, 4) for key, value in found[-1].items()}))
    shares = [line["share"] for line in found]
    print(f"still / save: median {statistics.median(shares):.1%}, largest {max(shares):.1%}")
    return found


if __name__ == "__main__":
    main()
