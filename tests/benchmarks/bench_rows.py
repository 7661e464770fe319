"""Rows of results, as benchmarks write them."""

from benchmarks import run, shapes

TINY = shapes.Shape("tiny", 4, 300, 16, K=7)


# --- rows ------------------------------------------------------------------------------------


def row(**values: object) -> run.Row:
    return dict.fromkeys(run.COLUMNS) | values  # type: ignore[return-value]
