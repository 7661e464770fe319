"""Measure what another program on the cores costs, with waiting threads that sleep or spin.

    python benchmarks/busy.py [--seconds 3] [--busy 1]

Each row is a process of its own under one setting of OpenMP, first alone, then next to `--busy`
processes that count for ever: training in documents per second, and one prediction at a time in
milliseconds (median, 95th percentile), of a bag of words over 8,192 labels and of an encoder of
MiniLM's shape. "as a command" is what `xmlkernels.cli.waiting` chooses at that moment. Run it on an
idle machine: the load average is printed before the first row.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "train")]

SETTINGS = {
    "spin (torch's own)": {},
    "as a command": {"--choose": ""},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "sleep (PASSIVE)": {"OMP_WAIT_POLICY": "PASSIVE"},
}
MODELS = ("bag of words", "MiniLM's shape")
LABELS, VOCABULARY, WORDS, TOKENS = 8192, 20_000, 60, 48
_CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def model_and_batches(name: str) -> tuple[Any, Callable[[int], Any]]:
    """Return an untrained model, and what makes a batch of so many documents."""
    import numpy as np
    import torch

    from xmlkernels.data.batches.bags import BagBatch
    from xmlkernels.data.batches.tokens import Batch
    from xmlkernels.models.end_to_end import EndToEnd
    from xmlkernels.models.training import Training
    from xmlkernels.nn.bow import BowEncoder
    from xmlkernels.nn.encoder import Encoder
    from xmlkernels.nn.full_head import FullHead

    bags, random = name == MODELS[0], np.random.default_rng(0)
    bert = {
        "model_type": "bert",
        "vocab_size": 30_522,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    }
    encoder: Any
    if bags:
        encoder = BowEncoder(VOCABULARY, 256, optimizer="adam")
    else:
        encoder = Encoder.from_config({"model": bert})
    training = Training(encoder_lr=1e-4, head_lr=1e-3, encoder_decay=0.0, warmup=0, total=1_000_000)
    head = FullHead(LABELS, int(encoder.width), bias=True, optimizer="adam")
    model = EndToEnd(encoder, head, training)

    def batch(documents: int) -> Any:
        labels = np.sort(random.choice(LABELS, documents, replace=False))
        samples = torch.from_numpy(random.permutation(documents).astype(np.int32))
        rest = (torch.from_numpy(labels), samples, torch.arange(documents), LABELS)
        if bags:
            token = torch.from_numpy(random.integers(0, VOCABULARY, documents * WORDS))
            offset = torch.arange(0, documents * WORDS + 1, WORDS)
            return BagBatch(token, offset, torch.rand(len(token)), *rest)
        ids = torch.from_numpy(random.integers(5, 30_000, (documents, TOKENS)))
        return Batch(ids, torch.ones_like(ids), *rest)

    return model, batch


def measure(name: str, seconds: float) -> dict[str, float]:
    """Measure documents per second of training, and milliseconds of one prediction."""
    import numpy as np

    model, batch = model_and_batches(name)
    documents = 64 if name == MODELS[0] else 16
    batches = [batch(documents) for _ in range(4)]
    model.train()
    for some in batches[:2]:
        model.step(some)
    steps, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        model.step(batches[steps % 4])
        steps += 1
    rate = steps * documents / (time.perf_counter() - started)
    model.eval()
    one, taken = batch(1), list[float]()
    model.score(one, 10)
    until = time.perf_counter() + seconds
    while not taken or time.perf_counter() < until:
        asked = time.perf_counter()
        model.score(one, 10)
        taken.append((time.perf_counter() - asked) * 1e3)
    median, late = np.percentile(taken, (50, 95))
    return {"documents/s": rate, "ms": float(median), "ms 95%": float(late)}


@contextmanager
def others(count: int) -> Iterator[None]:
    """Keep so many cores busy, by a process each."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def row(setting: dict[str, str], name: str, seconds: float) -> dict[str, float]:
    """Measure in a process of its own: OpenMP reads its environment once."""
    environment = {key: value for key, value in os.environ.items() if key not in _CHOSEN}
    environment |= {key: value for key, value in setting.items() if not key.startswith("--")}
    flags = [key for key in setting if key.startswith("--")]
    command = [sys.executable, __file__, "--measure", name, "--seconds", str(seconds), *flags]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of training, and of prediction, in each row"
    )
    parser.add_argument(
        "--busy", type=int, default=1, help="processes beside it in the second half of the table"
    )
    parser.add_argument("--measure", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--choose", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        if options.choose:
            from xmlkernels.cli import waiting

            waiting.choose()
        print(json.dumps(measure(options.measure, options.seconds)))
        return
    print(
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.2f}, beside it: {options.busy} "
        "busy process(es)"
    )
    print(
        f"{'':>6} {'setting':<22} {'model':<16} {'documents/s':>12} {'ms':>8} {'ms 95%':>8}",
        flush=True,
    )
    for count in (0, options.busy):
        for title, setting in SETTINGS.items():
            for name in MODELS:
                with others(count):
                    got = row(setting, name, options.seconds)
                where = "busy" if count else "alone"
                numbers = f"{got['documents/s']:>12.1f} {got['ms']:>8.2f} {got['ms 95%']:>8.2f}"
                print(f"{where:>6} {title:<22} {name:<16} {numbers}", flush=True)
    print(f"load average at the end {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
