"""Time one query from text to labels: the encoder with its tokens, and with each head behind it.

    python benchmarks/latency.py [--labels 131072]

Each row is `Predictor.predict` on one text at a time, as `xmlkernels predict --latency` has it:
tokens, encoder, every score or the shortlist's, the best ten. The encoder is all-MiniLM-L6-v2 and
the tables are random: no time depends on values. The cascade has 2^10 and 2^13 clusters and keeps
128 and 256 of them. Texts have 8 to 60 words.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itertools

import numpy as np
import torch

from benchmarks.timing import Clock, Load, alternate, load_average, machine_name
from xmlkernels.data.inputs import TokenInputs
from xmlkernels.data.tokens import load_tokenizer
from xmlkernels.installed import source_of
from xmlkernels.models.base import Model
from xmlkernels.models.cascade import Cascade
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.layer_recipe import default_layers
from xmlkernels.predict.model import Predictor
from xmlkernels.tree.label_tree import LabelTree

DEPTHS, TOPK = (10, 13), (128, 256)
WORDS = [
    f"{word}{end}"
    for word in ("open", "read", "sort", "row", "key", "file", "error")
    for end in ("", "s", "ing", " of the")
]


def texts(count: int) -> list[str]:
    """Make texts of 8 to 60 words, always the same."""
    random = np.random.default_rng(0)
    return [" ".join(random.choice(WORDS, int(n))) for n in random.integers(8, 61, count)]


def tree_of(labels: int) -> LabelTree:
    """Return a tree in which neighbours share a cluster."""
    sizes = [min(2**depth, labels) for depth in DEPTHS] + [labels]
    pairs = itertools.pairwise(sizes)
    children = tuple(np.linspace(0, below, n + 1).astype(np.int64) for n, below in pairs)
    return LabelTree(children, np.arange(labels), {})


def models(encoder: Encoder, labels: int, dtype: str) -> dict[str, Model]:
    """Return the encoder with a table of one label, with all labels, and with a cascade."""
    tree = tree_of(labels)
    heads = CascadeHeads(
        tree.sizes,
        [tree.widest(r) for r in range(tree.levels - 1)],
        encoder.hidden,
        layers=default_layers(encoder.layers, tree.levels),
        topk=TOPK,
        dtype=dtype,
        optimizer="sgd",
    )
    return {
        "encoder alone": EndToEnd(encoder, FullHead(1, encoder.width, dtype=dtype)),
        "all labels": EndToEnd(encoder, FullHead(labels, encoder.width, dtype=dtype)),
        "cascade": Cascade(encoder, heads, tree),
    }


def query(predictor: Predictor, some: Sequence[str]) -> Callable[[], object]:
    """Return one pass over the texts, one call each."""

    def step() -> None:
        for text in some:
            next(predictor.predict([text], 10, batch_size=1, window=1, prefetch=0))

    return step


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=int, default=131_072)
    parser.add_argument(
        "--encoder", default="minilm", help="hub name, folder, or the installed minilm"
    )
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--table", nargs="+", default=["fp32", "bf16"])
    o = parser.parse_args(argv)
    source = source_of(o.encoder)
    encoder = Encoder.from_pretrained(source).eval()
    inputs, some = TokenInputs(None, load_tokenizer(source), 128), texts(o.texts)
    steps = {
        (table, name): query(Predictor(model, inputs), some)
        for table in o.table
        for name, model in models(encoder, o.labels, table).items()
    }
    load = Load()
    found = alternate(steps, Clock("cpu"), rounds=o.rounds, budget_s=0)
    what = f"{o.labels:,} labels, {o.texts} texts of 8 to 60 words"
    print(f"{machine_name('cpu')}, {torch.get_num_threads()} threads, {what}")
    print("table  head            median ms  worst round ms")
    for (table, name), samples in found.items():
        median, worst = np.median(samples) / o.texts, max(samples) / o.texts
        print(f"{table:5}  {name:14}  {median:9.2f}  {worst:14.2f}")
    others = load.others()
    busy = "unknown" if others is None else f"{others:.2f}"
    print(f"load average {load_average()}, processors busy with others {busy}")


if __name__ == "__main__":
    main()
