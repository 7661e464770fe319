"""Useful work of one level of a cascade: see `benchmarks/cases_cluster_step.py`."""

from benchmarks.shapes import Shape


def sizes(shape: Shape) -> tuple[int, int, int]:
    """Return K, M and C."""
    k = shape.K or 1
    m = (shape.S or shape.L) // k
    return k, m, shape.L // m


def cluster_work(shape: Shape, s: int, m: int = 0) -> tuple[int, int]:
    """Count FLOP and bytes of one call.

    s and m are the bytes of an element of the table and of a moment.
    """
    b, d = shape.B, shape.D
    k, rows, count = sizes(shape)
    touched = round(count * rows * (1 - (1 - k / count) ** b))
    return 6 * b * k * rows * d, touched * d * (2 * s + 4 * m) + 4 * b * k * rows + 8 * b * (k + d)
