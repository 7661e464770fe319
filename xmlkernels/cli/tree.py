"""The label tree of a dataset: `xmlkernels tree DATASET --depths 10 13 16`.

Clusters of labels whose documents use the same words: TF-IDF centroids, smoothed over the graph of
labels that occur together, halved again and again by balanced 2-means. OUTPUT gets tree.safetensors
(for train/run.py --tree), report.json and, where matplotlib is installed, tree.png. A tree is known
by the content of all that made it and is made once.
"""

from collections.abc import Sequence

from xmlkernels.cli.arguments import parse
from xmlkernels.training.tree import TreeConfig, build_tree


def main(words: Sequence[str]) -> None:
    build_tree(parse(TreeConfig, "xmlkernels tree", __doc__ or "", positional=True, words=words))
