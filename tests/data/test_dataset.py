"""The dataset folder: what is written comes back, and nothing damaged is opened."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from xmlkernels.data.dataset import Dataset
from xmlkernels.data.dataset_writer import write_label_names, write_split
from xmlkernels.data.manifest import content_hash, manifest_checksum, write_manifest
from xmlkernels.data.tokens import Tokenizer, TokenWriter, tokenize_to_file
from xmlkernels.errors import InputError

TEXTS = {"train": ["w1 w2", "", 'quotes " \n and\u2028breaks \ud800'], "test": ["w3 w4 w5"]}
LABELS = {
    "train": csr_matrix(np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], np.float32)),
    "test": csr_matrix(np.array([[0, 0, 1, 1]], np.float32)),
}
PAIRS = {"train": np.zeros((0, 2), np.int64), "test": np.array([[0, 3]])}
NAMES = ["one", "two\nlines", "drei\u2028", ""]


def build(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    optional: bool = True,
    propensity: tuple[float, float] = (0.5, 0.4),
) -> Path:
    folder.mkdir()
    for name, texts in TEXTS.items():
        write_split(folder, name, LABELS[name], PAIRS[name], texts if optional else None)
        tokenize_to_file(texts, folder / name / "tokens.bin", tokenizer, 5)
    if optional:
        write_label_names(folder, NAMES)
        tokenize_to_file(NAMES, folder / "label_tokens.bin", tokenizer, 5)
    tokenizer.save(folder / "tokenizer")
    counts = {
        name: {"documents": len(texts), "positives": LABELS[name].nnz}
        for name, texts in TEXTS.items()
    }
    write_manifest(
        folder,
        name="small",
        key="k",
        num_labels=4,
        propensity=propensity,
        splits=counts,
        source={},
        tokenizer={"name": "tiny", "hash": tokenizer.hash, "max_length": 5},
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return build(tmp_path / "data", tokenizer)


def test_what_was_written_comes_back(folder: Path, tokenizer: Tokenizer) -> None:
    dataset = Dataset.open(folder, verify=True)
    assert (dataset.name, dataset.key, dataset.num_labels, dataset.propensity) == (
        "small",
        "k",
        4,
        (0.5, 0.4),
    )
    assert (dataset.max_length, dataset.tokenizer_hash) == (5, tokenizer.hash)
    assert dataset.label_names == ["one", "two lines", "drei\u2028", ""]
    assert dataset.label_tokens is not None and len(dataset.label_tokens) == 4
    assert list(dataset.splits) == ["train", "test"]
    for name, split in dataset.splits.items():
        assert split.texts == TEXTS[name] and len(split) == len(TEXTS[name]) == len(split.tokens)
        assert (split.labels != LABELS[name]).nnz == 0 and split.labels.dtype == np.float32
        assert split.filter_pairs.tolist() == PAIRS[name].tolist()
        assert split.filter_pairs.dtype == np.int64
    assert (dataset.tokenizer_folder / "tokenizer.json").is_file()


def test_optional_parts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = Dataset.open(build(tmp_path / "data", tokenizer, optional=False))
    assert dataset.label_names is None and dataset.label_tokens is None
    with pytest.raises(InputError, match="--keep-texts"):
        _ = dataset.splits["train"].texts


def test_content_hash_follows_content_alone(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Dataset.open(build(tmp_path / "a", tokenizer)).content_hash
    assert Dataset.open(build(tmp_path / "b", tokenizer)).content_hash == first
    assert (
        Dataset.open(build(tmp_path / "c", tokenizer, propensity=(0.6, 2.6))).content_hash != first
    )
    monkeypatch.setitem(TEXTS, "test", ["w3 w4 w6"])
    assert Dataset.open(build(tmp_path / "d", tokenizer)).content_hash != first


FILES = [
    "train/tokens.bin",
    "train/labels.npz",
    "test/filter.npy",
    "train/texts.jsonl",
    "label_names.txt",
    "label_tokens.bin",
    "tokenizer/tokenizer.json",
]


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found(folder: Path, name: str) -> None:
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(
        InputError, match=f"{path.name}: expected {len(whole)} bytes.*got {len(whole) - 1} bytes"
    ):
        Dataset.open(folder)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="sha256"):
        Dataset.open(folder, verify=True)
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        Dataset.open(folder)


def edit(folder: Path, **changes: object) -> None:
    """Changes keys, None removes them; the manifest's own hashes are made to fit."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest = {key: value for key, value in (manifest | changes).items() if value is not None}
    if "content_hash" not in changes:
        manifest["content_hash"] = content_hash(manifest)
    if "files" in changes:
        manifest["checksums"]["files"] = {}
    if "checksums" in manifest:
        manifest["checksums"]["manifest"] = manifest_checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def old(folder: Path) -> None:
    """The manifest as it was before there were fast checksums."""
    path = folder / "manifest.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "checksums"})
    )


