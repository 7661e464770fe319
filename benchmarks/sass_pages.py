"""The model's figures in the documents, beside what was not measured: always called a model."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import modelled
from benchmarks.floors import GOALS
from benchmarks.modelled import CARD, Figure

ROOT = Path(__file__).resolve().parents[1]
CARDS = ("H200", "H100", "A100")


def render_page(text: str, figures: Sequence[Figure]) -> str:
    """Return docs/results/gpu.md with these figures.

    They are the last cells of the figures to reach, and the table of kernels and cards.
    """
    text = _between(text, "goals", lambda old: _goals(old, figures))
    return _between(text, "model", lambda _: _kernels(figures))


def render_readme(text: str, figures: Sequence[Figure]) -> str:
    """Return README.md with the range of the figures of one card."""
    over = sorted(f.over for f in figures if f.card == CARD)
    told = f"a model says {over[0]:.1f} to {over[-1]:.1f} × the floor"
    return re.sub(r"a model says [\d.]+ to [\d.]+ × the floor", told, text)


PAGES: dict[Path, Callable[[str, Sequence[Figure]], str]] = {
    ROOT / "docs" / "results" / "gpu.md": render_page,
    ROOT / "README.md": render_readme,
}


def write(figures: Sequence[Figure]) -> None:
    """Put the committed figures into every document that shows them."""
    for path, render in PAGES.items():
        path.write_text(render(path.read_text("utf-8"), figures), "utf-8")


def _between(text: str, name: str, change: Callable[[list[str]], list[str]]) -> str:
    """Change the lines between the two marks of a part."""
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = text.partition(first)
    part, ended, after = rest.partition(last)
    if not found or not ended:
        raise ValueError(f"no {first.strip()} with its end")
    return before + first + "\n".join(["", *change(part.split("\n")[1:-2]), "", ""]) + last + after


def _goals(table: list[str], figures: Sequence[Figure]) -> list[str]:
    """Fill the last cell of each figure to reach; their rows are in the order of `GOALS`."""
    head, body = table[:2], table[2:]
    out = list(head)
    for goal, line in zip(GOALS, body, strict=True):
        found = modelled.find(figures, goal.op, goal.shape, goal.phase, goal.dtype)
        cells = line.split(" | ")
        cells[-1] = f"{_shown(found)} |"
        out.append(" | ".join(cells))
    return out


def _kernels(figures: Sequence[Figure]) -> list[str]:
    """One row per op and shape."""
    out = [
        f"| model, ms | kernels, {CARD} | {' | '.join(CARDS)} |",
        "|---|---|" + "---|" * len(CARDS),
    ]
    for figure in figures:
        if figure.card == CARD:
            key = (figure.op, figure.shape, figure.phase, figure.dtype)
            cells = [_shown(modelled.find(figures, *key, card)) for card in CARDS]
            name = f"`{figure.op}` {figure.dtype} {figure.shape}"
            out.append(f"| {name} | {figure.kernels} | {' | '.join(cells)} |")
    return out


def _shown(figure: Figure | None) -> str:
    return "–" if figure is None else f"{figure.ms:.2f} ms, {figure.over:.1f} ×"
