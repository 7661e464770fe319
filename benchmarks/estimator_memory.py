"""Fit `XMLClassifier` on a million documents and a hundred thousand labels, and report its memory.

    python benchmarks/estimator_memory.py --documents 1000000 --labels 100000

Documents are drawn: each label has two words of its own, a document has three labels by a Zipf-like
law, the words of its labels and four words that say nothing. Prints the seconds, the CPU seconds,
the peak memory of the process, and P@1 on 10,000 further documents. scikit-learn's own
OneVsRestClassifier(SGDClassifier()) would hold labels x columns weights of 8 bytes, which is
printed for comparison and not run.
"""

import argparse
import resource
import time

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels import XMLClassifier

COLUMNS_OF_NOISE = 20_000


def drawn(documents: int, labels: int, seed: int) -> tuple[csr_matrix, csr_matrix]:
    """Return features [N, 2 L + noise] and targets [N, L]."""
    random = np.random.default_rng(seed)
    rank = np.minimum(labels ** random.random((documents, 3)), labels - 1)
    own = np.sort(rank.astype(np.int32), axis=1)
    word = 2 * own + random.integers(0, 2, own.shape, dtype=np.int32)
    noise = 2 * labels + random.integers(0, COLUMNS_OF_NOISE, (documents, 4), dtype=np.int32)
    found = []
    for indices, columns in (
        (np.concatenate([word, noise], axis=1), 2 * labels + COLUMNS_OF_NOISE),
        (own, labels),
    ):
        ends = np.arange(documents + 1) * indices.shape[1]
        ones = np.ones(indices.size, np.float32)
        matrix = csr_matrix((ones, indices.ravel(), ends), (documents, columns))
        matrix.sum_duplicates()
        matrix.data[:] = 1
        found.append(matrix)
    return found[0], found[1]


def main() -> None:
    """Draw, fit, and print what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--labels", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    features, targets = drawn(options.documents, options.labels, 0)
    model = XMLClassifier(
        settings={"epochs": 2, "beam": 5}, validation_share=0.0, threads=options.threads
    )
    began, cpu = time.perf_counter(), time.process_time()
    model.fit(features, targets)
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    test, truth = drawn(min(10_000, options.documents), options.labels, 1)
    print(
        f"{options.documents:,} documents, {options.labels:,} labels: {took:.0f} s, {cpu:.0f} CPU"
    )
    print(f"peak memory {peak:.2f} GiB, P@1 {100 * model.score(test, truth):.1f}")
    dense = 8 * targets.shape[1] * features.shape[1] / 2**30
    print(f"one weight per label and column, as OneVsRestClassifier holds them: {dense:,.0f} GiB")


if __name__ == "__main__":
    main()
