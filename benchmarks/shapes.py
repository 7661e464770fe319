"""The sizes of one measurement."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """B batch, L labels, D width, S shortlist, K top-k; None for a letter that the op lacks.

    What else a letter may mean is said where the shapes of an op are, in its `cases_NAME.py`.
    """

    name: str
    B: int
    L: int
    D: int
    S: int | None = None
    K: int | None = None


def tiny(shape: Shape) -> Shape:
    """Return a shape of few numbers with the same cases.

    Those of a cascade go by the name, those of one cluster of all rows by K.
    """
    if shape.K == 1 and shape.S == shape.L:
        return Shape(shape.name, 2, 8, 8, S=8, K=1)
    return Shape(shape.name, 2, 8, 8, shape.S and 2, shape.K and 2)