@pytest.mark.parametrize("aged", [False, True])
def test_flipped_bits_are_found_when_it_is_opened(folder: Path, aged: bool) -> None:
    """In every file and in the manifest; of an old dataset not in token files, which would cost a
    sha256 of all of them.
    """
    before = Dataset.open(folder).content_hash
    if aged:
        old(folder)
    assert Dataset.open(folder).content_hash == before
    random, found = np.random.default_rng(0), 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for bit in random.integers(8 * len(whole), size=12):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            if aged and (path.suffix == ".bin" or path.name == "manifest.json"):
                continue
            with pytest.raises(InputError):
                [
                    split.texts
                    for split in Dataset.open(folder).splits.values()
                    if (split.folder / "texts.jsonl").exists()
                ]
            found += 1
        path.write_bytes(whole)
    assert found > 60
    with pytest.raises(InputError, match="content_hash: expected .*that of its files"):
        edit(folder, content_hash="0" * 64)
        Dataset.open(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "expected version 1, got 2"),
        ({"format": "other"}, 'got "other"'),
        ({"key": None}, "expected a key 'key', got none"),
        ({"num_labels": 5}, r"labels.npz: expected 5 columns, got 4"),
        ({"splits": {"train": {"documents": 2}}}, r"labels.npz: expected 2 rows, got 3"),
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
    [
        ([[1, 0]], "inside"),
        ([[0, 4]], "inside"),
        ([[-1, 0]], "inside"),
        ([0, 1], "int64 pairs"),
        ([[0.5, 1]], "int64 pairs"),
    ],
)
def test_filter_pairs_that_do_not_fit(folder: Path, pairs: list, message: str) -> None:
    np.save(folder / "test" / "filter.npy", np.array(pairs))
    edit(folder, files={})
    with pytest.raises(InputError, match=message):
        Dataset.open(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 5}, r"\$.name: expected a text, got 5"),
        ({"num_labels": "4"}, r"\$.num_labels: expected a whole number, got \"4\""),
        ({"num_labels": -4}, r"\$.num_labels: expected a whole number >= 0, got -4"),
        ({"num_labels": True}, r"\$.num_labels: expected a whole number, got true"),
        ({"propensity": [0.5, 0.4]}, r"\$.propensity: expected an object, got a list of 2"),
        ({"propensity": {"A": "x", "B": 1}}, r"\$.propensity.A: expected a number, got \"x\""),
        ({"propensity": {"A": 1}}, r"\$.propensity: expected a key 'B', got none"),
        ({"splits": []}, r"\$.splits: expected an object"),
        ({"splits": {"train": 3}}, r"\$.splits.train: expected an object, got 3"),
        (
            {"splits": {"train": {"documents": 3.5}}},
            r"\$.splits.train.documents: expected a whole number, got 3.5",
        ),
        (
            {"splits": {"../train": {"documents": 3}}},
            r"\$.splits: expected splits among train, val, test, got '../train'",
        ),
        (
            {"files": {"label_names.txt": 5}},
            r"\$.files\[\"label_names.txt\"\]: expected an object, got 5",
        ),
        (
            {"files": {"a": {"bytes": None, "sha256": ""}}},
            r"\$.files.a.bytes: expected a whole number, got null",
        ),
        (
            {"files": {"../other": {"bytes": 1, "sha256": ""}}},
            r"expected names of files inside the folder, got '../other'",
        ),
        (
            {"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}},
            r"expected names of files inside the folder",
        ),
        (
            {"files": {"a/../../b": {"bytes": 1, "sha256": ""}}},
            r"expected names of files inside the folder",
        ),
        (
            {"files": {"C:\\x": {"bytes": 1, "sha256": ""}}},
            r"expected names of files inside the folder",
        ),
        (
            {"files": {"a\0b": {"bytes": 1, "sha256": ""}}},
            r"expected names of files inside the folder",
        ),
        ({"tokenizer": "tiny"}, r"\$.tokenizer: expected an object or null, got \"tiny\""),
        (
            {"tokenizer": {"hash": "h", "max_length": 0}},
            r"\$.tokenizer.max_length: expected a whole number >= 1, got 0",
        ),
        ({"vocabulary": 7}, "expected a tokenizer, or the vocabulary of bags of words, got both"),
        ({"content_hash": 1}, r"\$.content_hash: expected a text"),
    ],
)
def test_manifest_values_of_another_type(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    edit(folder, **changes)
    with pytest.raises(InputError, match=message) as raised:
        Dataset.open(folder)
    assert str(folder / "manifest.json") in str(raised.value)


def test_files_need_what_reads_them(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": None}))
    with pytest.raises(InputError, match=r"\$.tokenizer: expected the tokenizer of .*tokens.bin"):
        Dataset.open(folder)


def relabel(folder: Path, **changes: object) -> None:
    path = folder / "train" / "labels.npz"
    matrix = LABELS["train"]
    parts = {
        "format": b"csr",
        "shape": matrix.shape,
        "data": matrix.data,
        "indices": matrix.indices,
        "indptr": matrix.indptr,
    }
    np.savez(path, **{key: np.asarray(value) for key, value in (parts | changes).items()})  # type: ignore[arg-type]
    edit(folder, files={})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"indices": [0, 3, 4]},
            "indices, entry 2: expected indices from 0 to 3, got 4",
        ),  # made tree and ranker segfault
        (
            {"indices": [0, 3, -5]},
            "indices, entry 2: expected indices from 0 to 3, got -5",
        ),  # ended with 0
        ({"indices": [0, 2**31 - 1, 1]}, "expected indices from 0 to 3"),
        ({"indices": [3, 3, 1]}, "row 0, column 3: expected one entry, got two"),
        ({"indptr": [0, 3, 2, 0]}, "indptr, entry 2: expected at least 3"),
        ({"data": [1, np.nan, 1]}, "expected a finite float32 value, got nan"),
    ],
)
def test_labels_that_lie(folder: Path, changes: dict[str, object], message: str) -> None:
    relabel(folder, **changes)
    with pytest.raises(InputError, match=message):
        Dataset.open(folder)


