"""Order, contents and thread of the batches."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse import random as sparse_random

from xmlkernels.data.batches.prefetch import in_background
from xmlkernels.data.batches.tokens import Batch, Batches, text_batches
from xmlkernels.data.tokens import Tokenizer, TokenStore, TokenWriter
from xmlkernels.errors import InputError


@dataclass
class Documents:
    tokens: TokenStore
    labels: csr_matrix


def store(path: Path, rows: int, seed: int = 0, tokenizer_hash: str = "h") -> TokenStore:
    random = np.random.default_rng(seed)
    facts = {"tokenizer_hash": tokenizer_hash, "max_length": 40, "pad_id": 7}
    with TokenWriter(path, rows, vocab_size=500, **facts) as writer:
        writer.append([random.integers(8, 500, random.integers(2, 40)) for _ in range(rows)])
    return TokenStore.open(path)


def documents(tmp_path: Path, rows: int = 103, labels: int = 31) -> Documents:
    matrix = sparse_random(rows, labels, 0.1, "csr", rng=np.random.default_rng(1), dtype=np.float32)
    return Documents(store(tmp_path / "tokens.bin", rows), csr_matrix(matrix))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "xmlkernels-batches"]


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


def test_stored_zeros_and_duplicates_are_no_positives(tmp_path: Path) -> None:
    tokens = store(tmp_path / "tokens.bin", 2)
    labels = csr_matrix(
        (np.array([1, 0, 1, 1], np.float32), np.array([4, 2, 4, 0]), np.array([0, 3, 4])),
        shape=(2, 5),
    )
    batch = Batches(Documents(tokens, labels), 2).collate(np.array([0, 1]))
    assert list(zip(batch.pos_row.tolist(), batch.pos_sample.tolist(), strict=True)) == [
        (0, 1),
        (4, 0),
    ]
    assert labels.nnz == 4, "the caller's matrix is not changed"


def test_documents_without_labels(tmp_path: Path) -> None:
    split = Documents(store(tmp_path / "tokens.bin", 3), csr_matrix((3, 5), dtype=np.float32))
    batch = Batches(split, 3).collate(np.arange(3))
    assert batch.pos_row.shape == (0,)
    assert batch.pos_row.dtype == torch.int64
    assert batch.pos_sample.dtype == torch.int32


def test_large_label_numbers(tmp_path: Path) -> None:
    labels = csr_matrix(
        ([1.0] * 3, [119_999_999, 3, 119_999_999], [0, 1, 3]),
        shape=(2, 120_000_000),
        dtype=np.float32,
    )
    batch = Batches(Documents(store(tmp_path / "tokens.bin", 2), labels), 2).collate(
        np.array([1, 0] * 2048)
    )
    assert batch.pos_row.tolist() == [3] * 2048 + [119_999_999] * 4096
    assert batch.pos_sample.tolist() == [*range(0, 4096, 2), *range(4096)]


def test_no_documents(tmp_path: Path) -> None:
    split = Documents(store(tmp_path / "tokens.bin", 0), csr_matrix((0, 5), dtype=np.float32))
    assert list(Batches(split, 3).epoch(0)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"bucket_window": 0}, "bucket_window"),
        ({"prefetch": -1}, "prefetch"),
        ({"pad_to_multiple": 0}, "pad_to_multiple"),
        ({"seed": -1}, "seed"),
    ],
)
def test_sizes_out_of_range(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Batches(documents(tmp_path), **({"batch_size": 4} | options))  # type: ignore[arg-type]


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    split = documents(tmp_path)
    with pytest.raises(InputError, match=r"tokens.bin: expected 102 rows.* got 103"):
        Batches(Documents(split.tokens, split.labels[:102]), 4)
    with pytest.raises(InputError, match=r"l.bin: expected 31 rows.* got 30"):
        Batches(split, 4, label_tokens=store(tmp_path / "l.bin", 30))
    with pytest.raises(InputError, match="tokenizer"):
        Batches(split, 4, label_tokens=store(tmp_path / "other.bin", 31, tokenizer_hash="g"))
    for epoch, start in ((-1, 0), (0, -1), (0, 27)):
        with pytest.raises(InputError, match="epoch|start"):
            Batches(split, 4).epoch(epoch, start)


def test_closing_ends_the_thread(tmp_path: Path) -> None:
    batches = Batches(documents(tmp_path), 2)
    stream = batches.epoch(0)
    assert threads() == [], "no thread before the first batch is asked for"
    next(stream)
    assert len(threads()) == 1 and threads()[0].daemon
    stream.close()  # type: ignore[attr-defined]
    assert threads() == []
    for batch in batches.epoch(0):
        assert len(batch) == 2
        break
    del batch
    gc.collect()
    assert threads() == []


def test_never_more_ahead_than_asked() -> None:
    made = itertools.count()
    stream = in_background(lambda: (next(made) for _ in range(100)), 3)
    assert next(stream) == 0
    time.sleep(0.2)
    # One in the consumer's hands and three ahead of it.
    assert next(made) == 4
    stream.close()  # type: ignore[attr-defined]
    assert threads() == []


def test_works_while_the_consumer_works() -> None:
    def slow() -> Iterator[int]:
        for number in range(8):
            time.sleep(0.05)
            yield number

    begin = time.perf_counter()
    for _ in in_background(slow, 1):
        time.sleep(0.05)
    assert time.perf_counter() - begin < 0.7, "8 x 0.1 s one after the other"


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_reach_the_consumer(
    tmp_path: Path, prefetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches(documents(tmp_path), 10, prefetch=prefetch)
    whole, count = batches.collate, itertools.count()

    def fail(rows: np.ndarray) -> Batch:
        if next(count) == 3:
            raise OSError("the disk went away")
        return whole(rows)

    monkeypatch.setattr(batches, "collate", fail)
    stream = batches.epoch(0)
    assert [len(next(stream)) for _ in range(3)] == [10] * 3
    with pytest.raises(OSError, match="disk went away"):
        next(stream)
    assert threads() == []


def test_texts_in_order(tokenizer: Tokenizer) -> None:
    texts = [" ".join(["w1"] * (number % 7)) for number in range(23)]
    found = list(text_batches((text for text in texts), tokenizer, 6, 5))
    assert [len(batch) for batch in found] == [5, 5, 5, 5, 3]
    assert torch.cat([batch.index for batch in found]).tolist() == list(range(23))
    for batch in found:
        assert batch.input_ids.shape[1] == 6, "a multiple of 8, but no more than a text may have"
        assert batch.labels == 0
        assert batch.pos_row.numel() == 0
        assert batch.pos_sample.dtype == torch.int32
        for place, number in enumerate(batch.index.tolist()):
            expected = tokenizer.encode_batch([texts[number]], 6)[0].tolist()
            assert batch.input_ids[place][batch.attention_mask[place] == 1].tolist() == expected
    assert list(text_batches([], tokenizer, 6, 5)) == [] and threads() == []


def test_texts_longest_first_in_a_window(tokenizer: Tokenizer) -> None:
    texts = [" ".join(["w1"] * (number % 7)) for number in range(23)]
    found = list(text_batches(texts, tokenizer, 9, 5, bucket_window=2))
    assert {batch.input_ids.shape[1] for batch in found} == {8}
    assert sorted(torch.cat([batch.index for batch in found]).tolist()) == list(range(23))
    assert [batch.index.tolist() for batch in found[:2]] == [[6, 5, 4, 3, 2], [9, 1, 8, 0, 7]]
    assert all(set(batch.index.tolist()) <= set(range(10, 20)) for batch in found[2:4])


def test_texts_are_read_as_they_are_used(tokenizer: Tokenizer) -> None:
    read = itertools.count()
    stream = text_batches(
        (f"w{next(read)}" for _ in itertools.count()), tokenizer, 6, 5, prefetch=2
    )
    assert next(stream).index.tolist() == [0, 1, 2, 3, 4]
    time.sleep(0.1)
    stream.close()  # type: ignore[attr-defined]
    assert next(read) <= 25 and threads() == []


def test_texts_that_are_none(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="one string"):
        text_batches("w1", tokenizer, 6, 5)
    with pytest.raises(InputError, match="text 6: expected a string, got int"):
        list(text_batches(["w1"] * 6 + [3], tokenizer, 6, 5))  # type: ignore[list-item]
    with pytest.raises(InputError, match="batch_size"):
        text_batches(["w1"], tokenizer, 6, 0)
    with pytest.raises(InputError, match="--max-length"):
        list(text_batches(["w1"], tokenizer, 1, 5))
    assert threads() == []


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_file_that_is_cut_while_an_epoch_reads_it_ends_in_a_sentence(
    tmp_path: Path, prefetch: int
) -> None:
    split = documents(tmp_path, rows=2000)
    batches = Batches(split, 8, prefetch=prefetch).epoch(0)
    next(batches)
    with open(tmp_path / "tokens.bin", "r+b") as file:
        file.truncate(1500)
    message = (
        r"tokens.bin: expected the \d+ bytes that were there when it was opened, got 1500 bytes"
    )
    with pytest.raises(InputError, match=message):
        list(batches)
