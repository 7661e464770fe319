"""Charts as SVG: drawn in the colours of the page, told to those who cannot see them."""

import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH, HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 40
_TICKS = 5
_MOST_POINTS = 300

Series = tuple[str, Sequence[float], Sequence[float]]


def lines(
    title: str,
    told: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    dots: bool = False,
    diagonal: bool = False,
    span: tuple[float, float] | None = None,
    both: bool = False,
    logarithmic: bool = False,
) -> str:
    """Draw one or more lines over common axes.

    Args:
        title: the figure's heading.
        told: what it shows, in a sentence, for screen readers and below the heading.
        series: name, x and y values of each line.
        x, y: names of the axes.
        dots: mark each point.
        diagonal: draw y = x, too.
        span: of the y axis; by default that of the values.
        both: the span is that of the x axis, too.
        logarithmic: the x axis.
    """
    series = [(name, *_thinned(xs, ys)) for name, xs, ys in series]
    every_x = [value for _, xs, _ in series for value in xs]
    every_y = [value for _, _, ys in series for value in ys]
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    if both and span:
        every_x = [*every_x, *span]
    left, right = scale(min(every_x)), scale(max(every_x))
    low, high, y_ticks = _axis(*(span or (min(every_y), max(every_y))))
    if span:
        low, high = span

    def across(value: float) -> float:
        share = (scale(value) - left) / (right - left) if right > left else 0.5
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        share = (value - low) / (high - low)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    x_ticks = sorted(set(every_x)) if logarithmic else _axis(min(every_x), max(every_x))[2]
    inside = [tick for tick in x_ticks if left - 1e-9 <= scale(tick) <= right + 1e-9]
    body = [_frame(inside, [t for t in y_ticks if low <= t <= high], across, up, x, y)]
    if diagonal:
        body.append(
            f'<line class="ideal" x1="{across(low):.1f}" y1="{up(low):.1f}" '
            f'x2="{across(high):.1f}" y2="{up(high):.1f}"/>'
        )
    for number, (name, xs, ys) in enumerate(series):
        places = [f"{across(a):.1f},{up(b):.1f}" for a, b in zip(xs, ys, strict=True)]
        body.append(f'<polyline class="line c{number + 1}" points="{" ".join(places)}"/>')
        if dots or len(places) == 1:
            for place, a, b in zip(places, xs, ys, strict=True):
                cx, cy = place.split(",")
                note = escape(f"{name}: {number_of(a)} → {number_of(b)}")
                body.append(
                    f'<circle class="dot c{number + 1}" cx="{cx}" cy="{cy}" r="3.5">'
                    f"<title>{note}</title></circle>"
                )
    names = [name for name, _, _ in series]
    return _figure(title, told, "".join(body), names if len(names) > 1 else [])


def bars(
    title: str,
    told: str,
    names: Sequence[str],
    values: Sequence[float],
    *,
    x: str,
    y: str,
) -> str:
    """Draw a bar per name, from 0."""
    low, high, ticks = _axis(0.0, max([*values, 1e-9]))
    inner = WIDTH - _LEFT - _RIGHT
    step = inner / max(1, len(names))

    def up(value: float) -> float:
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    body = [_frame([], [t for t in ticks if low <= t <= high], float, up, x, y)]
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        middle = _LEFT + (number + 0.5) * step
        top = up(value)
        body.append(
            f'<rect class="bar c1" x="{middle - step * 0.36:.1f}" y="{top:.1f}" '
            f'width="{step * 0.72:.1f}" height="{max(0.0, up(low) - top):.1f}" rx="2">'
            f"<title>{escape(f'{name}: {number_of(value)}')}</title></rect>"
            f'<text class="tick" text-anchor="middle" x="{middle:.1f}" '
            f'y="{HEIGHT - _BOTTOM + 16}">{escape(name)}</text>'
        )
    return _figure(title, told, "".join(body), [])


def number_of(value: float) -> str:
    """Write a number short: `1,200,000`, `31.5`, `0.0004`."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _figure(title: str, told: str, body: str, names: Sequence[str]) -> str:
    keys = "".join(
        f'<li><span class="key c{number + 1}"></span>{escape(name)}</li>'
        for number, name in enumerate(names)
    )
    legend = f'<ul class="legend">{keys}</ul>' if keys else ""
    return (
        f"<figure><figcaption><strong>{escape(title)}</strong> {escape(told)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}. {told}")}">'
        f"{body}</svg>{legend}</figure>"
    )


def _frame(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    across: Callable[[float], float],
    up: Callable[[float], float],
    x: str,
    y: str,
) -> str:
    bottom = HEIGHT - _BOTTOM
    out = []
    for tick in y_ticks:
        at = up(tick)
        out.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick" text-anchor="end" x="{_LEFT - 7}" y="{at + 4:.1f}">'
            f"{number_of(tick)}</text>"
        )
    out += [
        f'<text class="tick" text-anchor="middle" x="{across(tick):.1f}" y="{bottom + 16}">'
        f"{number_of(tick)}</text>"
        for tick in x_ticks
    ]
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    out.append(
        f'<text class="axis" text-anchor="middle" x="{middle}" y="{HEIGHT - 5}">{escape(x)}</text>'
        f'<text class="axis" text-anchor="middle" transform="translate(12 {(_TOP + bottom) / 2}) '
        f'rotate(-90)">{escape(y)}</text>'
    )
    return "".join(out)


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Widen a span to round numbers; return it and the ticks in it."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / _TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(number * step, 12) for number in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return at most some hundred points: means of neighbours where there are more."""
    size = math.ceil(len(xs) / _MOST_POINTS)
    if size <= 1:
        return list(xs), list(ys)
    spans = [slice(start, start + size) for start in range(0, len(xs), size)]
    return (
        [sum(xs[span]) / len(xs[span]) for span in spans],
        [sum(ys[span]) / len(ys[span]) for span in spans],
    )
