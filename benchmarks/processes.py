"""Compare several processes of one thread each with one process of as many threads.

    python benchmarks/processes.py [--model cascade] [--labels 100000] [--rounds 3]

Both train the same model on the same batches: one process with all threads, then a group of gloo
processes that share the tables, in turn for some rounds. It prints the milliseconds of a step (the
median, of the best round), its CPU time over all processes, what a quiet machine would take at
least, what the first process receives, and the ratio of the two speeds. The rate of `torch.mm` on
all threads and the load average stand beside each round: on a busy machine the clock says nothing.

What a quiet machine takes at least is CPU time on the longest path: of one process its main
thread's, which computes a share of each parallel part and all of the rest; of several with a thread
each, that of the largest process.

What to expect: end to end, nearly the speed of one process. A cascade's step is short, and each
process spends time of its own on Python, on messages, on shortlists and on the words' update, which
it repeats in full. It falls behind, the less the more documents a batch has.
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

_LIMIT = 600  # seconds of a round
VOCABULARY, WORDS, PER_DOCUMENT = 20_000, 60, 5


def end_to_end(asked: argparse.Namespace) -> tuple[Any, list[Any]]:
    """Make a bag of words with a full table, of which this process holds its rows, and batches."""
    import numpy as np
    import torch

    from xmlkernels import dist
    from xmlkernels.data.batches.bags import BagBatch
    from xmlkernels.models.end_to_end import EndToEnd
    from xmlkernels.models.training import Training
    from xmlkernels.nn.bow import BowEncoder
    from xmlkernels.nn.full_head import FullHead
    from xmlkernels.nn.shard import shard_rows

    shard = shard_rows(asked.labels, dist.size(), dist.rank()) if dist.size() > 1 else None
    head = FullHead(asked.labels, asked.width, dtype=asked.table, optimizer="adam", shard=shard)
    settings = Training(encoder_lr=1e-3, head_lr=1e-3, encoder_decay=0.0, warmup=0, total=1 << 30)
    model = EndToEnd(BowEncoder(VOCABULARY, asked.width, optimizer="adam"), head, settings)
    random, batches = np.random.default_rng(0), []
    for _ in range(4):
        count, own = asked.batch, dist.part(asked.batch)
        token = torch.from_numpy(random.integers(0, VOCABULARY, (count, WORDS)))[own].reshape(-1)
        offset = torch.arange(0, len(token) + 1, WORDS)
        pairs = np.unique(random.integers(0, asked.labels * count, count * PER_DOCUMENT))
        row, sample = torch.from_numpy(pairs // count), torch.from_numpy(pairs % count).int()
        inputs = token, offset, torch.full((len(token),), WORDS**-0.5)
        batches.append(BagBatch(*inputs, row, sample, torch.arange(count), asked.labels))
    return model, batches


def cascade(asked: argparse.Namespace) -> tuple[Any, list[Any]]:
    """Make a bag of words with a cascade, of which this process holds its clusters, and batches.

    16 labels stand in a cluster, 8 clusters in one of the coarsest level; 64 and 128 are kept.
    """
    import numpy as np
    import torch
    from scipy.sparse import csr_matrix

    from xmlkernels import dist
    from xmlkernels.data.batches.bags import BagBatches
    from xmlkernels.models.cascade import Cascade
    from xmlkernels.models.training import CascadeTraining
    from xmlkernels.nn.bow import BowEncoder
    from xmlkernels.nn.cascade_heads import CascadeHeads
    from xmlkernels.nn.cluster_shard import tree_shards
    from xmlkernels.tree.label_tree import LabelTree, arrangement

    fine = np.arange(asked.labels) // 16
    tree, shards = LabelTree.from_partitions([fine // 8, fine]), None
    if dist.size() > 1:
        bounds = [torch.tensor(tree.bounds(r)) for r in range(tree.levels - 1)]
        shards = tree_shards(bounds, tree.sizes[0], dist.size())[dist.rank()]
    most, kept = [tree.widest(0), tree.widest(1)], [min(64, tree.sizes[0]), min(128, tree.sizes[1])]
    how: dict[str, Any] = {"layers": ((0,),) * 3, "topk": kept, "dtype": asked.table}
    heads = CascadeHeads(tree.sizes, most, asked.width, shards=shards, **how)
    settings = CascadeTraining(encoder_lr=1e-3, total=1 << 30)
    encoder = BowEncoder(VOCABULARY, asked.width, optimizer="adam")
    random, count = np.random.default_rng(0), 4 * asked.batch
    data = [
        csr_matrix(
            (np.ones(count * each, np.float32), indices, np.arange(count + 1) * each),
            shape=(count, columns),
        )
        for each, columns in ((WORDS, VOCABULARY), (PER_DOCUMENT, asked.labels))
        for indices in [random.integers(0, columns, count * each)]
    ]
    for matrix in data:
        matrix.sum_duplicates()
    made = BagBatches(*data, asked.batch, prefetch=0, **arrangement(tree)).shared(dist.part)
    batches = [made.collate(documents) for documents in np.arange(count).reshape(4, -1)]
    return Cascade(encoder, heads, tree, settings), batches


MODELS: dict[str, Callable[[argparse.Namespace], tuple[Any, list[Any]]]] = {
    "end_to_end": end_to_end,
    "cascade": cascade,
}


def work(asked: argparse.Namespace) -> None:
    """Train, as one process of a group, and print the figures of this one."""
    import torch

    from xmlkernels import dist

    torch.set_num_threads(asked.threads)
    dist.start(torch.device("cpu"))
    model, batches = MODELS[asked.model](asked)
    model.train()
    for batch in batches[:2]:
        model.step(batch)
    dist.wait()
    taken, before = [], resource.getrusage(resource.RUSAGE_SELF)
    own, main = time.process_time(), time.thread_time()
    with dist.counted() as received:
        for step in range(asked.steps):
            started = time.perf_counter()
            model.step(batches[step % len(batches)])
            taken.append(time.perf_counter() - started)
    main, own = time.thread_time() - main, time.process_time() - own
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = sum(getattr(after, t) - getattr(before, t) for t in ("ru_utime", "ru_stime"))
    found = {
        "ms": sorted(taken)[len(taken) // 2] * 1e3,
        "cpu_ms": cpu / asked.steps * 1e3,
        "path_ms": (own if asked.threads == 1 else main) / asked.steps * 1e3,
        "received": sum(received.values()) // asked.steps,
    }
    dist.wait()
    print(json.dumps(found), flush=True)
    if dist.running():
        dist.stop()
        os._exit(0)


def group(count: int, threads: int, words: Sequence[str]) -> dict[str, float]:
    """Run a group of processes; the time is the slowest one's, CPU time that of all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    names |= {"WORLD_SIZE": str(count), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--work", "--threads", str(threads), *words]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | names | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        ends = [process.communicate(timeout=_LIMIT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    if any(process.returncode for process in started):
        raise SystemExit(f"a process of {count} ended with an error")
    found = [json.loads(end) for end in ends]
    return {
        "ms": max(one["ms"] for one in found),
        "cpu_ms": sum(one["cpu_ms"] for one in found),
        "path_ms": max(one["path_ms"] for one in found),
        "received": found[0]["received"],
    }


