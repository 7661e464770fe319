"""Label features with a hierarchy planted in them."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix


def planted(
    branching: tuple[int, ...], per_leaf: int, seed: int, *, words: int = 12, noise: int = 12
) -> tuple[np.ndarray, csr_matrix]:
    """(leaf of each label, features): every node of the hierarchy gives its labels the same words,
    heavier the coarser.

    Siblings are numbered together: with branching (a, b), leaf // b is the node of the level above.
    """
    random = np.random.default_rng(seed)
    leaves = int(np.prod(branching))
    leaf = random.permutation(np.repeat(np.arange(leaves), per_leaf))
    index, value, base = [], [], 0
    below = leaves
    for level, children in enumerate(branching):
        below //= children
        node = leaf // below
        index.append(base + node[:, None] * words + np.arange(words))
        value.append((len(branching) - level) * random.uniform(0.8, 1.2, (len(leaf), words)))
        base += words * leaves // below
    index.append(base + random.integers(0, 500, (len(leaf), noise)))
    value.append(random.uniform(0, 1, (len(leaf), noise)))
    columns = np.concatenate(index, axis=1)
    row = np.repeat(np.arange(len(leaf)), columns.shape[1])
    matrix = csr_matrix(
        (np.concatenate(value, axis=1).ravel(), (row, columns.ravel())),
        shape=(len(leaf), base + 500),
    )
    return leaf, csr_matrix(matrix, dtype=np.float32)


def recovered(partition: np.ndarray, truth: np.ndarray) -> bool:
    """Whether the two are the same partition, whatever the numbers of its clusters."""
    pairs = np.unique(np.stack([partition, truth]), axis=1).shape[1]
    return pairs == len(np.unique(partition)) == len(np.unique(truth))
