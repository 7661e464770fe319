"""Batches of unusual labels and documents, and of sizes out of range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from documents import Documents, documents, store
from xmlkernels.data.batches.tokens import Batches
from xmlkernels.errors import InputError


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
