"""Contents and order of batches of tokens."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from documents import Documents, documents, store, threads
from xmlkernels.data.batches.tokens import Batch, Batches
from xmlkernels.data.tokens import TokenStore


def same(left: Batch, right: Batch) -> bool:
    names = ("input_ids", "attention_mask", "pos_row", "pos_sample", "index")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


def check(batch: Batch, split: Documents, label_tokens: TokenStore | None = None) -> None:
    """Compare a batch with the rows it stands for, one by one."""
    count, pairs = len(split.tokens), set()
    for place, number in enumerate(batch.index.tolist()):
        tokens = split.tokens[number] if number < count else label_tokens[number - count]  # type: ignore[index]
        length = len(tokens)
        assert batch.input_ids[place, :length].tolist() == tokens.tolist()
        assert (batch.input_ids[place, length:] == 7).all()
        assert batch.attention_mask[place].tolist() == [1] * length + [0] * (
            batch.input_ids.shape[1] - length
        )
        rows = split.labels[number].indices.tolist() if number < count else [number - count]
        pairs |= {(row, place) for row in rows}
    assert list(zip(batch.pos_row.tolist(), batch.pos_sample.tolist(), strict=True)) == sorted(
        pairs
    )
    longest = int(batch.attention_mask.sum(1).max())
    assert batch.input_ids.shape[1] == next(
        width for width in (8, 16, 24, 32, 40) if width >= longest
    )
    kinds = [batch.input_ids, batch.attention_mask, batch.pos_row, batch.pos_sample, batch.index]
    assert [str(tensor.dtype)[6:] for tensor in kinds] == [
        "int64",
        "int64",
        "int64",
        "int32",
        "int64",
    ]
    assert all(tensor.is_contiguous() for tensor in kinds)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_document_once_and_whole(tmp_path: Path, shuffle: bool, prefetch: int) -> None:
    split = documents(tmp_path)
    batches = Batches(split, 10, shuffle=shuffle, bucket_window=3, prefetch=prefetch)
    found = list(batches.epoch(0))
    assert len(found) == len(batches) == 11
    assert sorted(len(batch) for batch in found) == [3] + [10] * 10
    assert sorted(torch.cat([batch.index for batch in found]).tolist()) == list(range(103))
    assert all(batch.labels == 31 for batch in found)
    for batch in found:
        check(batch, split)
    assert threads() == []


def test_label_texts_as_documents(tmp_path: Path) -> None:
    split, texts = documents(tmp_path), store(tmp_path / "labels.bin", 31, seed=3)
    batches = Batches(split, 16, label_tokens=texts, bucket_window=2)
    found = list(batches.epoch(0))
    assert batches.num_documents == 134 and len(found) == len(batches) == 9
    assert sorted(torch.cat([batch.index for batch in found]).tolist()) == list(range(134))
    assert any((batch.index >= 103).any() and (batch.index < 103).any() for batch in found)
    for batch in found:
        check(batch, split, texts)


def test_only_label_texts_or_only_documents_in_a_batch(tmp_path: Path) -> None:
    split, texts = documents(tmp_path), store(tmp_path / "labels.bin", 31, seed=3)
    batches = Batches(split, 16, label_tokens=texts)
    for numbers in ([103, 133, 104], [0, 102], [133]):
        check(batches.collate(np.array(numbers)), split, texts)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 25),
    st.integers(1, 6),
    st.integers(0, 2**64 - 1),
    st.booleans(),
)
def test_plan_holds_each_document_once(
    rows: int, size: int, window: int, seed: int, drop: bool
) -> None:
    batches = Batches.__new__(Batches)
    batches.lengths = np.random.default_rng(rows).integers(1, 9, rows)
    batches.batch_size, batches.bucket_window, batches.seed = size, window, seed
    batches.shuffle, batches.drop_last = True, drop
    plan = batches.plan(3)
    flat = np.concatenate(plan) if plan else np.zeros(0, np.int64)
    assert len(plan) == len(batches) and len(set(flat.tolist())) == len(flat)
    assert len(flat) == (rows - rows % size if drop else rows)
    assert (
        all(len(batch) == size for batch in plan)
        if drop
        else sum(len(batch) < size for batch in plan) <= 1
    )


def test_pure_function_of_seed_and_epoch(tmp_path: Path) -> None:
    split = documents(tmp_path)
    orders = {
        (seed, epoch): torch.cat(
            [batch.index for batch in Batches(split, 8, seed=seed).epoch(epoch)]
        ).tolist()
        for seed, epoch in itertools.product((0, 1, 2**63 + 1), (0, 1, 2))
    }
    assert len({tuple(order) for order in orders.values()}) == 9
    again = Batches(split, 8, seed=1, prefetch=0)
    list(again.epoch(0))
    assert torch.cat([batch.index for batch in again.epoch(2)]).tolist() == orders[1, 2]


def test_order_stays_what_it_was(tmp_path: Path) -> None:
    """A checkpoint names its place by batch number alone: another order would repeat and skip
    documents.
    """
    split = documents(tmp_path, rows=12)
    assert [
        batch.index.tolist() for batch in Batches(split, 4, seed=5, bucket_window=2).epoch(1)
    ] == [[7, 9, 5, 10], [3, 6, 4, 1], [11, 8, 0, 2]]


def test_random_state_is_left_alone(tmp_path: Path) -> None:
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index, union-attr]
    list(Batches(documents(tmp_path), 8).epoch(0))
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), torch_before)


@pytest.mark.parametrize("shuffle", [True, False])
def test_resume_gives_the_tail(tmp_path: Path, shuffle: bool) -> None:
    split = documents(tmp_path)
    whole = list(Batches(split, 10, seed=4, shuffle=shuffle, bucket_window=2).epoch(7))
    for start in (0, 1, 6, 10, 11):
        tail = list(
            Batches(split, 10, seed=4, shuffle=shuffle, bucket_window=2).epoch(7, start=start)
        )
        assert len(tail) == len(whole) - start
        assert all(same(left, right) for left, right in zip(tail, whole[start:], strict=True))


def test_like_lengths_share_a_batch(tmp_path: Path) -> None:
    split = documents(tmp_path, rows=2000)

    def padding(window: int) -> float:
        found = list(Batches(split, 20, bucket_window=window, pad_to_multiple=1).epoch(0))
        return 1 - sum(int(b.attention_mask.sum()) for b in found) / sum(
            b.attention_mask.numel() for b in found
        )

    assert padding(50) < 0.05
    assert padding(1) > 0.3
    widths = [batch.input_ids.shape[1] for batch in Batches(split, 20, bucket_window=100).epoch(0)]
    assert abs(np.corrcoef(widths, np.arange(len(widths)))[0, 1]) < 0.3, (
        "short and long batches must alternate"
    )


def test_windows_mix_documents_between_epochs(tmp_path: Path) -> None:
    batches = Batches(documents(tmp_path, rows=600), 20)
    company = [
        {tuple(sorted(batch.index.tolist())) for batch in batches.epoch(epoch)}
        for epoch in range(2)
    ]
    assert not company[0] & company[1]


def test_evaluation_order(tmp_path: Path) -> None:
    split = documents(tmp_path)
    found = torch.cat(
        [batch.index for batch in Batches(split, 10, shuffle=False, seed=3).epoch(5)]
    ).tolist()
    lengths = split.tokens.lengths
    assert found == sorted(range(103), key=lambda number: (-lengths[number], number))


def test_drop_last_drops_documents_at_random(tmp_path: Path) -> None:
    split = documents(tmp_path)
    batches = Batches(split, 10, drop_last=True)
    dropped = []
    for epoch in range(30):
        found = list(batches.epoch(epoch))
        assert [len(batch) for batch in found] == [10] * 10 and len(batches) == 10
        dropped += sorted(
            set(range(103)) - set(torch.cat([batch.index for batch in found]).tolist())
        )
    assert len(dropped) == 90
    assert 12 < split.tokens.lengths[dropped].mean() < 28, "neither the shortest nor the longest"


def test_options(tmp_path: Path) -> None:
    split = documents(tmp_path)
    batches = list(Batches(split, 3, pad_id=499, pad_to_multiple=16).epoch(0))
    assert {batch.input_ids.shape[1] for batch in batches} == {16, 32, 40}, (
        "multiples, and the 40 tokens of a text at most"
    )
    assert all((batch.input_ids[batch.attention_mask == 0] == 499).all() for batch in batches)
    batch = next(Batches(split, 10).epoch(0))
    moved = batch.to("meta")
    assert moved.index.is_meta
    assert moved.input_ids.is_meta
    assert moved.labels == 31
    assert len(moved) == 10
