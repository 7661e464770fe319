"""The shapes that are measured, by op. Letters: B batch, L labels, D width, S shortlist (`sparse_update`: N, the touched
rows, of a table of L; it has no batch and says B = 1), K top-k."""

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
    "matmul_topk": (
        Shape("B32-L4k", 32, 4_271, 384, K=10),
        Shape("B64-L131k", 64, 131_072, 384, K=100),
        Shape("B1-L670k", 1, 670_000, 384, K=10),  # one query: bound by reading the table
        Shape("B256-L670k", 256, 670_000, 384, K=100),
    ),
    "sparse_update": (
        Shape("N2k-L16k", 1, 16_384, 384, S=2_048),
        Shape("N100k-L670k", 1, 670_000, 384, S=100_000),
    ),
}


def pick(op: str, name: str | None) -> tuple[Shape, ...]:
    """All shapes of an op, or the one that is named.

    Raises:
        InputError: the op has no shapes, or none of that name.
    """
    shapes = SHAPES.get(op, ())
    if not shapes:
        raise InputError(
            f"--op {op}", f"an op with shapes and cases ({', '.join(SHAPES)})", f"{op}, which has none yet",
            "add its shapes to benchmarks/shapes.py and its cases to benchmarks/cases.py",
        )  # fmt: skip
    if name is None:
        return shapes
    names = [shape.name for shape in shapes]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, 0.0)[0]
        raise InputError(f"--shape of {op}", f"one of {', '.join(names)}", name, f"did you mean {near}?")
    return (shapes[names.index(name)],)
