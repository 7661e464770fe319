"""Renee's token maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xmlkernels.data.formats import open_token_maps
from xmlkernels.data.tokens import (
    TokenStore,
    from_padded_map,
)
from xmlkernels.errors import InputError


def padded(tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([[2, 4, 3, 0], [2, 3, 0, 0], [2, 9, 9, 3]], np.int64)
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], np.int64)
    ids.tofile(tmp_path / "trn_doc_input_ids.dat")
    mask.tofile(tmp_path / "trn_doc_attention_mask.dat")
    return ids, mask


def convert(tmp_path: Path, height: int, width: int, **options: object) -> TokenStore:
    ids, mask = open_token_maps(tmp_path / "trn_doc", rows=height, max_length=width)
    facts = {"vocab_size": 10, "tokenizer_hash": "h", "pad_id": 0} | options
    return from_padded_map(tmp_path / "tokens.bin", ids, mask, **facts)  # type: ignore[arg-type]


def test_upstream_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    padded(tmp_path)
    monkeypatch.setattr("xmlkernels.data.formats.token_maps.PADDED_ROWS_AT_ONCE", 2)
    store = convert(tmp_path, 3, 4)
    assert [row.tolist() for row in store] == [[2, 4, 3], [2, 3], [2, 9, 9, 3]]
    assert store.header.max_length == 4
    assert [row.tolist() for row in convert(tmp_path, 3, 4, rows=np.array([2, 0]))] == [
        [2, 9, 9, 3],
        [2, 4, 3],
    ]


@pytest.mark.parametrize(("rows", "width", "row"), [(6, 2, 3), (2, 6, 0), (1, 12, 0)])
def test_upstream_maps_read_with_a_wrong_width(
    tmp_path: Path, rows: int, width: int, row: int
) -> None:
    padded(tmp_path)
    with pytest.raises(
        InputError, match=f"row {row}: .*ones followed by zeros.*max length {width}"
    ):
        convert(tmp_path, rows, width)
    assert not (tmp_path / "tokens.bin").exists()


def test_upstream_maps_of_another_tokenizer(tmp_path: Path) -> None:
    padded(tmp_path)
    with pytest.raises(InputError, match="row 2: expected token ids below 9.*got 9"):
        convert(tmp_path, 3, 4, vocab_size=9)
    ids, mask = padded(tmp_path)
    with pytest.raises(InputError, match="one shape"):
        from_padded_map(tmp_path / "t", ids, mask[:2], vocab_size=10, tokenizer_hash="h", pad_id=0)
