"""What a label tree is like, as lines of text and as a picture."""

from pathlib import Path
from typing import Any

from xmlkernels.files import replacing


def lines_of(facts: dict[str, Any]) -> list[str]:
    """The report as lines of text, one or two a level."""
    lines = []
    for level, fact in enumerate(facts["levels"]):
        labels, children = fact["labels"], fact["children"]
        line = (
            f"level {level}: {fact['clusters']:,} clusters of {labels['least']:,} to "
            f"{labels['most']:,} labels, "
        )
        line += f"mean {labels['mean']:.1f}, {children['least']:,} to {children['most']:,} children"
        if fact["similarity"] is not None:
            line += (
                f"; similarity inside {fact['similarity']:.3f}, at random "
                f"{fact['random_similarity']:.3f}"
            )
        lines.append(line)
        if "recall" in fact:
            kept = ", ".join(f"{k}: {100 * share:.1f}%" for k, share in fact["recall"].items())
            lines.append(
                f"  a document's labels lie in {fact['parents']['mean']:.1f} of them; true "
                f"children kept by the nearest {kept}"
            )
    return lines


def plot(facts: dict[str, Any], path: Path) -> bool:
    """Write a PNG of what `xmlkernels.tree.report` says; False, and nothing written, where
    matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(
        figsize=(12, 3.4), layout="constrained"
    )  # of its own: no window, no state shared with the process
    FigureCanvasAgg(figure)
    sizes, alike, recall = figure.subplots(1, 3)
    levels = facts["levels"]
    names = [f"{level['clusters']:,}" for level in levels]
    for at, level in enumerate(levels):
        labels = level["labels"]
        sizes.plot(
            [at, at],
            [labels["least"], labels["most"]],
            color="tab:blue",
            linewidth=6,
            solid_capstyle="butt",
            alpha=0.4,
        )
        sizes.plot(at, labels["mean"], "o", color="tab:blue")
        if "recall" in level:
            kept = [int(k) / level["clusters"] for k in level["recall"]]
            recall.plot(
                kept, list(level["recall"].values()), "o-", label=f"{level['clusters']:,} clusters"
            )
    sizes.set(
        title="labels per cluster: least, mean, most",
        yscale="log",
        ylim=(0.5, None),
        xlabel="clusters of the level",
    )
    for at, level in enumerate(levels):
        if level["similarity"] is not None:
            alike.bar(
                at - 0.2,
                level["similarity"],
                0.4,
                color="tab:blue",
                label="in a cluster" if at == 0 else None,
            )
            alike.bar(
                at + 0.2,
                level["random_similarity"],
                0.4,
                color="tab:gray",
                label="at random" if at == 0 else None,
            )
    alike.set(title="similarity of two labels", xlabel="clusters of the level")
    for axes in (sizes, alike):
        axes.set_xticks(range(len(names)), names)
    recall.set(
        title="true children kept by the nearest clusters",
        xscale="log",
        xlabel="share of clusters kept",
        ylim=(0, 1.02),
    )
    for axes in (alike, recall):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)
    return True
