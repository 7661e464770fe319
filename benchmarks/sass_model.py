"""A model of the GPU kernels, from the machine code of the launches that the ops really make.

    python benchmarks/sass_model.py [--card H200 | H100 | A100] [--op OP] [--write]

Each launch is compiled as for the card, and its instructions are counted, loops by trips that
follow from the shape. The rows of an op are in `sass_rows_*.py`, in `ROWS`; the arithmetic is in
`sass_work.py`. --write models all rows on all cards, and puts the figures into
`benchmarks/modelled.csv` and into the documents that show them. Nothing here is measured: all are a
model.
"""

import argparse
import importlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import modelled, sass_pages
from benchmarks.floors import GOALS
from benchmarks.modelled import Figure
from benchmarks.sass_work import CARDS, Card, Line, Row, lines_of, table, total

SHOWN = 0.05
"""Kernels that take fewer milliseconds are not named among those of a figure."""


def rows(op: str | None = None) -> list[Row]:
    """Return the rows of all ops, or of one, in the order of the figures to reach."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("sass_rows_*.py"))
    modules = [importlib.import_module(f"benchmarks.{name}") for name in names]
    found = [row for module in modules for row in module.ROWS if op in (None, row.op)]
    order = [(goal.op, goal.shape) for goal in GOALS]
    return sorted(found, key=lambda row: order.index((row.op, row.shape)))


def lines(row: Row, card: Card) -> list[Line]:
    """Model a row, kernel by kernel; none where the op refuses the card."""
    try:
        return lines_of(row.works(card), card)
    except NotImplementedError:
        return []


def figure(row: Row, name: str, found: Sequence[Line]) -> Figure:
    """Return what the documents say of a row on a card."""
    kernels = sorted((k for k in found if k.expected >= SHOWN), key=lambda k: -k.expected)
    told = ", ".join(f"{k.kernel.strip('_')} {k.expected:.2f}" for k in kernels)
    ms, floor = total(found), row.floor(CARDS[name])
    return Figure(row.op, row.shape, row.phase, row.dtype, name, ms, floor, told)


def main() -> None:
    """Print the model's tables, or write its figures."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(main))
    parser.add_argument("--card", choices=CARDS, default="H200")
    parser.add_argument("--op", help="bce_step, cluster_step, sparse_update or matmul_topk alone")
    parser.add_argument("--write", action="store_true", help="all cards, into the documents")
    given = parser.parse_args()
    figures = []
    for name in CARDS if given.write else (given.card,):
        for row in rows(None if given.write else given.op):
            found = lines(row, CARDS[name])
            title = f"{row.op} {row.dtype} {row.shape}, {name}"
            if not found:
                print(f"\n{title}: not on this card")
                continue
            told = figure(row, name, found)
            figures.append(told)
            print(f"\n{title}: a model, nothing is measured", *table(found), sep="\n")
            print(
                f"expected {told.ms:.2f} ms, floor {told.floor:.2f} ms, "
                f"{told.over:.1f} x floor (model)"
            )
    if given.write:
        modelled.save(figures)
        sass_pages.write(modelled.read())


if __name__ == "__main__":
    main()
