"""The shapes that are measured, by op. Letters: B batch, L labels, D width, S shortlist
(`sparse_update`: N, the touched rows, of a table of L; it has no batch and says B = 1; `bag_step`:
tokens of a bag), K top-k."""

import difflib
from dataclasses import dataclass

from xmlkernels.errors import InputError


@dataclass(frozen=True)
class Shape:
    """One shape; a letter that the op does not have is None."""

    name: str
    B: int
    L: int
    D: int
    S: int | None = None
    K: int | None = None


SHAPES: dict[str, tuple[Shape, ...]] = {
    "bce_step": (
        Shape("B32-L4k", 32, 4_271, 384),  # the labels of EURLEX57K: a table that fits the caches
        Shape("B64-L16k", 64, 16_384, 384),
        Shape("B64-L131k", 64, 131_072, 384),
        Shape("B256-L131k", 256, 131_072, 384),
        Shape("B64-L131k-D768", 64, 131_072, 768),
        Shape("B64-L1M-D64", 64, 1_000_000, 64),  # shows that memory does not grow with L
    ),
    "cluster_step": (  # K clusters of S / K rows for each sample
        Shape("B64-L1k-level0", 64, 1_024, 384, S=1_024, K=1),  # one cluster of all rows
        Shape(
            "B64-L8k-S1024", 64, 8_192, 384, S=1_024, K=128
        ),  # the second level: most rows have several samples
        Shape("B64-L131k-S1024", 64, 131_072, 384, S=1_024, K=128),
        Shape("B64-L670k-S4400", 64, 670_000, 384, S=4_400, K=400),
        Shape("B64-L670k-S4400-D768", 64, 670_000, 768, S=4_400, K=400),
        Shape(
            "B64-L131k-cascade", 64, 131_072, 384, S=4_096, K=256
        ),  # all levels: see benchmarks/cases_cascade.py
    ),
    "matmul_topk": (
        Shape("B32-L4k", 32, 4_271, 384, K=10),
        Shape("B64-L131k", 64, 131_072, 384, K=100),
        Shape("B1-L670k", 1, 670_000, 384, K=10),  # one query: bound by reading the table
        Shape("B256-L670k", 256, 670_000, 384, K=100),
    ),
    "bce_loss": (Shape("B64-L131k", 64, 131_072, 384),),
    "bag_step": (  # S tokens of each document, rows of a vocabulary of L
        Shape("B64-S64-L50k", 64, 50_000, 256, S=64),
        Shape("B256-S128-L500k", 256, 500_000, 256, S=128),
    ),
    "sparse_update": (
        Shape("N2k-L16k", 1, 16_384, 384, S=2_048),
        Shape("N100k-L670k", 1, 670_000, 384, S=100_000),
    ),
    "shortlist_matmul": (
        Shape("B64-S1024-L131k", 64, 131_072, 384, S=1024),
        Shape("B64-S4096-L670k", 64, 670_000, 384, S=4096),
    ),
}


GPU_SHAPES: dict[str, tuple[Shape, ...]] = {
    "bce_step": (
        Shape("B128-L2.8M-D768", 128, 2_812_281, 768),  # the labels of Amazon-3M
        Shape("B512-L1.3M-D768", 512, 1_305_265, 768),  # LF-AmazonTitles-1.3M: bound by arithmetic
        Shape(
            "B128-L8.6M-D768", 128, 8_623_847, 768
        ),  # LF-Paper2Keywords: fp8 fits where fp32 with its states does not
    ),
    "matmul_topk": (Shape("B512-L2.8M-D768", 512, 2_812_281, 768, K=100),),
    "cluster_step": (
        Shape("B64-K400-L670k-D768", 64, 670_091, 768, S=4400, K=400),
    ),  # clusters of 11 rows
    "sparse_update": (Shape("N100k-L670k-D768", 1, 670_091, 768, S=100_000),),
    "bce_loss": (Shape("B128-L2.8M-D768", 128, 2_812_281, 768),),
    "bag_step": (
        Shape("B512-S256-L1M-D512", 512, 1_000_000, 512, S=256),
    ),  # documents of Wikipedia in 1-2-grams
    "shortlist_matmul": (
        Shape("B64-S4400-L670k-D768", 64, 670_091, 768, S=4400),
    ),  # CascadeXML's lists for Amazon-670K
}
"""The shapes of a large card, in the order in which they are measured: those with a figure to reach
first.
"""
SMALL_GPU_SHAPES: dict[str, tuple[Shape, ...]] = {
    "bce_loss": (Shape("B128-L131k-D768", 128, 131_072, 768),),
    "bce_step": (
        Shape("B128-L131k-D768", 128, 131_072, 768),
        Shape("B512-L131k-D768", 512, 131_072, 768),
    ),
    "matmul_topk": (Shape("B512-L131k-D768", 512, 131_072, 768, K=100),),
}
"""In place of the shapes above on a card that they do not fit."""


def tiny(shape: Shape) -> Shape:
    """A shape of few numbers with the same cases: those of a cascade go by the name, those of one
    cluster of all rows by K.
    """
    if shape.K == 1 and shape.S == shape.L:
        return Shape(shape.name, 2, 8, 8, S=8, K=1)
    return Shape(shape.name, 2, 8, 8, shape.S and 2, shape.K and 2)


def for_card(op: str) -> tuple[Shape, ...]:
    """Every shape that a card may be asked for: its own, the small ones, and for an op without
    either those of the CPU.
    """
    return (*GPU_SHAPES.get(op, ()), *SMALL_GPU_SHAPES.get(op, ())) or SHAPES.get(op, ())


def pick(op: str, name: str | None) -> tuple[Shape, ...]:
    """All shapes of an op, or the one that is named.

    Raises:
        InputError: the op has no shapes, or none of that name.
    """
    shapes = SHAPES.get(op, ())
    if not shapes:
        raise InputError(
            f"--op {op}",
            f"an op with shapes and cases ({', '.join(SHAPES)})",
            f"{op}, which has none yet",
            "add its shapes to benchmarks/shapes.py and its cases to benchmarks/cases.py",
        )
    if name is None:
        return shapes
    names = [shape.name for shape in shapes]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, 0.0)[0]
        raise InputError(
            f"--shape of {op}", f"one of {', '.join(names)}", name, f"did you mean {near}?"
        )
    return (shapes[names.index(name)],)
