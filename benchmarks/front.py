"""The picture of the front page, from committed rows: time and peak memory of a training step.

Written as SVG by hand, so that the same rows give the same bytes on every machine, and a test can
tell when the picture is old: python benchmarks/plot.py RESULTS.csv --front docs/images/step.svg
"""

from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from xmlkernels.errors import InputError

WIDTH, ROW, LEFT, GAP, BAR = 880, 24, 232, 60, 16
PANEL = (WIDTH - LEFT - 2 * GAP) // 2
OURS, OTHERS = "#3f51b5", "#9e9e9e"


class Bar(NamedTuple):
    """One implementation: its label and what its row is called."""

    label: str
    impl: str
    phase: str
    dtype: str


class Group(NamedTuple):
    """Bars of one op and shape at one commit, drawn to a scale of their own."""

    title: str
    op: str
    shape: str
    commit: str
    bars: tuple[Bar, ...]


GROUPS = (
    Group(
        "All labels, SGD with momentum: 64 documents, 131,072 labels, width 384",
        "bce_step",
        "B64-L131k",
        "92d119e2209e",
        (
            Bar("eager PyTorch, fp32", "eager", "momentum", "fp32"),
            Bar("Renee-like, fp32", "renee", "momentum", "fp32"),
            Bar("Renee-like, bf16", "renee", "momentum", "bf16"),
            Bar("xmlkernels, fp32", "xmlkernels", "momentum", "fp32"),
            Bar("xmlkernels, bf16", "xmlkernels", "momentum", "bf16"),
            Bar("xmlkernels, bf16, no momentum", "xmlkernels", "sgd", "bf16"),
        ),
    ),
    Group(
        "Cascade, Adam: 2^10, then 2^13 clusters, then a shortlist of the same 131,072 labels",
        "cluster_step",
        "B64-L131k-cascade",
        "5a2e6b0c2263",
        (
            Bar("eager PyTorch, fp32", "eager", "cascade", "fp32"),
            Bar("xmlkernels, fp32", "xmlkernels", "cascade", "fp32"),
            Bar("xmlkernels, bf16", "xmlkernels", "cascade", "bf16"),
        ),
    ),
)


def find(rows: Sequence[dict[str, str]], group: Group, bar: Bar) -> dict[str, str]:
    """Return the row of a bar.

    Raises:
        InputError: the results hold none.
    """
    wanted = {"op": group.op, "shape": group.shape, "commit": group.commit, "device": "cpu"}
    wanted |= {"impl": bar.impl, "phase": bar.phase, "dtype": bar.dtype}
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            return row
    raise InputError("rows", f"a row of {wanted}", "none", "choose another commit in front.py")


def draw(rows: Sequence[dict[str, str]]) -> str:
    """Return the picture as SVG: groups of bars, milliseconds on the left, megabytes on the right.

    Raises:
        InputError: a row is missing.
    """
    lines: list[str] = []
    y = 34
    for x, title in ((LEFT, "ms per step (median)"), (LEFT + PANEL + GAP, "peak MB")):
        lines.append(_text(x, 20, title, weight="bold"))
    for group in GROUPS:
        lines.append(_text(8, y + 16, f"{group.title} ({group.commit})", weight="bold"))
        y += 28
        found = [find(rows, group, bar) for bar in group.bars]
        for column, name in enumerate(("ms_p50", "peak_mb")):
            values = [float(row[name]) for row in found]
            left = LEFT + column * (PANEL + GAP)
            for number, (bar, value) in enumerate(zip(group.bars, values, strict=True)):
                top = y + number * ROW
                length = max(1, round(PANEL * value / max(values)))
                colour = OURS if bar.impl == "xmlkernels" else OTHERS
                if column == 0:
                    lines.append(_text(LEFT - 8, top + 13, bar.label, anchor="end"))
                lines.append(
                    f'<rect x="{left}" y="{top}" width="{length}" height="{BAR}" fill="{colour}"/>'
                )
                lines.append(_text(left + length + 5, top + 13, _number(value)))
        y += len(group.bars) * ROW + 10
    machine = found[0]["machine"]
    what = (
        "Peak beyond table and batch, states included; ours keeps one second moment per row below."
    )
    lines.append(_text(8, y + 14, f"{machine}, torch {found[0]['torch']}. {what}"))
    height = y + 26
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="13">'
    )
    ground = f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, ground, *lines, "</svg>", ""])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}"


def _text(x: int, y: int, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}" fill="#212121">'
        f"{escape(text)}</text>"
    )
