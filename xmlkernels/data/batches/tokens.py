"""Batches of tokenised documents, of a dataset's split or of raw texts.

Dimension letters: B batch, T tokens of the batch's longest document, P positive (label, sample)
pairs, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

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
    text_windows,
)
from xmlkernels.data.batches.prefetch import in_background
from xmlkernels.data.token_store import TokenStore
from xmlkernels.data.tokens import Tokenizer
from xmlkernels.errors import InputError

PAD_TO_MULTIPLE = 8
"""T is rounded up to a multiple of this. On the CPU oneDNN keeps kernels and buffers for every
width it meets: without it the process of `make demo` reaches 2.1 GB, with it 1.5 GB."""


@dataclass(frozen=True)
class Batch(AnyBatch):
    """One batch of tokenised documents with its positives.

    Attributes:
        input_ids: int64 [B, T], padded at the end with the tokenizer's pad id.
        attention_mask: int64 [B, T], 1 on tokens and 0 on padding.
        pos_row, pos_sample, index, labels, levels: see `AnyBatch`.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    pos_row: torch.Tensor
    pos_sample: torch.Tensor
    index: torch.Tensor
    labels: int
    levels: Levels = ()

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the encoder takes: (input_ids, attention_mask)."""
        return self.input_ids, self.attention_mask


class TokensAndLabels(Protocol):
    """What `Batches` reads of a split: N rows of tokens and labels [N, L] in CSR."""

    @property
    def tokens(self) -> TokenStore:
        """The N rows of tokens."""

    @property
    def labels(self) -> csr_matrix:
        """CSR [N, L]."""


class Batches(AnyBatches[Batch]):
    """Batches of a tokenised split.

    Args:
        split: token store of N rows and labels [N, L].
        batch_size: B; the last batch of an epoch may be shorter.
        seed: with the epoch number it decides the order, and nothing else does.
        shuffle: False gives every document once, longest first, the same in every epoch (for
            evaluation; `index` says which is which).
        bucket_window: documents are sorted by length inside windows of this many batches of the
            permutation.
        drop_last: leave out N mod B documents, drawn afresh each epoch, instead of giving a short
            batch.
        pad_id: default: the token file's.
        label_tokens: token store of L label texts; they become documents N … N + L − 1 whose one
            positive is their own label (label-text augmentation). Propensities stay those of
            `split.labels`.
        prefetch: batches made ahead by a background thread that shares the memory map; 0 makes them
            in line.
        pad_to_multiple: T is rounded up to a multiple of this, but not beyond the tokens a text may
            have.
        order, ancestors: a label tree's; see `AnyBatches`.

    Raises:
        InputError: rows of tokens and labels differ in number, label texts and labels differ in
            number, they come from different tokenizers, the tree's arrays do not fit, or a size is
            out of range.
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
        pad_to_multiple: int = PAD_TO_MULTIPLE,
        order: np.ndarray | None = None,
        ancestors: Sequence[np.ndarray] = (),
    ) -> None:
        at_least("pad_to_multiple", pad_to_multiple, 1)
        self.stores = [split.tokens] if label_tokens is None else [split.tokens, label_tokens]
        super().__init__(
            split.labels,
            np.concatenate([store.lengths for store in self.stores]),
            batch_size,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            prefetch=prefetch,
            bucket_window=bucket_window,
            order=order,
            ancestors=ancestors,
        )
        self._check_stores()
        self.pad_to_multiple = pad_to_multiple
        self.pad_id = split.tokens.header.pad_id if pad_id is None else pad_id

    def _check_stores(self) -> None:
        documents = self.stores[0]
        check_rows(str(documents.path), len(documents), self.labels)
        for texts in self.stores[1:]:
            check_label_rows(str(texts.path), len(texts), self.labels)
            if texts.header.tokenizer_hash != documents.header.tokenizer_hash:
                raise InputError(
                    str(texts.path),
                    f"the tokenizer of {documents.path}",
                    "another one",
                    "prepare the data again",
                )

    def collate(self, documents: np.ndarray) -> Batch:
        """Make the batch of the given document numbers, int64 [B], in that order."""
        documents = np.asarray(documents, np.int64)
        own, real = self.own(documents), len(self.stores[0])
        mask = _mask(self.lengths[own], self.stores[0].header.max_length, self.pad_to_multiple)
        input_ids = np.full(mask.shape, self.pad_id, np.int64)
        for number, store in enumerate(self.stores):
            member = (own >= real) == bool(number)
            flat, _ = store.gather(own[member] - number * real)
            input_ids[mask & member[:, None]] = flat
        row, sample, levels = self._positives(documents)
        return Batch(
            torch.from_numpy(input_ids),
            torch.from_numpy(mask.astype(np.int64)),
            row,
            sample,
            torch.from_numpy(documents.copy()),
            self.num_labels,
            levels,
        )


def text_batches(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    max_length: int,
    batch_size: int,
    *,
    bucket_window: int = 1,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Batch raw texts, tokenised in a background thread.

    `texts` may be endless and is read as it is used.

    Args:
        bucket_window: 1 keeps the order of the texts. More reads that many batches ahead and gives
            them longest first; `Batch.index` (the number of the text) then says which is which.

    Yields:
        Batches without positives and with labels = 0.

    Raises:
        InputError: one string instead of many, an item that is no string, or a size out of range.
    """
    at_least("bucket_window", bucket_window, 1)
    at_least("prefetch", prefetch, 0)
    windows = text_windows(texts, batch_size, bucket_window)

    def make() -> Iterator[Batch]:
        for first, window in windows:
            tokens = tokenizer.encode_batch(window, max_length)
            order = (
                np.argsort([-len(row) for row in tokens], kind="stable")
                if bucket_window > 1
                else range(len(tokens))
            )
            for start in range(0, len(window), batch_size):
                yield _unlabelled(
                    [tokens[i] for i in order[start : start + batch_size]],
                    first + np.asarray(order[start : start + batch_size]),
                    tokenizer.pad_id,
                    max_length,
                )

    return in_background(make, prefetch)


def _unlabelled(
    tokens: Sequence[np.ndarray], index: np.ndarray, pad_id: int, max_length: int
) -> Batch:
    mask = _mask(np.array([len(row) for row in tokens]), max_length, PAD_TO_MULTIPLE)
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


def _mask(lengths: np.ndarray, max_length: int, multiple: int) -> np.ndarray:
    """Return bool [B, T], True on tokens.

    T is the longest of `lengths`, rounded up to `multiple` as far as `max_length` allows.
    """
    longest = int(lengths.max())
    width = max(longest, min(math.ceil(longest / multiple) * multiple, max_length))
    return np.arange(width) < lengths[:, None]
