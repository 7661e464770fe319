"""The figures of the model of the GPU kernels, as committed: what is shown beside "not measured".

`benchmarks/sass_model.py --write` makes them. They are a model of machine code, no measurement.
"""

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

TABLE = Path(__file__).resolve().parent / "modelled.csv"
CARD = "H200"
"""The card of the figures that stand alone."""


@dataclass(frozen=True)
class Figure:
    """What the model says of an op at one shape, on one card.

    Attributes:
        op, shape, phase, dtype: as in `floors.GOALS`.
        ms, floor: milliseconds. kernels: the longest kernels with theirs.
    """

    op: str
    shape: str
    phase: str
    dtype: str
    card: str
    ms: float
    floor: float
    kernels: str

    @property
    def over(self) -> float:
        """How many times its floor it takes."""
        return self.ms / self.floor


def read() -> list[Figure]:
    """Return the committed figures."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        found = []
        for row in csv.DictReader(file):
            ms, floor = float(row.pop("ms")), float(row.pop("floor"))
            found.append(Figure(ms=ms, floor=floor, **row))
        return found


def save(figures: Sequence[Figure]) -> None:
    """Write the figures that are committed."""
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow([field.name for field in fields(Figure)])
        for figure in figures:
            out.writerow([f"{v:.3f}" if isinstance(v, float) else v for v in astuple(figure)])


def find(
    figures: Sequence[Figure], op: str, shape: str, phase: str, dtype: str, card: str = CARD
) -> Figure | None:
    """Return the figure of one row on a card."""
    aim = (op, shape, phase, dtype, card)
    return next((f for f in figures if (f.op, f.shape, f.phase, f.dtype, f.card) == aim), None)
