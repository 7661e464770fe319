"""Draw committed rows: by op and shape the share of the torch.mm rate; of a card, the roofline.

The roofline is of the latest run of benchmarks/gpu_report.py.

python benchmarks/plot.py benchmarks/results/<machine>.csv [--out CHART.png] [--dirty]
python benchmarks/plot.py benchmarks/results/<machine>.csv --front docs/images/step.svg
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import front
from benchmarks.cases import ceiling_dtype
from benchmarks.floors import CEILING, OWN
from benchmarks.run import check_results
from xmlkernels.errors import InputError

Place = tuple[str, str]


def read_rows(path: Path, dirty: bool) -> list[dict[str, str]]:
    """Return the rows of a results file, in its order; those of an edited tree only if asked for.

    Raises:
        InputError: the file is missing, has other columns, or holds no row to draw.
    """
    if not path.exists():
        raise InputError(
            str(path), "a file that benchmarks/run.py wrote", "no file", "run a benchmark first"
        )
    check_results(path)
    with open(path, encoding="utf-8", newline="") as file:
        every = list(csv.DictReader(file))
    rows = [row for row in every if dirty or not row["commit"].endswith("-dirty")]
    if not rows:
        raise InputError(
            str(path),
            "a row of a clean commit",
            "none",
            "commit and run the benchmark again, or pass --dirty",
        )
    return rows


def shares(rows: Sequence[dict[str, str]]) -> dict[Place, dict[str, float]]:
    """Return the share of the mm rate by (op, shape), then by implementation.

    A later run of a shape replaces an earlier one. A row is divided by the ceiling of its own turn
    alone: the rows of one op, shape, device and date.
    """
    latest = {(row["op"], row["shape"]): (row["date"], row["device"]) for row in rows}
    turn = [row for row in rows if latest[row["op"], row["shape"]] == (row["date"], row["device"])]
    ceilings = {
        (row["op"], row["shape"], row["dtype"]): float(row["tflops"])
        for row in turn
        if row["impl"] == "mm"
    }
    found: dict[Place, dict[str, float]] = {}
    for row in turn:
        top = ceilings.get((row["op"], row["shape"], ceiling_dtype(row["dtype"], row["device"])))
        if row["impl"] != "mm" and top and row["tflops"]:  # parts of a step may have no rate
            name = f"{row['impl']} {row['phase']} {row['dtype']}"
            found.setdefault((row["op"], row["shape"]), {})[name] = float(row["tflops"]) / top
    return found


def draw(rows: Sequence[dict[str, str]], out: Path) -> None:
    """Write the chart as PNG: one panel per op and shape, bars in file order, a line at 1.

    Raises:
        InputError: no row has a ceiling.
    """
    from matplotlib.figure import Figure

    found = shares(rows)
    if not found:
        raise InputError(
            "rows",
            "rows of an implementation with a ceiling beside them",
            "none",
            "run the benchmark again",
        )
    heights = [len(bars) for bars in found.values()]
    figure = Figure(figsize=(8, 0.25 * sum(heights) + 0.8 * len(found) + 0.6), layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights, sharex=True)[:, 0]
    for panel, ((op, shape), bars) in zip(panels, found.items(), strict=True):
        colours = ["tab:blue" if name.startswith(OWN) else "tab:grey" for name in bars]
        drawn = panel.barh(list(bars), list(bars.values()), color=colours)
        panel.bar_label(drawn, fmt="%.2f", padding=2, fontsize=7)
        panel.axvline(1, color="black", linewidth=0.8, linestyle="--")
        panel.invert_yaxis()
        panel.tick_params(labelsize=7)
        panel.set_title(f"{op} {shape}", fontsize=9, loc="left")
    panels[-1].set_xlabel("share of the torch.mm rate of the same format, timed in turns")
    save(figure, rows, out)


def save(figure: Any, rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Name machine, torch and commits above the chart; write it whole or not at all."""
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for row in rows))
    figure.suptitle(f"{rows[-1]['machine']} · torch {rows[-1]['torch']} · {commits}", fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    figure.savefig(part, dpi=150, format="png")
    part.replace(out)


def roofline(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write the roofline of one run as PNG: useful operations per useful byte, and their rate.

    Args:
        rows: of one run of benchmarks/gpu_report.py, its ceilings among them: the copy rate is the
            slope, the torch.mm rate of each format a level line. Points above a line are another
            format's.
        out: the file to write.

    Raises:
        InputError: the rows hold no ceilings, or nothing but ceilings.
    """
    from matplotlib.figure import Figure

    ceilings = [row for row in rows if row["op"] == CEILING]
    top = {str(row["dtype"]): float(row["tflops"]) for row in ceilings if row["impl"] == "mm"}
    copies = (float(row["gbps"]) / 1e3 for row in ceilings if row["impl"] == "copy")
    slope = next(copies, None)
    points = [row for row in rows if row["op"] != CEILING]
    points = [row for row in points if float(row["tflops"]) > 0 and float(row["gbps"]) > 0]
    if slope is None or not top or not points:
        raise InputError(
            "rows",
            "rows of an op with the ceilings of their run",
            "none",
            "run benchmarks/gpu_report.py again",
        )
    # Operations for each byte.
    places = [1e3 * float(row["tflops"]) / float(row["gbps"]) for row in points]
    ridges = [level / slope for level in top.values()]
    left, right = min(places + ridges) / 2, max(places + ridges) * 3
    figure = Figure(figsize=(11, 8), layout="constrained")
    panel = figure.subplots()
    for dtype, level in top.items():
        line = [left, level / slope, right], [left * slope, level, level]
        panel.plot(*line, color="black", linewidth=0.8)
        panel.text(right, level, f"mm {dtype}", fontsize=7, ha="right", va="bottom")
    for row, place in zip(points, places, strict=True):
        rate = float(row["tflops"])
        mark, colour = ("o", "tab:blue") if row["impl"] in OWN else ("x", "tab:grey")
        panel.plot([place], [rate], mark, color=colour, markersize=4)
        name = f"{row['op']} {row['shape']} {row['impl']} {row['phase']} {row['dtype']}"
        label = {"xytext": (4, 2), "textcoords": "offset points", "fontsize": 5}
        panel.annotate(name, (place, rate), **label)
    panel.set(xscale="log", yscale="log")
    panel.set(xlabel="useful FLOP for each useful byte", ylabel="useful TFLOP/s")
    save(figure, rows, out)


def latest(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows of the last run: those of the last row's date."""
    return [row for row in rows if row["date"] == rows[-1]["date"]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/plot.py", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("results", type=Path, help="a CSV that benchmarks/run.py wrote")
    parser.add_argument("--out", type=Path, help="PNG to write; without it, beside the CSV")
    parser.add_argument("--dirty", action="store_true", help="draw rows of edited trees too")
    parser.add_argument("--front", type=Path, help="SVG to write: the picture of the front page")
    options = parser.parse_args(arguments)
    out = options.front or options.out or options.results.with_suffix(".png")
    try:
        rows = read_rows(options.results, options.dirty)
        if options.front:
            out.write_text(front.draw(rows), "utf-8")
        elif any(row["op"] == CEILING for row in rows):
            roofline(latest(rows), out)
        else:
            draw(rows, out)
    except InputError as error:
        print(f"benchmarks/plot.py: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
