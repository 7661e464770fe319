"""What batches of all kinds share: positives, the order of an epoch, and collating ahead.

Dimension letters: B batch, T tokens, P positive (label, sample) pairs, L labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from scipy.sparse import csr_matrix

from xmlkernels.data.batches.prefetch import in_background
from xmlkernels.errors import InputError

Levels = tuple[tuple[torch.Tensor, torch.Tensor], ...]
Own = TypeVar("Own", bound="AnyBatch")


class AnyBatch:
    """The part of a batch that does not depend on the kind of documents.

    Its kinds are frozen dataclasses.

    For one of several processes `inputs` hold its own part of the documents, all else is of the
    whole batch: see `AnyBatches.shared`.

    Attributes:
        pos_row: int64 [P], table row of each positive pair, ascending: the label id where no
            `order` was given.
        pos_sample: int32 [P], its place in the batch; pairs are sorted by (row, sample) and unique.
        index: int64 [B], document numbers; the virtual document of label l has number N + l.
        labels: L, 0 where the documents have no known labels.
        levels: the positives of each cluster level of a label tree, coarse to fine: node int64
            [P_r], ascending, and sample int32 [P_r]; pairs are sorted by (node, sample) and unique.
            Empty without a tree.
    """

    pos_row: torch.Tensor
    pos_sample: torch.Tensor
    index: torch.Tensor
    labels: int
    levels: Levels

    def __len__(self) -> int:
        return len(self.index)

    def to(self: Own, device: torch.device | str, *, non_blocking: bool = False) -> Own:
        """Return the same batch with every tensor on `device`."""

        def moved(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(moved(item) for item in value)
            if isinstance(value, torch.Tensor):
                return value.to(device, non_blocking=non_blocking)
            return value

        make: Callable[..., Own] = type(self)
        return make(**{name: moved(value) for name, value in vars(self).items()})


Made = TypeVar("Made", bound=AnyBatch)


class AnyBatches(ABC, Generic[Made]):
    """Batches of a split: an explicit seeded order, positives, and a thread that collates ahead.

    Args:
        labels: [N, L] CSR; stored zeros and duplicates do not count.
        lengths: int64 [M], length of each document, virtual ones included: like lengths share a
            batch. Equal lengths leave the order to chance alone.
        order: int64 [L], label id of each table row; `pos_row` then holds table rows. Default: row
            l is label l.
        ancestors: one int64 [L] array for each cluster level, coarse to fine: the node of each
            table row, ascending. `levels` is made from them.

    The other arguments are those of `Batches`.

    Raises:
        InputError: `order` is no permutation of the labels, `ancestors` does not fit, or a size is
            out of range.
    """

    def __init__(
        self,
        labels: csr_matrix,
        lengths: np.ndarray,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        prefetch: int,
        bucket_window: int = 1,
        order: np.ndarray | None = None,
        ancestors: Sequence[np.ndarray] = (),
    ) -> None:
        at_least("batch_size", batch_size, 1)
        at_least("bucket_window", bucket_window, 1)
        at_least("prefetch", prefetch, 0)
        if not 0 <= seed < 2**64:
            raise InputError(
                "seed", "an integer from 0 to 2**64 - 1", str(seed), "choose another seed"
            )
        self.num_labels: int = labels.shape[1]
        self.place = None if order is None else _inverse(order, self.num_labels)
        self.labels = _in_table_order(labels, self.place)
        self.ancestors = _checked(ancestors, self.num_labels)
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.bucket_window, self.prefetch = bucket_window, prefetch
        self._part: Callable[[int], slice] | None = None

    def shared(self, part: Callable[[int], slice]) -> Self:
        """Make these the batches of one of several processes, each of which encodes a part.

        `inputs` then hold the documents at part(B) alone (the first document where there is none:
        encoders take no empty batch); all else is of the whole batch.
        """
        self._part = part
        return self

    def own(self, documents: np.ndarray) -> np.ndarray:
        """Return the documents of a batch whose inputs this process needs."""
        kept = documents if self._part is None else documents[self._part(len(documents))]
        return kept if len(kept) else documents[:1]

    @property
    def num_documents(self) -> int:
        """Documents of an epoch, virtual ones and those that `drop_last` leaves out included."""
        return len(self.lengths)

    def __len__(self) -> int:
        """Batches of an epoch."""
        whole, rest = divmod(self.num_documents, self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Document numbers of each batch of an epoch, int64: a pure function of (seed, epoch)."""
        kept = len(self) * self.batch_size if self.drop_last else self.num_documents
        if not self.shuffle:
            return self._cut(np.lexsort((np.arange(self.num_documents), -self.lengths))[:kept])
        random = np.random.Generator(np.random.Philox(key=np.array([self.seed, epoch], np.uint64)))
        order = random.permutation(self.num_documents)[:kept]
        place = np.arange(kept)
        # Ties keep the permutation's order, so documents of one length meet new company in each
        # epoch.
        by_length = np.lexsort(
            (place, self.lengths[order], place // (self.bucket_window * self.batch_size))
        )
        batches = self._cut(order[by_length])
        return [batches[number] for number in random.permutation(len(batches))]

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        return [
            order[start : start + self.batch_size]
            for start in range(0, len(order), self.batch_size)
        ]

    def epoch(self, epoch: int, start: int = 0, every: int = 1) -> Iterator[Made]:
        """Yield the batches of an epoch from number `start` on.

        They are exactly the tail of the uninterrupted sequence.

        Closing the iterator, or dropping it, ends its thread.

        Args:
            every: give the first of every so many.

        Raises:
            InputError: `epoch` is negative, `start` is not in 0 … len(self), or `every` < 1.
        """
        at_least("epoch", epoch, 0)
        at_least("every", every, 1)
        if not 0 <= start <= len(self):
            raise InputError(
                "start",
                f"a batch number from 0 to {len(self)}",
                str(start),
                "resume at another batch",
            )
        return in_background(
            lambda: map(self.collate, self.plan(epoch)[start::every]), self.prefetch
        )

    @abstractmethod
    def collate(self, documents: np.ndarray) -> Made:
        """Make the batch of the given document numbers, int64 [B], in that order."""

    def _positives(self, documents: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, Levels]:
        """Return the pairs of the labels and of each level, sorted by (row, sample).

        One 64-bit key sorts several times faster than two keys.
        """
        count, real = len(documents), self.labels.shape[0]
        place = np.arange(count, dtype=np.int64)
        own, virtual = place[documents < real], place[documents >= real]
        starts = self.labels.indptr[documents[own]].astype(np.int64)
        lengths = self.labels.indptr[documents[own] + 1] - starts
        rows = self.labels.indices[ragged_positions(starts, lengths)].astype(np.int64)
        labels = documents[virtual] - real
        keys = np.concatenate(
            [
                rows * count + np.repeat(own, lengths),
                (labels if self.place is None else self.place[labels]) * count + virtual,
            ]
        )
        keys.sort()
        row, sample = np.divmod(keys, max(1, count))
        # A sample with two labels of one cluster names that cluster once.
        levels = tuple(
            _pairs(np.unique(node[row] * count + sample), count) for node in self.ancestors
        )
        return (*_pairs(keys, count), levels)


def _pairs(keys: np.ndarray, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    row, sample = np.divmod(keys, max(1, count))
    return torch.from_numpy(row), torch.from_numpy(sample.astype(np.int32))


def _inverse(order: np.ndarray, labels: int) -> np.ndarray:
    """Table row of each label id, int64 [L]."""
    order = np.asarray(order)
    whole = order.shape == (labels,) and order.dtype.kind in "iu"
    if not whole or not np.array_equal(np.sort(order), np.arange(labels)):
        got = f"{order.dtype} {list(order.shape)}" + (", not a permutation" if whole else "")
        raise InputError(
            "order",
            f"each of the {labels} label ids once",
            got,
            "take the order of this dataset's label tree",
        )
    place = np.empty(labels, np.int64)
    place[order] = np.arange(labels)
    return place


def _in_table_order(labels: csr_matrix, place: np.ndarray | None) -> csr_matrix:
    """Return labels with unique columns per row, no stored zeros, columns in table order.

    A copy only where the input is not so.
    """
    labels = csr_matrix(labels)
    if not labels.has_canonical_format or (labels.data == 0).any():
        labels = labels.copy()
        labels.sum_duplicates()
        labels.eliminate_zeros()
    if place is None:
        return labels
    # Unsorted within a row from here on: the pairs of a batch are sorted anyway.
    return csr_matrix((labels.data, place[labels.indices], labels.indptr), shape=labels.shape)


def _checked(ancestors: Sequence[np.ndarray], labels: int) -> list[np.ndarray]:
    for level, nodes in enumerate(ancestors):
        where, mend = f"ancestors of level {level}", "take `ancestors` of this dataset's label tree"
        if nodes.shape != (labels,) or nodes.dtype.kind not in "iu":
            raise InputError(
                where,
                f"{labels} integers, one for each table row",
                f"{nodes.dtype} {list(nodes.shape)}",
                mend,
            )
        if labels and (nodes[0] < 0 or (nodes[1:] < nodes[:-1]).any()):
            raise InputError(where, "ascending numbers from 0", "others", mend)
    return [np.asarray(nodes, np.int64) for nodes in ancestors]


def check_rows(where: str, rows: int, labels: csr_matrix) -> None:
    """Raise InputError where documents and rows of labels differ in number."""
    if rows != labels.shape[0]:
        expected = f"{labels.shape[0]} rows, one for each row of labels"
        raise InputError(where, expected, str(rows), "prepare the data again")


def check_label_rows(where: str, rows: int, labels: csr_matrix) -> None:
    """Raise InputError where label texts and labels differ in number."""
    if rows != labels.shape[1]:
        mend = "prepare the data again with one label text for each label"
        raise InputError(where, f"{labels.shape[1]} rows, one for each label", str(rows), mend)


def at_least(name: str, value: int, least: int) -> None:
    """Raise InputError where a size is below its least."""
    if value < least:
        raise InputError(name, f"at least {least}", str(value), "choose a larger one")


def text_windows(
    texts: Iterable[str], batch_size: int, batches: int = 1
) -> Iterator[tuple[int, list[str]]]:
    """Yield windows of up to `batches` batches: the number of the first text, and the texts.

    Texts are read as they are used.

    Raises:
        InputError: one string instead of many, or batch_size < 1; while it is read, an item that is
            no string.
    """
    at_least("batch_size", batch_size, 1)
    if isinstance(texts, str):
        raise InputError(
            "texts", "a list or other iterable of strings", "one string", "put it into a list"
        )

    def windows() -> Iterator[tuple[int, list[str]]]:
        source, first = iter(texts), 0
        while window := list(islice(source, batch_size * batches)):
            for number, text in enumerate(window, first):
                if not isinstance(text, str):
                    raise InputError(
                        f"text {number}", "a string", type(text).__name__, "convert it first"
                    )
            yield first, window
            first += len(window)

    return windows()


def ragged_positions(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenation of the ranges starts[i] … starts[i] + lengths[i] − 1, int64."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    positions = np.arange(total, dtype=np.int64)
    positions += np.repeat(starts - (ends - lengths), lengths)
    return positions
