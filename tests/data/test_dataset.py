"""The dataset folder: what is written comes back, and nothing damaged is opened."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from xmlkernels.data.dataset import Dataset
from xmlkernels.data.dataset_writer import write_label_names, write_manifest, write_split
from xmlkernels.data.tokens import Tokenizer, TokenWriter, tokenize_to_file
from xmlkernels.errors import InputError

TEXTS = {"train": ["w1 w2", "", 'quotes " \n and\u2028breaks \ud800'], "test": ["w3 w4 w5"]}
LABELS = {
    "train": csr_matrix(np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], np.float32)),
    "test": csr_matrix(np.array([[0, 0, 1, 1]], np.float32)),
}
PAIRS = {"train": np.zeros((0, 2), np.int64), "test": np.array([[0, 3]])}
NAMES = ["one", "two\nlines", "drei\u2028", ""]


def build(folder: Path, tokenizer: Tokenizer, *, optional: bool = True, propensity: tuple[float, float] = (0.5, 0.4)) -> Path:
    folder.mkdir()
    for name, texts in TEXTS.items():
        write_split(folder, name, LABELS[name], PAIRS[name], texts if optional else None)
        tokenize_to_file(texts, folder / name / "tokens.bin", tokenizer, 5)
    if optional:
        write_label_names(folder, NAMES)
        tokenize_to_file(NAMES, folder / "label_tokens.bin", tokenizer, 5)
    tokenizer.save(folder / "tokenizer")
    counts = {name: {"documents": len(texts), "positives": LABELS[name].nnz} for name, texts in TEXTS.items()}
    write_manifest(
        folder, name="small", key="k", num_labels=4, propensity=propensity, splits=counts, source={},
        tokenizer={"name": "tiny", "hash": tokenizer.hash, "max_length": 5},
    )  # fmt: skip
    return folder


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return build(tmp_path / "data", tokenizer)


def test_what_was_written_comes_back(folder: Path, tokenizer: Tokenizer) -> None:
    dataset = Dataset.open(folder, verify=True)
    assert (dataset.name, dataset.key, dataset.num_labels, dataset.propensity) == ("small", "k", 4, (0.5, 0.4))
    assert (dataset.max_length, dataset.tokenizer_hash) == (5, tokenizer.hash)
    assert dataset.label_names == ["one", "two lines", "drei\u2028", ""]
    assert dataset.label_tokens is not None and len(dataset.label_tokens) == 4
    assert list(dataset.splits) == ["train", "test"]
    for name, split in dataset.splits.items():
        assert split.texts == TEXTS[name] and len(split) == len(TEXTS[name]) == len(split.tokens)
        assert (split.labels != LABELS[name]).nnz == 0 and split.labels.dtype == np.float32
        assert split.filter_pairs.tolist() == PAIRS[name].tolist() and split.filter_pairs.dtype == np.int64
    assert (dataset.tokenizer_folder / "tokenizer.json").is_file()


def test_optional_parts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = Dataset.open(build(tmp_path / "data", tokenizer, optional=False))
    assert dataset.label_names is None and dataset.label_tokens is None
    with pytest.raises(InputError, match="--keep-texts"):
        _ = dataset.splits["train"].texts


def test_content_hash_follows_content_alone(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Dataset.open(build(tmp_path / "a", tokenizer)).content_hash
    assert Dataset.open(build(tmp_path / "b", tokenizer)).content_hash == first
    assert Dataset.open(build(tmp_path / "c", tokenizer, propensity=(0.6, 2.6))).content_hash != first
    monkeypatch.setitem(TEXTS, "test", ["w3 w4 w6"])
    assert Dataset.open(build(tmp_path / "d", tokenizer)).content_hash != first


FILES = ["train/tokens.bin", "train/labels.npz", "test/filter.npy", "train/texts.jsonl", "label_names.txt",
         "label_tokens.bin", "tokenizer/tokenizer.json"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found(folder: Path, name: str) -> None:
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=f"{path.name}: expected {len(whole)} bytes.*got {len(whole) - 1} bytes"):
        Dataset.open(folder)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="sha256"):
        Dataset.open(folder, verify=True)
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        Dataset.open(folder)


def edit(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in (manifest | changes).items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 1, got xmlkernels-dataset 2"),
        ({"format": "other"}, "got other 1"),
        ({"key": None}, "none named key"),
        ({"num_labels": 5}, r"shape \(3, 5\), got \(3, 4\)"),
        ({"splits": {"train": {"documents": 2}}}, r"shape \(2, 4\)"),
        ({"tokenizer": {"hash": "x", "max_length": 5}}, "tokens of another"),
    ],
)
def test_manifest_that_does_not_fit(folder: Path, changes: dict[str, object], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(InputError, match=message):
        Dataset.open(folder)


def test_rows_that_do_not_fit(folder: Path, tokenizer: Tokenizer) -> None:
    path, facts = folder / "train" / "tokens.bin", {"vocab_size": 204, "max_length": 5, "pad_id": 0}
    with TokenWriter(path, 2, tokenizer_hash=tokenizer.hash, **facts) as writer:  # type: ignore[arg-type]
        writer.append([np.array([2, 3]), np.array([2, 3])])
    edit(folder, files={})
    with pytest.raises(InputError, match="tokens.bin: expected 3 rows, got 2"):
        Dataset.open(folder)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [([[1, 0]], "inside"), ([[0, 4]], "inside"), ([[-1, 0]], "inside"), ([0, 1], "int64 pairs"), ([[0.5, 1]], "int64 pairs")],
)
def test_filter_pairs_that_do_not_fit(folder: Path, pairs: list, message: str) -> None:
    np.save(folder / "test" / "filter.npy", np.array(pairs))
    edit(folder, files={})
    with pytest.raises(InputError, match=message):
        Dataset.open(folder)


def test_no_dataset(tmp_path: Path, folder: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="dataset folder with manifest.json"):
            Dataset.open(path)
    (folder / "manifest.json").write_text('{"format":')
    with pytest.raises(InputError, match="manifest.json: expected JSON"):
        Dataset.open(folder)
    (folder / "manifest.json").write_text("[1]")
    with pytest.raises(InputError, match="expected format"):
        Dataset.open(folder)


def test_labels_file_that_is_none(folder: Path) -> None:
    (folder / "train" / "labels.npz").write_bytes(b"PK\x03\x04")
    edit(folder, files={})
    with pytest.raises(InputError, match="labels.npz"):
        Dataset.open(folder)
