"""Token files: rows come back; damaged and replaced files are told."""

from __future__ import annotations

import json
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest

from xmlkernels.data.tokens import (
    TokenStore,
    TokenWriter,
)
from xmlkernels.errors import InputError

FACTS = {"tokenizer_hash": "h", "max_length": 8, "pad_id": 0}


def write(path: Path, rows: list[list[int]], vocab_size: int = 1000) -> TokenStore:
    with TokenWriter(path, len(rows), vocab_size=vocab_size, **FACTS) as writer:
        writer.append([np.array(row, np.int64) for row in rows])
    return TokenStore.open(path)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1000, "<u2"), (65_535, "<u2"), (65_536, "<u4"), (250_002, "<u4")]
)
def test_rows_come_back(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    rows = [[2, 3], [], [vocab_size - 1], [5, 4, 999]]
    store = write(tmp_path / "tokens.bin", rows, vocab_size)
    assert [store[i].tolist() for i in range(4)] == rows
    assert store[-1].tolist() == rows[-1]
    assert store[0].dtype == np.dtype(dtype) and store.header.dtype == dtype
    assert store.lengths.dtype == np.int32 and store.lengths.tolist() == [2, 0, 1, 3]
    assert len(store) == 4 and store.header.tokens == 6 and store.header.max_length == 8
    assert store.path.stat().st_size == 1024 + 8 * 5 + 6 * np.dtype(dtype).itemsize
    flat, lengths = store.gather(np.array([3, 1, 0, 3]))
    assert flat.tolist() == [5, 4, 999, 2, 3, 5, 4, 999] and lengths.tolist() == [3, 0, 2, 3]
    with pytest.raises(IndexError):
        store[4]
    store[0][0] = 1  # a copy: the file is read, not mapped
    assert store[0].tolist() == rows[0]


def test_no_rows(tmp_path: Path) -> None:
    store = write(tmp_path / "tokens.bin", [])
    assert len(store) == 0 and store.lengths.tolist() == []


def test_a_process_that_is_sent_one_maps_the_same_file(tmp_path: Path) -> None:
    store = write(tmp_path / "tokens.bin", [[7] * 8] * 600)
    data = ForkingPickler.dumps(store)
    assert len(data) < 1000
    assert ForkingPickler.loads(data).tokens.tolist() == [7] * 4800


@pytest.mark.parametrize("cut", [0, 5, 500, 1024, 1030, 1063, 1064, -1])
def test_cut_short(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "tokens.bin"
    write(path, [[1, 2], [3], [4, 5, 6], [7]])
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    with pytest.raises(InputError) as caught:
        TokenStore.open(path)
    assert "tokens.bin" in str(caught.value)
    if cut >= 1024 or cut == -1:
        assert f"{len(whole)} bytes" in str(caught.value)
        assert f"got {len(whole[:cut])} bytes" in str(caught.value)


def test_too_long_file(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    write(path, [[1, 2]])
    path.write_bytes(path.read_bytes() + b"xx")
    with pytest.raises(InputError, match="expected 1044 bytes, as its header says, got 1046 bytes"):
        TokenStore.open(path)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"\x93NUMPY\x01\x00", "starts with"),
        (8, b"\x02", "version 2"),
        (16, b"?", "header: expected JSON"),
        (1024, b"\x01", "offsets"),
        (1032, b"\x09", "offsets"),
    ],
)
def test_damaged_header(tmp_path: Path, at: int, value: bytes, message: str) -> None:
    path = tmp_path / "tokens.bin"
    write(path, [[1, 2], [3]])
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        TokenStore.open(path)


