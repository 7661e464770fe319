"""The model's rows of `cluster_step_`.

Samples select clusters at random, as in `cases_cluster_step.py`: that says how many pairs a cluster
has. The sort of the pairs and two sums over a list are torch's own kernels, in no row.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks.case import DTYPES
from benchmarks.cases_cluster_step import BENCHMARK, POSITIVES
from benchmarks.cluster_work import cluster_work, sizes
from benchmarks.sass_launch import Trips
from benchmarks.sass_work import Card, Row, Traffic, Work, of_triton
from benchmarks.shapes import Shape
from xmlkernels.triton import cluster_pairs

STEPS = 1_000
"""Steps done before; Adam's powers take as many rounds as this has bits."""


def cluster_step(shape: Shape, dtype: torch.dtype) -> Callable[[], object]:
    """Return a call with Adam whose tensors take no memory until they are touched."""
    from xmlkernels.triton.cluster_step import cluster_step_

    chosen, rows, count = sizes(shape)
    weight, x = torch.empty(shape.L, shape.D, dtype=dtype), torch.empty(shape.B, shape.D)
    clusters = torch.empty(shape.B, chosen, dtype=torch.int64)
    row_ptr = torch.empty(count + 1, dtype=torch.int64)
    positives = POSITIVES * shape.B
    pos_row = torch.empty(positives, dtype=torch.int64)
    pos_sample = torch.empty(positives, dtype=torch.int32)
    numbers = torch.zeros(7), torch.zeros(2, dtype=torch.int64)
    batch = x, clusters, row_ptr, rows, pos_row, pos_sample
    momentum, second = torch.empty_like(weight), torch.empty_like(weight)
    return lambda: cluster_step_(weight, *batch, *numbers, momentum=momentum, second=second)


def share(shape: Shape, pairs: int) -> float:
    """Return the share of clusters that at least this many samples select."""
    chosen, _, count = sizes(shape)
    p = chosen / count
    some = range(min(pairs, shape.B))
    less = (math.comb(shape.B, i) * math.pow(p, i) * math.pow(1 - p, shape.B - i) for i in some)
    return 1 - sum(less)


def touched_rows(shape: Shape) -> float:
    """Return how many rows some sample selects."""
    _, rows, count = sizes(shape)
    return count * rows * share(shape, 1)


def loops_of_data(shape: Shape) -> dict[str, Trips]:
    """Return trips and branches that depend on data.

    In a tile of the update, rows of several clusters go together: beyond two pairs it does what the
    one with most pairs needs.
    """
    chosen, rows, count = sizes(shape)
    clusters = (cluster_pairs.ROWS + rows - 1) / rows  # that have rows in a tile
    in_span = (cluster_pairs.SPAN * cluster_pairs.ROWS + rows - 1) / rows  # pairs of a program
    of_cluster = POSITIVES / chosen + POSITIVES * (shape.B - 1) / count

    def in_tile(pairs: int) -> float:
        """Return the share of tiles in which some row has at least this many pairs."""
        return 1 - (1 - share(shape, pairs) / share(shape, 1)) ** clusters

    beyond = sum(in_tile(pairs) for pairs in range(3, 20))
    return {
        "_gradient: if most > 2": in_tile(3),
        "_gradient: for p": beyond / in_tile(3),
        "_targets: for p": min(1.0, in_span * of_cluster),
        "_correct_biases: while left > 0": STEPS.bit_length(),
    }


def moved(shape: Shape, element: int) -> dict[str, Traffic]:
    """Return what goes between memory and L2: weights for each pair, and the touched rows."""
    chosen, rows, _ = sizes(shape)
    candidates = shape.B * chosen * rows * shape.D * element
    touched = touched_rows(shape) * shape.D * element

    def score(a: Mapping[str, Any]) -> tuple[float, float]:
        return candidates + 4 * shape.B * chosen * rows, 0.0

    def update(a: Mapping[str, Any]) -> tuple[float, float]:
        return 6 * touched, 0.0  # weight and two moments come and go

    return {"_score_slots": score, "_update_list": update}


def row(shape: Shape, name: str) -> Row:
    """Return the row of Adam at a shape of the card's list; the moments have the table's format."""
    dtype = DTYPES[name]
    plain = of_triton(
        cluster_step(shape, dtype), loops_of_data(shape), moved(shape, dtype.itemsize)
    )
    tiles = math.ceil(touched_rows(shape) / cluster_pairs.ROWS)

    def works(card: Card) -> Iterable[Work]:
        for work in plain(card):
            # The grid has room for every pair's rows; programs beyond the list end at once.
            yield replace(work, blocks=tiles) if work.kernel == "_update_list" else work

    size = dtype.itemsize
    return Row("cluster_step", shape.name, "adam", name, *cluster_work(shape, size, size), works)


ROWS = tuple(row(shape, "bf16") for shape in BENCHMARK.gpu_shapes)