def products(threads: int) -> float:
    """Return the GFLOP/s of `torch.mm` on so many threads, the best of some."""
    import torch

    torch.set_num_threads(threads)
    a, best = torch.randn(1024, 1024), 1e9
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best / 1e9


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="end_to_end")
    parser.add_argument("--table", choices=("fp32", "bf16", "fp16", "fp8"), default="fp32")
    for name, value in (
        ("labels", 100_000),
        ("width", 256),
        ("batch", 256),
        ("steps", 10),
        ("processes", 2),
        ("rounds", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.work:
        work(asked)
        return
    from benchmarks.timing import load_average

    words = [
        word
        for name in ("model", "table", "labels", "width", "batch", "steps")
        for word in (f"--{name}", str(getattr(asked, name)))
    ]
    many = asked.processes
    print(f"{'':<28}{'ms':>9}{'CPU ms':>9}{'path ms':>9}{'received':>11}  (load, torch.mm)")
    best: dict[int, dict[str, float]] = {}
    for _ in range(asked.rounds):
        for count, threads in ((1, many), (many, 1)):
            beside = f"({load_average():.1f}, {products(many):.0f} GFLOP/s)"
            found = group(count, threads, words)
            name = f"{count} x {threads} threads"
            print(f"{name:<28}{_cells(found)}  {beside}", flush=True)
            for key, value in found.items():
                kept = best.setdefault(count, dict(found))
                kept[key] = min(kept[key], value)
    speed, cpu, path = (best[1][key] / best[many][key] for key in ("ms", "cpu_ms", "path_ms"))
    print(
        f"{many} processes: {speed:.2f} x the speed of one, by the clock; {path:.2f} x by the "
        f"longest path; {1 / cpu:.2f} x its CPU time"
    )


def _cells(found: dict[str, float]) -> str:
    times = "".join(f"{found[key]:>9.1f}" for key in ("ms", "cpu_ms", "path_ms"))
    return f"{times}{found['received']:>11,.0f}"


if __name__ == "__main__":
    main()
