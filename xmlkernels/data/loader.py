"""Batches: an explicit seeded order, documents of like length together, one thread that collates ahead.

Dimension letters: B batch, T tokens of the batch's longest document, P positive (label, sample) pairs, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from scipy.sparse import csr_matrix

from xmlkernels.data.background import in_background
from xmlkernels.data.token_store import TokenStore, ragged_positions
from xmlkernels.data.tokens import Tokenizer
from xmlkernels.errors import InputError


@dataclass(frozen=True)
class Batch:
    """One batch of documents with its positives.

    Attributes:
        input_ids: int64 [B, T], padded at the end with the tokenizer's pad id.
        attention_mask: int64 [B, T], 1 on tokens and 0 on padding.
        pos_row: int64 [P], label of each positive pair, ascending.
        pos_sample: int32 [P], its place in the batch; pairs are sorted by (row, sample) and unique.
        index: int64 [B], document numbers; the virtual document of label l has number N + l.
        labels: L, 0 where the documents have no known labels.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    pos_row: torch.Tensor
    pos_sample: torch.Tensor
    index: torch.Tensor
    labels: int

    def __len__(self) -> int:
        return len(self.index)

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the encoder takes."""
        return self.input_ids, self.attention_mask

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        return Batch(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.attention_mask.to(device, non_blocking=non_blocking),
            self.pos_row.to(device, non_blocking=non_blocking),
            self.pos_sample.to(device, non_blocking=non_blocking),
            self.index.to(device, non_blocking=non_blocking),
            self.labels,
        )


class TokensAndLabels(Protocol):
    """What `Batches` reads of a split: N rows of tokens and labels [N, L] in CSR."""

    @property
    def tokens(self) -> TokenStore: ...
    @property
    def labels(self) -> csr_matrix: ...


class Batches:
    """Batches of a split.

    Args:
        split: token store of N rows and labels [N, L].
        batch_size: B; the last batch of an epoch may be shorter.
        seed: with the epoch number it decides the order, and nothing else does.
        shuffle: False gives every document once, longest first, the same in every epoch (for evaluation; `index`
            tells who is who).
        bucket_window: documents are sorted by length inside windows of this many batches of the permutation.
        drop_last: leave out N mod B documents, drawn anew each epoch, instead of giving a short batch.
        pad_id: default: the token file's.
        label_tokens: token store of L label texts; they become documents N … N + L − 1 whose one positive is their
            own label (label-text augmentation). Propensities stay those of `split.labels`.
        prefetch: batches made ahead by a background thread that shares the memory map; 0 makes them in line.
        pad_to_multiple: T is rounded up to a multiple of this.

    Raises:
        InputError: rows of tokens and labels differ in number, label texts and labels differ in number, they come
            from different tokenizers, or a size is out of range.
    """

    def __init__(
        self,
        split: TokensAndLabels,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        bucket_window: int = 50,
        drop_last: bool = False,
        pad_id: int | None = None,
        label_tokens: TokenStore | None = None,
        prefetch: int = 2,
        pad_to_multiple: int = 1,
    ) -> None:
        _at_least("batch_size", batch_size, 1)
        _at_least("bucket_window", bucket_window, 1)
        _at_least("pad_to_multiple", pad_to_multiple, 1)
        _at_least("prefetch", prefetch, 0)
        if not 0 <= seed < 2**64:
            raise InputError("seed", "an integer from 0 to 2**64 - 1", str(seed), "choose another seed")
        self.labels = _canonical(split.labels)
        self.num_labels = self.labels.shape[1]
        self.stores = [split.tokens] if label_tokens is None else [split.tokens, label_tokens]
        self._check_stores()
        self.batch_size, self.seed, self.shuffle, self.drop_last = batch_size, seed, shuffle, drop_last
        self.bucket_window, self.prefetch, self.pad_to_multiple = bucket_window, prefetch, pad_to_multiple
        self.pad_id = split.tokens.header.pad_id if pad_id is None else pad_id
        self.lengths = np.concatenate([store.lengths for store in self.stores])

    def _check_stores(self) -> None:
        documents = self.stores[0]
        if len(documents) != self.labels.shape[0]:
            raise InputError(
                str(documents.path),
                f"{self.labels.shape[0]} rows, one for each row of labels",
                str(len(documents)),
                "prepare the data again",
            )
        for texts in self.stores[1:]:
            if len(texts) != self.num_labels:
                raise InputError(
                    str(texts.path),
                    f"{self.num_labels} rows, one for each label",
                    str(len(texts)),
                    "prepare the data again with one label text for each label",
                )
            if texts.header.tokenizer_hash != documents.header.tokenizer_hash:
                raise InputError(str(texts.path), f"the tokenizer of {documents.path}", "another one", "prepare the data again")

    @property
    def num_documents(self) -> int:
        """Documents of an epoch, virtual ones included (and those that `drop_last` will leave out)."""
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
        # Ties keep the permutation's order, so documents of one length meet new company in each epoch.
        by_length = np.lexsort((place, self.lengths[order], place // (self.bucket_window * self.batch_size)))
        batches = self._cut(order[by_length])
        return [batches[number] for number in random.permutation(len(batches))]

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on: exactly the tail of the uninterrupted sequence.

        Closing the iterator, or dropping it, ends its thread.

        Raises:
            InputError: `epoch` is negative or `start` is not in 0 … len(self).
        """
        _at_least("epoch", epoch, 0)
        if not 0 <= start <= len(self):
            raise InputError("start", f"a batch number from 0 to {len(self)}", str(start), "resume at another batch")
        return in_background(lambda: map(self.collate, self.plan(epoch)[start:]), self.prefetch)

    def collate(self, documents: np.ndarray) -> Batch:
        """The batch of the given document numbers, int64 [B], in that order."""
        documents = np.asarray(documents, np.int64)
        real = len(self.stores[0])
        width = _rounded(int(self.lengths[documents].max()), self.pad_to_multiple)
        input_ids = np.full((len(documents), width), self.pad_id, np.int64)
        mask = np.arange(width) < self.lengths[documents, None]
        for number, store in enumerate(self.stores):
            member = (documents >= real) == bool(number)
            flat, _ = store.gather(documents[member] - number * real)
            input_ids[mask & member[:, None]] = flat
        row, sample = self._positives(documents, real)
        return Batch(
            torch.from_numpy(input_ids),
            torch.from_numpy(mask.astype(np.int64)),
            torch.from_numpy(row),
            torch.from_numpy(sample),
            torch.from_numpy(documents.copy()),
            self.num_labels,
        )

    def _positives(self, documents: np.ndarray, real: int) -> tuple[np.ndarray, np.ndarray]:
        """Pairs sorted by (row, sample). One 64-bit key sorts several times faster than two-key sorting."""
        place = np.arange(len(documents), dtype=np.int64)
        own, virtual = place[documents < real], place[documents >= real]
        starts = self.labels.indptr[documents[own]].astype(np.int64)
        counts = self.labels.indptr[documents[own] + 1] - starts
        rows = self.labels.indices[ragged_positions(starts, counts)].astype(np.int64)
        keys = np.concatenate(
            [
                rows * len(documents) + np.repeat(own, counts),
                (documents[virtual] - real) * len(documents) + virtual,
            ]
        )
        keys.sort()
        row, sample = np.divmod(keys, len(documents))
        return row, sample.astype(np.int32)


