"""Batches of bags of words, and table order and cluster levels in batches of both kinds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse import random as sparse_random

from xmlkernels.data.batches.bags import BagBatch, BagBatches
from xmlkernels.data.batches.tokens import Batches
from xmlkernels.data.tokens import TokenStore, TokenWriter
from xmlkernels.errors import InputError

ROWS, LABELS, WORDS = 103, 31, 47
SHAPE = (ROWS, LABELS)


def matrix(rows: int, columns: int, seed: int = 0, density: float = 0.1) -> csr_matrix:
    return csr_matrix(
        sparse_random(
            rows, columns, density, "csr", rng=np.random.default_rng(seed), dtype=np.float32
        )
    )


FEATURES = matrix(ROWS, WORDS)
TARGETS = matrix(*SHAPE, seed=1)
LABEL_FEATURES = matrix(LABELS, WORDS, seed=2)
ORDER = np.random.default_rng(3).permutation(LABELS)
# Ragged: clusters of 1 to 9 rows; the coarse level joins some of them.
FINE = np.repeat(np.arange(7), [9, 1, 6, 4, 1, 7, 3])
COARSE = np.array([0, 0, 1, 1, 1, 2, 2])[FINE]


def dense(batch: BagBatch) -> np.ndarray:
    out = np.zeros((len(batch), WORDS), np.float32)
    for place in range(len(batch.offset) - 1):
        here = slice(int(batch.offset[place]), int(batch.offset[place + 1]))
        np.add.at(out[place], batch.token[here].numpy(), batch.token_weight[here].numpy())
    return out


def check(
    batch: BagBatch, order: np.ndarray | None = None, ancestors: tuple[np.ndarray, ...] = ()
) -> None:
    """Compare a batch with the rows it stands for, one by one."""
    every = np.vstack([FEATURES.toarray(), LABEL_FEATURES.toarray()])
    targets = np.vstack([TARGETS.toarray() != 0, np.eye(LABELS) != 0])
    if order is not None:
        targets = targets[:, order]  # column r: the label of table row r
    numbers = batch.index.numpy()
    np.testing.assert_array_equal(dense(batch), every[numbers])
    assert (int(batch.offset[0]), int(batch.offset[-1])) == (0, len(batch.token))
    assert len(batch.offset) == len(batch) + 1
    assert pairs(batch.pos_row, batch.pos_sample) == sorted(
        zip(*np.nonzero(targets[numbers].T), strict=True)
    )
    assert len(batch.levels) == len(ancestors)
    for nodes, (node, sample) in zip(ancestors, batch.levels, strict=True):
        expected = {
            (nodes[row], place)
            for place, number in enumerate(numbers)
            for row in np.flatnonzero(targets[number])
        }
        assert pairs(node, sample) == sorted(expected)
        assert (node.dtype, sample.dtype) == (torch.int64, torch.int32)
    kinds = (*batch.inputs, batch.pos_row, batch.pos_sample, batch.index)
    assert [str(tensor.dtype)[6:] for tensor in kinds] == [
        "int64",
        "int64",
        "float32",
        "int64",
        "int32",
        "int64",
    ]
    assert all(tensor.is_contiguous() for tensor in kinds)


def pairs(first: torch.Tensor, second: torch.Tensor) -> list[tuple[int, int]]:
    return list(zip(first.tolist(), second.tolist(), strict=True))


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("label_features", [None, LABEL_FEATURES])
def test_every_bag_once_and_whole(
    label_features: csr_matrix | None, shuffle: bool, prefetch: int
) -> None:
    batches = BagBatches(
        FEATURES, TARGETS, 10, shuffle=shuffle, prefetch=prefetch, label_features=label_features
    )
    found = list(batches.epoch(0))
    count = ROWS + (LABELS if label_features is not None else 0)
    assert batches.num_documents == count and len(found) == len(batches) == -(-count // 10)
    numbers = torch.cat([batch.index for batch in found]).tolist()
    assert sorted(numbers) == list(range(count))
    assert shuffle or numbers == list(range(count)), "as they stand"
    assert all(batch.labels == LABELS for batch in found)
    for batch in found:
        check(batch)


@pytest.mark.parametrize("ancestors", [(), (COARSE, FINE), (FINE,)])
@pytest.mark.parametrize("order", [None, ORDER])
def test_table_order_and_levels(
    order: np.ndarray | None, ancestors: tuple[np.ndarray, ...]
) -> None:
    batches = BagBatches(
        FEATURES, TARGETS, 20, label_features=LABEL_FEATURES, order=order, ancestors=ancestors
    )
    for batch in batches.epoch(0):
        check(batch, order, ancestors)


def test_an_epoch_of_bags_is_seeded_and_resumes() -> None:
    def numbers(seed: int, epoch: int, start: int = 0) -> list[list[int]]:
        return [
            batch.index.tolist()
            for batch in BagBatches(FEATURES, TARGETS, 10, seed=seed).epoch(epoch, start)
        ]

    orders = [numbers(seed, epoch) for seed, epoch in itertools.product((0, 1), (0, 1))]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert numbers(1, 1) == orders[3] and numbers(1, 1, 4) == orders[3][4:]
    dropped = list(BagBatches(FEATURES, TARGETS, 10, drop_last=True).epoch(0))
    assert [len(batch) for batch in dropped] == [10] * 10


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_documents_in_any_order(data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, ROWS + LABELS - 1), min_size=1, max_size=40))
    batches = BagBatches(
        FEATURES, TARGETS, 5, label_features=LABEL_FEATURES, order=ORDER, ancestors=(COARSE, FINE)
    )
    check(batches.collate(np.array(numbers)), ORDER, (COARSE, FINE))


def test_a_batch_of_bags_moves_whole() -> None:
    batch = BagBatches(FEATURES, TARGETS, 5, ancestors=(FINE,)).collate(np.arange(5))
    moved = batch.to("meta")
    assert isinstance(moved, BagBatch) and moved.labels == LABELS and len(moved) == 5
    assert all(
        tensor.is_meta
        for tensor in (
            *moved.inputs,
            moved.pos_row,
            moved.pos_sample,
            moved.index,
            *moved.levels[0],
        )
    )


def test_empty_bags_and_matrices_of_other_layouts() -> None:
    features = csr_matrix((3, WORDS), dtype=np.float64)
    batch = BagBatches(features, csr_matrix((3, 5)), 3).collate(np.arange(3))
    assert batch.token.shape == (0,)
    assert batch.offset.tolist() == [0] * 4
    assert batch.token_weight.dtype == torch.float32
    check(BagBatches(FEATURES.tocsc(), TARGETS.tocoo(), 3).collate(np.arange(3)))


@dataclass
class Documents:
    tokens: TokenStore
    labels: csr_matrix


def documents(folder: Path) -> tuple[Documents, TokenStore]:
    stores = []
    for name, rows in (("tokens", ROWS), ("labels", LABELS)):
        with TokenWriter(
            folder / name, rows, vocab_size=500, tokenizer_hash="h", max_length=40, pad_id=7
        ) as writer:
            writer.append([np.arange(8, 10 + number % 20) for number in range(rows)])
        stores.append(TokenStore.open(folder / name))
    return Documents(stores[0], TARGETS), stores[1]


def test_tokens_have_table_order_and_levels_too(tmp_path: Path) -> None:
    split, texts = documents(tmp_path)
    bags = BagBatches(
        FEATURES, TARGETS, 16, label_features=LABEL_FEATURES, order=ORDER, ancestors=(COARSE, FINE)
    )
    batches = Batches(split, 16, label_tokens=texts, order=ORDER, ancestors=(COARSE, FINE))
    for batch in batches.epoch(0):
        other = bags.collate(batch.index.numpy())
        assert torch.equal(batch.pos_row, other.pos_row)
        assert torch.equal(batch.pos_sample, other.pos_sample)
        for mine, there in zip(batch.levels, other.levels, strict=True):
            assert torch.equal(mine[0], there[0]) and torch.equal(mine[1], there[1])
        assert batch.inputs[0] is batch.input_ids and batch.inputs[1] is batch.attention_mask
        moved = batch.to("meta")
        assert all(tensor.is_meta for level in moved.levels for tensor in level)
        assert len(moved.levels) == 2
    plain = Batches(split, 16, label_tokens=texts)
    assert [a.tolist() for a in plain.plan(3)] == [a.tolist() for a in batches.plan(3)], (
        "a tree changes no order of documents"
    )
    assert plain.collate(np.arange(4)).levels == ()


@pytest.mark.parametrize("size", [1, 2, 7, 9])
def test_processes_share_the_inputs_of_a_batch_and_know_all_its_positives(
    size: int, tmp_path: Path
) -> None:
    """Three of them; in a batch of fewer documents some get the first one as a stand-in."""
    split, texts = documents(tmp_path)
    ends = np.cumsum([0, *(size // 3 + (r < size % 3) for r in range(3))]).tolist()
    options: dict[str, Any] = {"order": ORDER, "ancestors": (COARSE, FINE)}
    numbers = np.random.default_rng(0).choice(ROWS + LABELS, size, replace=False)
    whole = Batches(split, size, label_tokens=texts, **options).collate(numbers)
    for a, b in itertools.pairwise(ends):
        own = numbers[a:b] if a < b else numbers[:1]
        tokens = (
            Batches(split, size, label_tokens=texts, **options)
            .shared(lambda count, a=a, b=b: slice(a, b))
            .collate(numbers)
        )
        bags = BagBatches(FEATURES, TARGETS, size, label_features=LABEL_FEATURES, **options)
        bag = bags.shared(lambda count, a=a, b=b: slice(a, b)).collate(numbers)
        alone = Batches(split, 9, label_tokens=texts)
        for batch in (tokens, bag):
            assert len(batch) == size
            assert torch.equal(batch.index, whole.index)
            assert torch.equal(batch.pos_row, whole.pos_row)
            assert torch.equal(batch.pos_sample, whole.pos_sample)
            for mine, there in zip(batch.levels, whole.levels, strict=True):
                assert torch.equal(mine[0], there[0]) and torch.equal(mine[1], there[1])
        expected = alone.collate(own)
        assert torch.equal(tokens.input_ids, expected.input_ids)
        assert torch.equal(tokens.attention_mask, expected.attention_mask)
        every = np.vstack([FEATURES.toarray(), LABEL_FEATURES.toarray()])
        np.testing.assert_array_equal(dense(bag)[: len(own)], every[own])
        assert len(bag.offset) == len(own) + 1


def test_batches_taken_in_turn() -> None:
    batches = BagBatches(FEATURES, TARGETS, 10, seed=3)
    found = [[batch.index.tolist() for batch in batches.epoch(1, start, 3)] for start in range(3)]
    assert [len(part) for part in found] == [4, 4, 3]
    expected = [batch.index.tolist() for batch in batches.epoch(1)]
    assert [expected[start::3] for start in range(3)] == found
    assert list(batches.epoch(1, 11, 3)) == []
    with pytest.raises(InputError, match="every: expected at least 1"):
        next(batches.epoch(0, 0, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": ORDER[:30]}, r"order: expected each of the 31 label ids once, got int64 \[30\]"),
        ({"order": np.zeros(LABELS, np.int64)}, "order: .*not a permutation.*label tree"),
        ({"order": ORDER + 1}, "not a permutation"),
        ({"order": ORDER.astype(np.float32)}, "float32"),
        (
            {"ancestors": (COARSE, FINE[:30])},
            r"ancestors of level 1: expected 31 integers.* got int64 \[30\]",
        ),
        ({"ancestors": (FINE[::-1],)}, "ancestors of level 0: expected ascending"),
        ({"ancestors": (FINE - 1,)}, "ascending numbers from 0"),
        ({"label_features": LABEL_FEATURES[:30]}, "label_features: expected 31 rows"),
        ({"label_features": LABEL_FEATURES[:, :40]}, "label_features: expected 47 columns"),
        ({"features": FEATURES[:102]}, "features: expected 103 rows"),
        ({"features": FEATURES * np.float32("nan")}, "features: expected finite values"),
        ({"batch_size": 0}, "batch_size"),
        ({"prefetch": -1}, "prefetch"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    features, size = options.pop("features", FEATURES), options.pop("batch_size", 4)
    with pytest.raises(InputError, match=message):
        BagBatches(features, TARGETS, size, **options)