def test_filter_pairs_whose_header_lies(folder: Path) -> None:
    path = folder / "test" / "filter.npy"
    path.write_bytes(path.read_bytes().replace(b"(1, 2)", b"(9, 2)"))
    edit(folder, files={})
    with pytest.raises(
        InputError,
        match="filter.npy: expected 144 bytes of values, as its header says, got 16 bytes",
    ):
        Dataset.open(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"5", "texts.jsonl:2: expected a text, got 5"),
        (b'"open', "texts.jsonl:2: expected JSON"),
        (b"[" * 10_000, "texts.jsonl:2: expected JSON of at most 100 levels, got more"),
        (b'"\xff"', "texts.jsonl: expected a text in ASCII"),
    ],
)
def test_texts_that_are_none(folder: Path, line: bytes, message: str) -> None:
    path = folder / "train" / "texts.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[1] = line
    path.write_bytes(b"\n".join(lines))
    edit(folder, files={})
    with pytest.raises(InputError, match=message):
        Dataset.open(folder).splits["train"].texts  # noqa: B018


def test_label_names_that_are_no_text(folder: Path) -> None:
    content = b"one\ntwo\n\xff\nfour\n"
    (folder / "label_names.txt").write_bytes(content)
    edit(
        folder,
        files={"label_names.txt": {"bytes": 15, "sha256": hashlib.sha256(content).hexdigest()}},
    )
    with pytest.raises(InputError, match="label_names.txt: expected a text in UTF-8"):
        Dataset.open(folder).label_names  # noqa: B018


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