def text_batches(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    max_length: int,
    batch_size: int,
    *,
    bucket_window: int = 1,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Batches of raw texts, tokenised in a background thread; `texts` may be endless and is read as it is used.

    Args:
        bucket_window: 1 keeps the order of the texts. More reads that many batches ahead and gives them longest
            first; `Batch.index` (the number of the text) then tells who is who.

    Yields:
        Batches without positives and with labels = 0.

    Raises:
        InputError: one string instead of many, an item that is no string, or a size out of range.
    """
    _at_least("batch_size", batch_size, 1)
    _at_least("bucket_window", bucket_window, 1)
    _at_least("prefetch", prefetch, 0)
    if isinstance(texts, str):
        raise InputError("texts", "a list or other iterable of strings", "one string", "put it into a list")

    def make() -> Iterator[Batch]:
        source, first = iter(texts), 0
        while window := list(islice(source, batch_size * bucket_window)):
            for number, text in enumerate(window, first):
                if not isinstance(text, str):
                    raise InputError(f"text {number}", "a string", type(text).__name__, "convert it first")
            tokens = tokenizer.encode_batch(window, max_length)
            order = np.argsort([-len(row) for row in tokens], kind="stable") if bucket_window > 1 else range(len(tokens))
            for start in range(0, len(window), batch_size):
                yield _unlabelled(
                    [tokens[i] for i in order[start : start + batch_size]],
                    first + np.asarray(order[start : start + batch_size]),
                    tokenizer.pad_id,
                )
            first += len(window)

    return in_background(make, prefetch)


def _unlabelled(tokens: Sequence[np.ndarray], index: np.ndarray, pad_id: int) -> Batch:
    lengths = np.array([len(row) for row in tokens])
    mask = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.full(mask.shape, pad_id, np.int64)
    input_ids[mask] = np.concatenate(tokens)
    nothing = torch.zeros(0, dtype=torch.int64)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(mask.astype(np.int64)),
        nothing,
        nothing.to(torch.int32),
        torch.from_numpy(index.astype(np.int64)),
        0,
    )


def _canonical(labels: csr_matrix) -> csr_matrix:
    """Unique column ids per row, no stored zeros; a copy only where the input is not so."""
    labels = csr_matrix(labels)
    if not labels.has_canonical_format or (labels.data == 0).any():
        labels = labels.copy()
        labels.sum_duplicates()
        labels.eliminate_zeros()
    return labels


def _rounded(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(name, f"at least {least}", str(value), "choose a larger one")