def test_header_with_a_false_dtype(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    write(path, [[1, 2]])
    data = path.read_bytes()
    header = json.loads(data[16:1024])
    text = json.dumps(header | {"dtype": "<u4", "tokens": 1}).encode()
    path.write_bytes(
        data[:12] + np.array([len(text)], "<u4").tobytes() + text.ljust(1008) + data[1024:]
    )
    with pytest.raises(InputError, match="consistent header"):
        TokenStore.open(path)


def damage_header(path: Path, **changes: object) -> None:
    data = path.read_bytes()
    text = json.dumps(
        {k: v for k, v in (json.loads(data[16:1024]) | changes).items() if v is not None}
    ).encode()
    path.write_bytes(
        data[:12] + np.array([len(text)], "<u4").tobytes() + text.ljust(1008) + data[1024:]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": "2"}, r"header, \$.rows: expected a whole number, got \"2\""),
        ({"rows": -1}, r"header, \$.rows: expected a whole number >= 0, got -1"),
        ({"tokens": 1.0}, r"header, \$.tokens: expected a whole number, got 1.0"),
        ({"rows": 10**15}, "bytes, as its header says"),
        ({"rows": 2**63}, r"header, \$.rows: expected a whole number <="),
        ({"vocab_size": 0}, r"header, \$.vocab_size: expected a whole number >= 1, got 0"),
        ({"vocab_size": 3}, "expected token ids below 3, the size of the vocabulary, got 3"),
        ({"pad_id": 1000}, "consistent header"),
        ({"max_length": 1}, "row 0: expected at most 1 tokens, as its header says, got 2"),
        ({"tokenizer_hash": 7}, r"header, \$.tokenizer_hash: expected a text"),
        ({"dtype": ["<u2"]}, r"header, \$.dtype: expected a text"),
        ({"pad_id": None}, "header: expected a key 'pad_id', got none"),
    ],
)
def test_headers_that_lie(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "tokens.bin"
    write(path, [[1, 2], [3]])
    damage_header(path, **changes)
    with pytest.raises(InputError, match=message) as raised:
        TokenStore.open(path)
    assert str(path) in str(raised.value)


def test_ids_beyond_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokens.bin"
    write(path, [[1, 2], [3], [4]])
    data = bytearray(path.read_bytes())
    data[-4:-2] = (1000).to_bytes(2, "little")  # of the second row; the vocabulary has 1000 entries
    path.write_bytes(data)
    with pytest.raises(
        InputError, match="expected token ids below 1000, the size of the vocabulary, got 1000"
    ):
        TokenStore.open(path)
    # A large file: looked at as it is handed out.
    monkeypatch.setattr("xmlkernels.data.token_store.SCAN_BYTES", 4)
    store = TokenStore.open(path)
    assert store[0].tolist() == [1, 2] and store.gather(np.array([2, 0]))[0].tolist() == [4, 1, 2]
    for ask in (lambda: store[1], lambda: store.gather(np.array([0, 1])), lambda: store.tokens):
        with pytest.raises(InputError, match="expected token ids below 1000"):
            ask()


@pytest.mark.parametrize("change", ["cut", "grow", "write"])
def test_a_file_that_changes_while_it_is_mapped(tmp_path: Path, change: str) -> None:
    path = tmp_path / "tokens.bin"
    # More than a page, so that reading a cut map would be SIGBUS.
    store = write(path, [[1, 2]] * 5000)
    assert store.gather(np.array([4999]))[0].tolist() == [1, 2]
    with open(path, "r+b") as file:
        if change == "write":
            file.seek(1024)
            file.write(b"\xff" * 64)
        else:
            file.truncate(2000 if change == "cut" else 80_000)
    for ask in (lambda: store.gather(np.array([4999])), lambda: store[4999], lambda: store.tokens):
        with pytest.raises(
            InputError,
            match=r"tokens.bin: expected the 61032 bytes that were there when it was opened",
        ):
            ask()


def test_a_file_that_is_replaced_while_it_is_mapped_is_still_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    store = write(path, [[1, 2]] * 5000)
    write(path, [[3]])  # written beside it and renamed, as every writer of ours does
    assert store.gather(np.array([4999]))[0].tolist() == [1, 2]
    assert TokenStore.open(path)[0].tolist() == [3]


def test_a_store_closes_its_file(tmp_path: Path) -> None:
    open_files = Path("/proc/self/fd")
    if not open_files.is_dir():
        pytest.skip("no /proc here")
    write(tmp_path / "tokens.bin", [[1, 2]])
    before = len(list(open_files.iterdir()))
    for _ in range(5):
        assert TokenStore.open(tmp_path / "tokens.bin")[0].tolist() == [1, 2]
    assert len(list(open_files.iterdir())) == before


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        TokenStore.open(tmp_path / "none.bin")


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    write(path, [[1, 2]])
    with pytest.raises(ValueError, match="vocabulary"):
        write(path, [[1], [1000]])
    with (
        pytest.raises(ValueError, match="announced"),
        TokenWriter(path, 3, vocab_size=9, **FACTS) as writer,
    ):
        writer.append([np.array([1])])
    with (
        pytest.raises(ValueError, match="more rows"),
        TokenWriter(path, 0, vocab_size=9, **FACTS) as writer,
    ):
        writer.append([np.array([1])])
    assert TokenStore.open(path)[0].tolist() == [1, 2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokens.bin"]
