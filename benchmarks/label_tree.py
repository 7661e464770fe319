"""Time a label tree on made documents: centroids, label graph, smoothing and balanced 2-means.

    python benchmarks/label_tree.py [--labels 131072] [--depths 10 13]

294,805 documents (as many as LF-AmazonTitles-131K has) of up to 5 labels, on 4,096 topics in a
hierarchy, 120 words each; centroids keep 1,000 terms of 100,000; the walk makes 400 visits per
label. Numba compiles on a small piece before anything is timed. Each stage: wall clock, CPU seconds
of this process, and the memory that it holds at the end.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfTransformer

from benchmarks.timing import Load, load_average, machine_name
from xmlkernels.parallel import threads
from xmlkernels.tree import cluster as clustering
from xmlkernels.tree.cluster import cluster
from xmlkernels.tree.features import label_centroids, label_features
from xmlkernels.tree.graph import label_graph, smooth

TOPICS, WORDS, KEEP = 4096, 100_000, 1000


def make(labels: int, documents: int) -> tuple[csr_matrix, csr_matrix]:
    """Make TF-IDF [N, V] and labels [N, L], always the same.

    A document has a main label by Zipf's law, and others of its topic or of the next one.
    """
    random = np.random.default_rng(0)
    topic = random.integers(0, TOPICS, labels)
    order = np.argsort(topic, kind="stable")
    start = np.searchsorted(topic[order], np.arange(TOPICS + 1))
    share = 1 / np.arange(1, labels + 1) ** 0.7
    main = random.permutation(labels)[random.choice(labels, documents, p=share / share.sum())]
    columns = [main]
    for number in range(4):
        near = topic[main] if number < 3 else topic[main] ^ 1
        near = np.where(start[near + 1] > start[near], near, topic[main])
        size = start[near + 1] - start[near]
        columns.append(order[start[near] + (random.random(documents) * size).astype(int)])
    rows = np.tile(np.arange(documents), 5)
    y = csr_matrix(
        (np.ones(5 * documents, np.float32), (rows, np.concatenate(columns))),
        shape=(documents, labels),
    )
    y.data[:] = 1
    words = np.empty((documents, 120), np.int32)
    words[:, :60] = (WORDS * random.random((documents, 60)) ** 3).astype(np.int32)
    # Words of the topic, of its group, of the group of groups.
    for level, size in enumerate((1, 8, 64)):
        base = topic[main] // size * (7919 + level * 13) % WORDS
        own = (400 * random.random((documents, 20)) ** 2).astype(np.int64) * 37
        words[:, 60 + 20 * level : 80 + 20 * level] = (base[:, None] + own) % WORDS
    x = csr_matrix(
        (np.ones(words.size, np.float32), words.ravel(), np.arange(documents + 1) * words.shape[1]),
        shape=(documents, WORDS),
    )
    x.sum_duplicates()
    return csr_matrix(TfidfTransformer(sublinear_tf=True).fit_transform(x), dtype=np.float32), y


class Laps:
    """Print what passed since the last lap."""

    def __init__(self) -> None:
        self.before = self.now()

    @staticmethod
    def now() -> tuple[float, float]:
        """Return wall clock and CPU seconds."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return time.monotonic(), used.ru_utime + used.ru_stime

    def end(self, what: str) -> None:
        """Print the seconds of a lap, and the memory that the process holds at its end."""
        now = self.now()
        wall, cpu = (b - a for a, b in zip(self.before, now, strict=True))
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
        print(f"{what:12}  {wall:8.1f}  {cpu:8.1f}  {memory:8.2f}", flush=True)
        self.before = self.now()


def compiled(x: csr_matrix, y: csr_matrix) -> None:
    """Run every loop once, that of large nodes too, so that Numba compiles it."""
    some, own = x[:50], y[:50, :40]
    centroids = label_centroids(some, own)
    cluster(label_features(smooth(label_graph(own), centroids, 50)), [2, 8])
    large, clustering.LARGE = clustering.LARGE, 2
    cluster(label_features(centroids), [2, 8])
    clustering.LARGE = large


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=int, default=131_072)
    parser.add_argument("--documents", type=int, default=294_805)
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 13])
    o = parser.parse_args(argv)
    x, y = make(o.labels, o.documents)
    compiled(x, y)
    sizes = f"{o.labels:,} labels, {o.documents:,} documents"
    print(f"{machine_name('cpu')}, {threads()} threads, {sizes}")
    print("stage           wall s     CPU s       GiB")
    laps, load = Laps(), Load()
    centroids = label_centroids(x, y, KEEP)
    laps.end("centroids")
    graph = label_graph(y)
    laps.end("walk")
    centroids = smooth(graph, centroids, KEEP)
    laps.end("smoothing")
    features = label_features(centroids, in_place=True)
    laps.end("unit length")
    cluster(features, [2**depth for depth in o.depths])
    laps.end("2-means")
    others = load.others()
    busy = "unknown" if others is None else f"{others:.2f}"
    print(f"load average {load_average()}, processors busy with others {busy}")


if __name__ == "__main__":
    main()
