"""Pieces of HTML: everything that comes from data is escaped here."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Cell = str | float | int | None


@dataclass(frozen=True)
class Raw:
    """HTML that is ready."""

    text: str


@dataclass(frozen=True)
class Section:
    """A part of the report: its anchor, its heading, and its HTML."""

    name: str
    title: str
    body: str


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of plain text."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def table(
    caption: str, names: Sequence[str], rows: Sequence[Sequence[Cell | Raw]], *, left: int = 1
) -> str:
    """Return a table whose first column names its rows.

    Args:
        caption: what it holds.
        names: of the columns.
        rows: numbers are written with two digits after the point, whole ones without, None as –.
        left: columns of text, from the first; the others hold numbers and stand on the right.
    """
    head = "".join(
        f'<th scope="col"{_class("" if n < left else "number")}>{escape(name)}</th>'
        for n, name in enumerate(names)
    )
    body = []
    for row in rows:
        cells = [f'<th scope="row">{_cell(row[0])}</th>']
        cells += [
            f"<td{_class('' if n < left else 'number')}>{_cell(value)}</td>"
            for n, value in enumerate(row[1:], 1)
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="wide" role="region" aria-label="{escape(caption)}" tabindex="0"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def folded(summary: str, body: str) -> str:
    """Return a part that opens when it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def side_by_side(*figures: str) -> str:
    """Return figures beside one another, or below one another where there is no room."""
    return f'<div class="figures">{"".join(figures)}</div>'


def tiles(values: Sequence[tuple[str, str, str]]) -> str:
    """Return the large numbers at the top: name, number and a remark each."""
    each = (
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b>"
        f"<small>{escape(remark)}</small></dd></div>"
        for name, value, remark in values
    )
    return f'<dl class="tiles">{"".join(each)}</dl>'


def shares(caption: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """Return horizontal bars: name, value and the value in words; the longest is the largest."""
    most = max([value for _, value, _ in rows] + [1e-12])
    each = "".join(
        f'<li><span class="name">{escape(name)}</span><span class="track" aria-hidden="true">'
        f'<span style="width:{100 * value / most:.1f}%"></span></span>'
        f'<span class="told">{escape(told)}</span></li>'
        for name, value, told in rows
    )
    return f'<p class="caption">{escape(caption)}</p><ul class="shares">{each}</ul>'


def _cell(value: Cell | Raw) -> str:
    if isinstance(value, Raw):
        return value.text
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.2f}"
    return escape(f"{value:,}" if isinstance(value, int) else value)


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
