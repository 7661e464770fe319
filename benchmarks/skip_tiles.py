"""Show what tile skipping saves and what it costs, on a made problem.

    python benchmarks/skip_tiles.py

It prints P@k and the share of skipped groups, with and without skipping.

Documents are points near the centres of their labels, labels come in clusters, and half of all
positives belong to a tenth of the labels. `bce_step_` trains the table alone, on fixed points; P@k
is of documents not trained on. Skipping is measured with the labels of a cluster as neighbours, as
a label tree orders them, and with labels in random order.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from xmlkernels.ops import Hyper, bce_step_, matmul_topk

UNIT = 2.0**-13  # of bf16 at 2^-6
# Labels of a cluster, labels of a document, the last 1/LATE of the run.
CLUSTER = 64
PER_DOCUMENT = 4
LATE = 4


@dataclass
class Problem:
    """Documents [N, D] with their labels [N, 4]; the last `held` are not trained on."""

    x: Tensor
    labels: Tensor
    held: int


def make(labels: int, width: int, documents: int, held: int, *, shuffled: bool) -> Problem:
    """Make the documents; `shuffled` puts the labels in random order."""
    g = torch.Generator().manual_seed(0)
    clusters = labels // CLUSTER
    centre = torch.randn(clusters, width, generator=g).repeat_interleave(CLUSTER, 0)
    point = centre + 0.7 * torch.randn(labels, width, generator=g)
    # Labels of a document are of one cluster; half of all documents come from a tenth of them.
    common = torch.rand(documents, generator=g) < 0.5
    few = torch.randint(max(1, clusters // 10), (documents,), generator=g)
    every = torch.randint(clusters, (documents,), generator=g)
    cluster = torch.where(common, few, every)
    within = torch.rand(documents, CLUSTER, generator=g).topk(PER_DOCUMENT).indices
    chosen = cluster[:, None] * CLUSTER + within
    noise = torch.randn(documents, width, generator=g)
    x = torch.nn.functional.normalize(point[chosen].mean(1) + 0.3 * noise)
    # What all texts share, as an encoder's vectors have it.
    x = torch.cat([x[:, 1:], torch.ones(documents, 1)], 1) / 2**0.5
    order = torch.randperm(labels, generator=g) if shuffled else torch.arange(labels)
    return Problem(x, order[chosen], held)


def precision(problem: Problem, weight: Tensor, k: int) -> float:
    """Return P@k in percent over the held-out documents."""
    x, truth = problem.x[-problem.held :], problem.labels[-problem.held :]
    hits = 0
    for at in range(0, len(x), 256):
        _, rows = matmul_topk(x[at : at + 256], weight, None, k)
        hits += int((rows[:, :, None] == truth[at : at + 256, None, :]).any(2).sum())
    return 100 * hits / (k * len(x))


def train(
    problem: Problem, labels: int, steps: int, batch: int, lr: float, units: float
) -> tuple[float, float, float, float, float]:
    """Train a table.

    Returns:
        The share of groups skipped in percent, over the run and in its last quarter; P@1 and P@4 in
        percent; milliseconds per step in that quarter.
    """
    g = torch.Generator().manual_seed(1)
    weight = torch.zeros(labels, problem.x.shape[1], dtype=torch.bfloat16)
    # Logits begin at the labels' mean frequency: first steps of SGD would throw them far below.
    weight[:, -1] = math.log(PER_DOCUMENT / labels) / float(problem.x[0, -1])
    skipped, late, spent = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 0.0
    count = len(problem.x) - problem.held
    skips = {"skip_below": units * UNIT, "skipped": skipped if units else None}
    for step in range(steps):
        pick = torch.randint(count, (batch,), generator=g)
        rows = problem.labels[pick].reshape(-1)
        samples = torch.arange(batch, dtype=torch.int32).repeat_interleave(PER_DOCUMENT)
        order = torch.argsort(rows * batch + samples)
        hyper = Hyper(lr * (1 - step / steps)).tensor()
        if step == steps - steps // LATE:
            late, begin = skipped.clone(), time.perf_counter()
        documents = problem.x[pick], rows[order], samples[order]
        bce_step_(weight, *documents, hyper, torch.tensor([7, step]), **skips)
    spent = time.perf_counter() - begin
    last = skipped - late

    def share(of: Tensor) -> float:
        return 100 * int(of[0]) / max(1, int(of[1]))

    p1, p4 = (precision(problem, weight, k) for k in (1, 4))
    return share(skipped), share(last), p1, p4, 1e3 * spent / (steps // LATE)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"labels": 16_384, "width": 64, "documents": 40_000, "held": 2_000}
    sizes |= {"steps": 2_000, "batch": 32}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=4.0)
    parser.add_argument("--units", type=float, nargs="+", default=[0, 10, 100, 1000])
    o = parser.parse_args(argv)
    what = f"{o.labels:,} labels, width {o.width}, batch {o.batch}, {o.steps:,} steps"
    print(f"{what}, lr {o.lr} falling to 0, bf16, SGD")
    print("order     units  skipped %  at the end %   P@1 %   P@4 %  ms/step at the end")
    for shuffled in (False, True):
        problem = make(o.labels, o.width, o.documents, o.held, shuffled=shuffled)
        for units in o.units:
            share, late, p1, p4, ms = train(problem, o.labels, o.steps, o.batch, o.lr, units)
            name = "random" if shuffled else "clusters"
            skips = f"{share:9.1f}  {late:12.1f}  {p1:6.2f}  {p4:6.2f}  {ms:8.2f}"
            print(f"{name:8}  {units:5g}  {skips}", flush=True)


if __name__ == "__main__":
    main()
