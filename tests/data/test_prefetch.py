"""The thread that makes batches ahead, and batches of raw texts."""

from __future__ import annotations

import gc
import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from patience import until

from documents import documents, threads
from xmlkernels.data.batches.prefetch import in_background
from xmlkernels.data.batches.tokens import Batch, Batches, text_batches
from xmlkernels.data.tokens import Tokenizer
from xmlkernels.errors import InputError


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
    made: list[int] = []
    stream = in_background(lambda: (made.append(n) or n for n in range(100)), 3)
    assert next(stream) == 0
    # One in the consumer's hands and three ahead of it.
    until(lambda: len(made) == 4)
    time.sleep(0.05)
    assert len(made) == 4
    stream.close()  # type: ignore[attr-defined]
    assert threads() == []


def test_works_while_the_consumer_works() -> None:
    made: list[int] = []
    for number in in_background(lambda: (made.append(n) or n for n in range(8)), 1):
        until(lambda: len(made) == min(number + 2, 8))  # noqa: B023


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
