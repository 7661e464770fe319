"""Batches of bags of words, of a dataset's split or of raw texts.

Dimension letters: B batch, T words of all bags of a batch, P positive (label, sample) pairs, L
labels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import csr_matrix

from xmlkernels.data.batches.base import (
    AnyBatch,
    AnyBatches,
    Levels,
    at_least,
    check_label_rows,
    check_rows,
    ragged_positions,
    text_windows,
)
from xmlkernels.data.batches.prefetch import in_background
from xmlkernels.errors import InputError

if TYPE_CHECKING:  # scikit-learn is not needed to train on features
    from xmlkernels.data.vectorizer import Vectorizer


@dataclass(frozen=True)
class BagBatch(AnyBatch):
    """One batch of bags of words with its positives.

    Attributes:
        token: int64 [T], column of each occurrence in the features.
        offset: int64 [B + 1], ascending from 0 to T: bag b is token[offset[b]:offset[b + 1]].
        token_weight: fp32 [T], value of each occurrence.
        pos_row, pos_sample, index, labels, levels: see `AnyBatch`.
    """

    token: torch.Tensor
    offset: torch.Tensor
    token_weight: torch.Tensor
    pos_row: torch.Tensor
    pos_sample: torch.Tensor
    index: torch.Tensor
    labels: int
    levels: Levels = ()

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the encoder takes: (token, offset, token_weight)."""
        return self.token, self.offset, self.token_weight


class BagBatches(AnyBatches[BagBatch]):
    """Batches of a split of bags of words.

    Args:
        features: CSR [N, V], a row for each document; values are the weights of its words.
        labels: CSR [N, L].
        shuffle: False gives the documents in their order. Lengths decide nothing: bags need no
            padding.
        label_features: CSR [L, V] of the label texts, the documents N … N + L − 1.

    The other arguments are those of `Batches`.

    Raises:
        InputError: rows or columns of the matrices do not fit each other, a feature is not finite,
            the tree's arrays do not fit, or a size is out of range.
    """

    def __init__(
        self,
        features: csr_matrix,
        labels: csr_matrix,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        prefetch: int = 2,
        label_features: csr_matrix | None = None,
        order: np.ndarray | None = None,
        ancestors: Sequence[np.ndarray] = (),
    ) -> None:
        check_rows("features", features.shape[0], labels)
        self.features = [csr_matrix(features)]
        if label_features is not None:
            check_label_rows("label_features", label_features.shape[0], labels)
            if label_features.shape[1] != features.shape[1]:
                expected = f"{features.shape[1]} columns, those of features"
                mend = "make both with one vocabulary"
                raise InputError("label_features", expected, str(label_features.shape[1]), mend)
            self.features.append(csr_matrix(label_features))
        for matrix in self.features:
            if not np.isfinite(matrix.data).all():
                raise InputError(
                    "features", "finite values", "a NaN or an infinity", "mend the features"
                )
        count = sum(matrix.shape[0] for matrix in self.features)
        super().__init__(
            labels,
            np.zeros(count, np.int64),
            batch_size,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            prefetch=prefetch,
            order=order,
            ancestors=ancestors,
        )

    def collate(self, documents: np.ndarray) -> BagBatch:
        """Make the batch of the given document numbers, int64 [B], in that order."""
        documents = np.asarray(documents, np.int64)
        row, sample, levels = self._positives(documents)
        index = torch.from_numpy(documents.copy())
        return BagBatch(
            *gather_bags(self.features, self.own(documents)),
            row,
            sample,
            index,
            self.num_labels,
            levels,
        )


def bag_text_batches(
    texts: Iterable[str],
    vectorizer: Vectorizer,
    batch_size: int,
    *,
    window: int = 1,
    prefetch: int = 2,
) -> Iterator[BagBatch]:
    """Batch raw texts in their order, vectorised in a background thread.

    `texts` may be endless and is read as it is used.

    Args:
        window: batches of texts vectorised in one call, which is cheaper than one by one.

    Yields:
        Batches without positives and with labels = 0.

    Raises:
        InputError: one string instead of many, an item that is no string, or a size out of range.
    """
    at_least("window", window, 1)
    at_least("prefetch", prefetch, 0)
    windows = text_windows(texts, batch_size, window)

    def make() -> Iterator[BagBatch]:
        nothing = torch.zeros(0, dtype=torch.int64)
        for first, part in windows:
            features = vectorizer.transform(part)
            for start in range(0, len(part), batch_size):
                rows = np.arange(start, min(start + batch_size, len(part)))
                bags = gather_bags([features], rows)
                yield BagBatch(
                    *bags, nothing, nothing.to(torch.int32), torch.from_numpy(first + rows), 0
                )

    return in_background(make, prefetch)


def gather_bags(
    matrices: Sequence[csr_matrix], rows: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather rows of CSR matrices [N_i, V], numbered through all of them.

    Returns (token, offset, token_weight), as in `BagBatch`.
    """
    first = np.cumsum([0, *(matrix.shape[0] for matrix in matrices)])
    part = np.searchsorted(first, rows, side="right") - 1
    starts, lengths = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for number, matrix in enumerate(matrices):
        own = rows[part == number] - first[number]
        starts[part == number] = matrix.indptr[own]
        lengths[part == number] = matrix.indptr[own + 1] - matrix.indptr[own]
    offset = np.concatenate([[0], np.cumsum(lengths)])
    token, weight = np.empty(offset[-1], np.int64), np.empty(offset[-1], np.float32)
    for number, matrix in enumerate(matrices):
        member = part == number
        here = ragged_positions(offset[:-1][member], lengths[member])
        there = ragged_positions(starts[member], lengths[member])
        token[here], weight[here] = matrix.indices[there], matrix.data[there]
    return torch.from_numpy(token), torch.from_numpy(offset), torch.from_numpy(weight)
