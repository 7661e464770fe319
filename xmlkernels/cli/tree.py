"""Build the label tree of a dataset: `xmlkernels tree DATASET --depths 10 13 16`.

A cluster holds labels whose documents use the same words: TF-IDF centroids, smoothed over the graph
of labels that occur together, are halved again and again by balanced 2-means. --output gets
tree.safetensors (for --tree of `xmlkernels train` and `rank`), report.json and, where matplotlib is
installed, tree.png. The same inputs and settings make a tree once; later calls open it.
"""

from collections.abc import Sequence

from xmlkernels.cli.arguments import parse
from xmlkernels.training.tree import TreeConfig, build_tree


def main(words: Sequence[str]) -> None:
    """Build the tree that the arguments describe."""
    build_tree(parse(TreeConfig, "xmlkernels tree", __doc__ or "", positional=True, words=words))
