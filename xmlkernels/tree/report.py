"""What a tree is like: sizes, similarity inside clusters, and how well documents find them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.errors import InputError
from xmlkernels.files import replacing
from xmlkernels.tree.features import LabelFeatures
from xmlkernels.tree.label_tree import LabelTree
from xmlkernels.tree.products import top_product, unit_rows

KEPT = (1, 4, 16, 64, 256, 1024)
_PAIRS = 20_000  # pairs of labels whose similarity is measured, for each level
_DOCUMENTS = 2_000  # documents that look for their clusters
_BLOCK = 256  # of them at a time
_TERMS = 4_096  # of a cluster's centroid


def report(
    tree: LabelTree,
    features: LabelFeatures,
    documents: csr_matrix | None = None,
    labels: csr_matrix | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """JSON-ready facts of a tree.

    For each cluster level:
        clusters; labels and children: least, mean, most and standard deviation per cluster.
        similarity: mean over pairs of different labels of one cluster of their similarity (cosine
            of the sparse blocks plus that of the dense ones); of each label that is not alone in
            its cluster one pair at most, 20,000 in all.
        random_similarity: the same in clusters of the same sizes with the labels drawn at random.
        parents: mean and most clusters of the level in which a document's labels lie.
        recall: {k: share}. Each document keeps the k clusters whose centroids (mean of the labels'
            unit vectors) are nearest to it by cosine; the share, over all documents together, of
            its true nodes of the next level (clusters or labels) whose parent is kept. Each level
            is measured by itself, so no model and no level above is part of it.

    Args:
        features: what the labels look like; similarities are taken in them.
        documents: [N, V] features of documents, in the columns of the sparse block; None leaves out
            parents and recall.
        labels: [N, L] of these documents; at most 2,000 documents with labels are taken, by seed.

    Raises:
        InputError: numbers of labels, documents or columns that do not fit.
    """
    count = len(tree.order)
    if len(features) != count:
        raise InputError(
            "features",
            f"{count} labels, as the tree has",
            str(len(features)),
            "pass those the tree was made of",
        )
    facts = [
        _sizes(tree, level) | _similarity(tree, level, features, seed)
        for level in range(tree.levels - 1)
    ]
    if documents is not None and labels is not None:
        if (
            labels.shape != (documents.shape[0], count)
            or documents.shape[1] != features.sparse.shape[1]
        ):
            got = f"documents {documents.shape}, labels {labels.shape}"
            expected = f"documents [N, {features.sparse.shape[1]}] and labels [N, {count}]"
            raise InputError("documents", expected, got, "pass features and labels of one split")
        chosen = _some(np.flatnonzero(np.diff(labels.indptr)), _DOCUMENTS, seed)
        if len(chosen):
            place = csr_matrix(labels[chosen] != 0, dtype=np.float32)
            place = csr_matrix(
                (place.data, tree.place[place.indices], place.indptr), shape=place.shape
            )
            queries = unit_rows(documents[chosen])
            for level in range(tree.levels - 1):
                facts[level] |= _documents(tree, level, features, queries, place)
    return {"labels": count, "without_features": int(features.empty.sum()), "levels": facts}


def _some(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    if len(rows) <= most:
        return rows
    return np.sort(np.random.Generator(np.random.Philox(seed)).choice(rows, most, replace=False))


def _spread(sizes: np.ndarray) -> dict[str, float]:
    return {
        "least": int(sizes.min()),
        "mean": float(sizes.mean()),
        "most": int(sizes.max()),
        "deviation": float(sizes.std()),
    }


def _sizes(tree: LabelTree, level: int) -> dict[str, Any]:
    labels = np.bincount(tree.ancestors(level))
    return {
        "clusters": tree.sizes[level],
        "labels": _spread(labels),
        "children": _spread(np.diff(tree.children[level])),
    }


def _similarity(tree: LabelTree, level: int, features: LabelFeatures, seed: int) -> dict[str, Any]:
    ancestor = tree.ancestors(level)
    sizes = np.bincount(ancestor)
    starts = np.cumsum(sizes) - sizes
    random = np.random.Generator(np.random.Philox(seed))
    rows = np.flatnonzero(sizes[ancestor] > 1)
    if not len(rows):
        return {"similarity": None, "random_similarity": None}
    rows = random.permutation(rows)[:_PAIRS]
    size, start = sizes[ancestor[rows]], starts[ancestor[rows]]
    # Another row of the same cluster, each as likely.
    others = start + (rows - start + 1 + random.integers(0, size - 1)) % size
    anyhow = random.permutation(tree.order)
    return {
        "similarity": _mean_similarity(features, tree.order[rows], tree.order[others]),
        "random_similarity": _mean_similarity(features, anyhow[rows], anyhow[others]),
    }


def _mean_similarity(features: LabelFeatures, a: np.ndarray, b: np.ndarray) -> float:
    total = 0.0
    for start in range(0, len(a), 1024):
        one, two = a[start : start + 1024], b[start : start + 1024]
        total += float(features.sparse[one].multiply(features.sparse[two]).sum(dtype=np.float64))
        if features.dense is not None:
            total += float(
                np.einsum("ij,ij->", features.dense[one], features.dense[two], dtype=np.float64)
            )
    return total / len(a)


def _documents(
    tree: LabelTree, level: int, features: LabelFeatures, queries: csr_matrix, place: csr_matrix
) -> dict[str, Any]:
    """`place` [n, L]: the true labels as table rows."""
    below = tree.ancestors(level + 1)[place.indices]
    document = np.repeat(np.arange(place.shape[0]), np.diff(place.indptr))
    # True nodes of the next level, each once for a document, and their parents.
    document, node = np.unique(np.stack([document, below]), axis=1)
    parent = np.searchsorted(tree.children[level], node, side="right") - 1
    clusters = tree.sizes[level]
    of_cluster = csr_matrix(
        (np.ones(len(tree.order), np.float32), tree.order, tree.bounds(level)),
        shape=(clusters, len(tree.order)),
    )
    by_term = csr_matrix(
        unit_rows(top_product(of_cluster, features.sparse, _TERMS), in_place=True).T
    )
    rank = np.empty(len(node), np.int64)
    for start in range(0, place.shape[0], _BLOCK):
        inside = slice(*np.searchsorted(document, [start, start + _BLOCK]))
        score = (queries[start : start + _BLOCK] @ by_term).toarray()
        true = score[document[inside] - start, parent[inside]]
        rows = score[document[inside] - start]
        # Of equally near clusters the first is kept first, as a top-k would.
        earlier = (rows == true[:, None]) & (np.arange(clusters) < parent[inside][:, None])
        rank[inside] = (rows > true[:, None]).sum(axis=1) + earlier.sum(axis=1)
    distinct = np.unique(np.stack([document, parent]), axis=1)[0]
    parents = np.bincount(distinct, minlength=place.shape[0])
    recall = {
        str(k): float((rank < k).mean()) for k in (*(k for k in KEPT if k < clusters), clusters)
    }
    return {
        "parents": {"mean": float(parents.mean()), "most": int(parents.max())},
        "recall": recall,
    }


def lines_of(facts: dict[str, Any]) -> list[str]:
    """Return the report as lines of text, one or two per level."""
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
    """Draw a report as a PNG.

    Returns False, and writes nothing, where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    # Of its own: no window, no state shared with the process.
    figure = Figure(figsize=(12, 3.4), layout="constrained")
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
