"""Time the reading of the old bag-of-words file by our parser and by sklearn, alternately.

    python benchmarks/parse_sparse.py --mb 256 --repeats 3

The file is made in a temporary folder (TF-IDF rows of 20 to 200 features with six decimals, a few
labels each), read from the page cache, and deleted. Prints MB/s (10^6 bytes) per run, the medians,
and the load average before and after: a figure taken while something else runs says little.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.datasets import load_svmlight_file

from xmlkernels.data.formats import read_bow

FEATURES, LABELS = 135_909, 670_091


def rows_of_text(rows: int, seed: int) -> bytes:
    """Make rows like those of Amazon-670K's TF-IDF file: sorted features, short tail of labels."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(rows):
        features = np.unique((FEATURES * rng.power(0.4, rng.integers(20, 200))).astype(np.int64))
        values = rng.random(len(features)) / np.sqrt(len(features))
        labels = np.unique(rng.integers(0, LABELS, rng.integers(1, 10)))
        pairs = zip(features.tolist(), values.tolist(), strict=True)
        entries = " ".join(f"{feature}:{value:.6f}" for feature, value in pairs)
        lines.append(f"{','.join(map(str, labels.tolist()))} {entries}\n")
    return "".join(lines).encode()


def make_file(path: Path, megabytes: int) -> int:
    """Write the file and return its number of rows.

    Blocks repeat: the parsers keep nothing between rows.
    """
    blocks = [rows_of_text(2_000, seed) for seed in range(4)]
    count = max(1, round(megabytes * 1e6 / (sum(map(len, blocks)) / len(blocks))))
    with path.open("wb") as file:
        file.write(f"{2_000 * count} {FEATURES} {LABELS}\n".encode())
        for block in range(count):
            file.write(blocks[block % len(blocks)])
    return 2_000 * count


def read_sklearn(path: Path) -> csr_matrix:
    """Read the features as a user of sklearn would."""
    with path.open("rb") as file:
        file.readline()  # it does not know the header
        features, _ = load_svmlight_file(
            file, n_features=FEATURES, dtype=np.float32, multilabel=True, zero_based=True
        )
    return features


def timed(read: Callable[[], csr_matrix]) -> tuple[float, csr_matrix]:
    """Return the seconds of one call, and its result."""
    start = time.perf_counter()
    matrix = read()
    return time.perf_counter() - start, matrix


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=int, default=256, help="size of the file, 10^6 bytes")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each reader")
    parser.add_argument(
        "--threads", type=int, default=None, help="of our parser; default: every CPU of the process"
    )
    parser.add_argument(
        "--ours-only",
        action="store_true",
        help="skip sklearn, which takes minutes and memory at 1 GB",
    )
    options = parser.parse_args()
    before = (f"{value:.2f}" for value in os.getloadavg())
    print("load average before", *before, "| cpus", os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        rows = make_file(path, options.mb)
        size = path.stat().st_size / 1e6
        print(f"{size:.0f} MB, {rows} rows, {FEATURES} features, {LABELS} labels")
        readers: dict[str, Callable[[], csr_matrix]] = {
            "xmlkernels": lambda: read_bow(path, threads=options.threads)[0],
            "sklearn": lambda: read_sklearn(path),
        }
        if options.ours_only:
            del readers["sklearn"]
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(options.repeats):
            found: dict[str, csr_matrix] = {}
            for name, read in readers.items():
                seconds, found[name] = timed(read)
                rates[name].append(size / seconds)
                print(f"{name:12} {seconds:8.2f} s {rates[name][-1]:8.1f} MB/s")
            if len(found) == 2 and (abs(found["xmlkernels"] - found["sklearn"]) > 1e-7).nnz:
                raise SystemExit("the two readers disagree: no figure")
    for name, values in rates.items():
        print(f"median {name:12} {statistics.median(values):8.1f} MB/s")
    print("load average after", *(f"{value:.2f}" for value in os.getloadavg()))


if __name__ == "__main__":
    main()
