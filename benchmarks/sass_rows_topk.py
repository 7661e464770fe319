"""The model's row of `matmul_topk`.

The best rows of a sample lie anywhere in the table. What PyTorch does to the k keys of a sample
at the end is left out.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch

from benchmarks.cases_matmul_topk import BENCHMARK, topk_work
from benchmarks.sass_launch import Trips
from benchmarks.sass_work import Card, Row, Work, Works, of_triton

BITS = 32
"""Of a key, that a cut looks at: all of its score."""


def matmul_topk(batch: int, labels: int, k: int) -> Callable[[], object]:
    """Return a call whose tensors take no memory until they are touched."""
    from xmlkernels.triton import matmul_topk as op

    weight, x = torch.empty(labels, 768, dtype=torch.bfloat16), torch.empty(batch, 768)

    def call() -> None:
        # The lists are never filled, and are not sorted.
        same = mock.patch.object(torch, "sort", lambda t, **_: torch.return_types.sort((t, t)))
        with same:
            op.matmul_topk(x, weight, None, k)

    return call


def turns(k: int) -> Callable[[Mapping[str, Any]], float]:
    """Return how often a tile takes one key of each word: the most bits of a word, on average."""

    def told(a: Mapping[str, Any]) -> float:
        words, bits = 4 * a["BL"], a["BB"] // 4
        passing = bits * k / a["begin"]  # of a word, Poisson
        below, term, at_least = 0.0, math.exp(-passing), 0.0
        for count in range(bits):
            below += term
            at_least += 1 - min(below, 1.0) ** words
            term *= passing / (count + 1)
        return at_least

    return told


def tiles(a: Mapping[str, Any]) -> float:
    """Return the tiles of a program; on the CPU, where launches are recorded, there are three."""
    labels, samples = a["end"] - a["begin"], a["batch"]
    return float(math.ceil(labels / a["BL"]) * math.ceil(samples / a["BB"])) / 3


def loops_of_data(k: int) -> dict[str, Trips]:
    """Return trips that depend on data: no list overflows, and cuts hold their lists."""
    return {
        "score_labels: for tile": tiles,
        "_append_passing: while tl.max(tl.reshape(left, (4 * BL,)), axis=0) > 0": turns(k),
        "cut_lists: for start": 1,
        "_find_bound: while (bit >= 0) & (reach != k)": BITS,
        "_count_from: for start": 0,
        "recount_labels: for tile": 0,
    }


def score_traffic(a: Mapping[str, Any]) -> tuple[float, float]:
    """Return what a chunk moves: its rows once from memory, a tile's rows and samples from L2."""
    row = 2 * a["D"]
    rows, samples = a["end"] - a["begin"], math.ceil(a["batch"] / a["BB"])
    cache = rows * samples * row + rows / a["BL"] * samples * a["BB"] * row
    by_tma = not isinstance(a["weight"], torch.Tensor)
    return rows * row, cache if by_tma else 0.0


def works(k: int) -> Works:
    """Return the launches that have something to do: those after an overflow return at once."""
    call = matmul_topk(AT.B, AT.L, k)
    all_of = of_triton(call, loops_of_data(k), {"score_labels": score_traffic})

    def busy(card: Card) -> list[Work]:
        return [w for w in all_of(card) if w.kernel in ("score_labels", "cut_lists")]

    return busy


(AT,) = (shape for shape in BENCHMARK.gpu_shapes)
ROWS = (Row("matmul_topk", AT.name, "topk", "bf16", *topk_work(AT, 2), works(AT.K or 1)),)
