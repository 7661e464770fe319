"""Datasets, and the raw files that they are prepared from."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import scipy.sparse
from harness import Kind
from scipy.sparse import csr_matrix

from xmlkernels.checksums import checksum
from xmlkernels.data import formats
from xmlkernels.data.batches.bags import BagBatches
from xmlkernels.data.batches.tokens import Batches
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.dataset_writer import write_label_names, write_split
from xmlkernels.data.formats.arrays import read_npy
from xmlkernels.data.formats.token_maps import from_padded_map, token_rows
from xmlkernels.data.manifest import content_hash, manifest_checksum, write_manifest
from xmlkernels.data.text_parts import TextParts
from xmlkernels.data.tokens import load_tokenizer, tokenize_to_file
from xmlkernels.files import replacing
from xmlkernels.nn.encoder import Encoder  # noqa: F401  # imported before the first fork

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from tiny_tokenizer import make_tokenizer
from xmlkernels.cli.texts import Texts
from xmlkernels.training.folder import read_json, write_json

ROWS = {"train": 12, "val": 3, "test": 5}
LABELS, WORDS, LONGEST = 9, 30, 8


def draw(rows: int, columns: int, each: int, seed: int) -> csr_matrix:
    """Draw a canonical float32 matrix with up to `each` entries per row."""
    random = np.random.default_rng(seed)
    dense = np.zeros((rows, columns), np.float32)
    for row in dense:
        row[random.choice(columns, random.integers(1, each + 1), replace=False)] = 1
    return csr_matrix(dense)


def assert_canonical(matrix: csr_matrix) -> None:
    """Assert what every user of a matrix relies on."""
    assert matrix.dtype == np.float32 and len(matrix.indptr) == matrix.shape[0] + 1
    assert matrix.indptr[0] == 0 and matrix.indptr[-1] == len(matrix.indices) == len(matrix.data)
    assert (np.diff(matrix.indptr) >= 0).all() and np.isfinite(matrix.data).all()
    if matrix.nnz:
        assert matrix.indices.min() >= 0 and matrix.indices.max() < matrix.shape[1]
    for row in range(min(matrix.shape[0], 1000)):
        assert (np.diff(matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]]) > 0).all()


def _write_splits(folder: Path) -> dict[str, dict[str, int]]:
    texts = {name: [f"w{i} w{i + 1} w{2 * i}" for i in range(rows)] for name, rows in ROWS.items()}
    for seed, name in enumerate(ROWS):
        pairs = np.array([[0, 1], [2, 3]]) if name != "train" else np.zeros((0, 2), np.int64)
        write_split(folder, name, draw(ROWS[name], LABELS, 3, seed), pairs, texts[name])
    write_label_names(folder, [f"label {i}" for i in range(LABELS)])
    return {name: {"documents": rows} for name, rows in ROWS.items()}


def make_tokens(folder: Path) -> None:
    make_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    counts = _write_splits(folder)
    for name, rows in ROWS.items():
        tokenize_to_file(
            [f"w{i} w{i + 1} w{2 * i}" for i in range(rows)],
            folder / name / "tokens.bin",
            tokenizer,
            LONGEST,
        )
    tokenize_to_file(
        [f"w{i}" for i in range(LABELS)], folder / "label_tokens.bin", tokenizer, LONGEST
    )
    facts = {"name": "tiny", "hash": tokenizer.hash, "max_length": LONGEST}
    write_manifest(
        folder,
        name="d",
        key="k",
        num_labels=LABELS,
        propensity=(0.5, 0.4),
        splits=counts,
        source={},
        tokenizer=facts,
    )


def make_bags(folder: Path) -> None:
    counts = _write_splits(folder)
    for seed, (name, rows) in enumerate(ROWS.items()):
        formats.write_npz(folder / name / "features.npz", draw(rows, WORDS, 6, seed))
    formats.write_npz(folder / "label_features.npz", draw(LABELS, WORDS, 3, 9))
    write_manifest(
        folder,
        name="d",
        key="k",
        num_labels=LABELS,
        propensity=(0.5, 0.4),
        splits=counts,
        source={},
        tokenizer=None,
        vocabulary=WORDS,
    )


def reseal_manifest(folder: Path) -> None:
    """Renew sizes and checksums in the manifest."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        for name, facts in manifest["files"].items():
            content = (folder / name).read_bytes()
            facts |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            manifest["checksums"]["files"][name] = checksum(content)
        manifest["content_hash"] = content_hash(manifest)
        manifest["checksums"]["manifest"] = manifest_checksum(manifest)
        path.write_text(json.dumps(manifest))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError):
        return  # the manifest itself is what was damaged


def consume_dataset(folder: Path) -> None:
    dataset = Dataset.open(folder)
    assert dataset.label_names is None or len(dataset.label_names) == dataset.num_labels
    assert all(np.isfinite(dataset.propensity))
    for split in dataset.splits.values():
        assert_canonical(split.labels)
        assert len(split.texts) == len(split) and all(isinstance(text, str) for text in split.texts)
        if dataset.vocabulary is None:
            for batch in Batches(split, 4, label_tokens=dataset.label_tokens, prefetch=0).epoch(0):
                assert batch.input_ids.min() >= 0
                assert batch.input_ids.max() < split.tokens.header.vocab_size
                assert batch.input_ids.shape[1] <= max(8, split.tokens.header.max_length)
        else:
            assert_canonical(split.features)
            more = {"label_features": dataset.label_features, "prefetch": 0}
            for bags in BagBatches(split.features, split.labels, 4, **more).epoch(0):
                assert bags.token.numel() == 0 or (
                    bags.token.min() >= 0 and bags.token.max() < dataset.vocabulary
                )
                assert bags.token_weight.isfinite().all()


def make_matrices(folder: Path) -> None:
    for layout in ("csr", "csc", "coo", "bsr", "dia"):
        scipy.sparse.save_npz(
            folder / f"{layout}.npz", draw(8, 6, 3, 1).asformat(layout), compressed=layout != "coo"
        )


def consume_matrices(folder: Path) -> None:
    for path in sorted(folder.glob("*")):
        matrix = formats.read_npz(path, keep_zeros=True)
        assert_canonical(matrix)
        assert matrix.shape[0] <= 10**7


def make_text(folder: Path) -> None:
    features, labels = draw(20, WORDS, 5, 2), draw(20, LABELS, 3, 3)
    formats.write_sparse(folder / "X.txt", features)
    formats.write_sparse(folder / "Y.txt.gz", labels)
    rows = [np.flatnonzero(row).tolist() for row in labels.toarray()]
    formats.write_lines(folder / "lines.txt", [",".join(map(str, row)) for row in rows])
    formats.write_lines(
        folder / "bow.txt", ["20 30 9", *(f"{','.join(map(str, row))} 3:1.5 7:2" for row in rows)]
    )
    formats.write_filter_pairs(folder / "filter.txt", np.array([[0, 1], [3, 2], [19, 8]]))
    formats.write_lines(folder / "texts.txt.gz", [f"text {i} ä" for i in range(20)])


def consume_text(folder: Path) -> None:
    assert_canonical(formats.read_sparse(folder / "X.txt", cols=WORDS))
    assert_canonical(formats.read_labels(folder / "Y.txt.gz", 20, LABELS))
    assert_canonical(formats.read_labels(folder / "lines.txt", 20, LABELS))
    for matrix in formats.read_bow(folder / "bow.txt"):
        assert_canonical(matrix)
    pairs = formats.read_filter_pairs(folder / "filter.txt", rows=20, labels=LABELS)
    assert pairs.shape[1] == 2
    assert not pairs.size or (pairs.min() >= 0 and pairs[:, 1].max() < LABELS)
    assert all("\n" not in text for text in formats.iter_lines(folder / "texts.txt.gz"))


def make_json(folder: Path) -> None:
    with replacing(folder / "trn.json.gz") as file:
        for i in range(12):
            record = {
                "uid": f"u{i}",
                "title": f"title {i}",
                "content": "ä b",
                "target_ind": [i % 9],
                "target_rel": [1.0],
            }
            file.write((json.dumps(record) + "\n").encode())
    formats.write_lines(
        folder / "lbl.json", [json.dumps({"uid": str(i), "title": f"l{i}"}) for i in range(LABELS)]
    )


def consume_json(folder: Path) -> None:
    records = formats.read_lf_json(folder / "trn.json.gz", num_labels=LABELS)
    assert_canonical(records.labels)
    assert len(records.texts()) == records.labels.shape[0]
    assert len(formats.read_lf_json(folder / "lbl.json").title) == formats.count_lf_records(
        folder / "lbl.json"
    )


def make_vectors(folder: Path) -> None:
    np.save(
        folder / "vectors.npy", np.random.default_rng(0).standard_normal((LABELS, 4), np.float32)
    )


def consume_vectors(folder: Path) -> None:
    mend = "write them again"
    vectors = read_npy(
        folder / "vectors.npy",
        kinds="f",
        shape=(LABELS, None),
        expected="floats",
        mend=mend,
        finite=True,
    )
    assert vectors.shape[0] == LABELS and np.isfinite(vectors).all()


def make_maps(folder: Path) -> None:
    random = np.random.default_rng(0)
    mask = (np.arange(LONGEST) < random.integers(1, LONGEST + 1, (20, 1))).astype("<i8")
    (mask * random.integers(4, 100, mask.shape)).astype("<i8").tofile(
        folder / "trn_doc_input_ids.dat"
    )
    mask.tofile(folder / "trn_doc_attention_mask.dat")


def consume_maps(folder: Path) -> None:
    ids, mask = formats.open_token_maps(folder / "trn_doc", rows=20, max_length=LONGEST)
    facts = {"vocab_size": 100, "tokenizer_hash": "h", "pad_id": 0}
    store = from_padded_map(folder / "tokens.bin", ids, mask, **facts)
    assert len(store) == 20 and store.tokens.max(initial=0) < 100 and store.lengths.min() > 0
    assert len(token_rows(ids, mask, 0, 20, "maps")) == 20


def make_inputs(folder: Path) -> None:
    records = [{"text": f"a {i}", "id": i} for i in range(8)]
    formats.write_lines(folder / "x.jsonl", [json.dumps(record) for record in records])
    with replacing(folder / "y.jsonl.gz") as file:
        file.write("".join(json.dumps(f"text {i} ä") + "\n" for i in range(8)).encode())
    formats.write_lines(folder / "z.txt", [f"text {i}" for i in range(8)])
    write_json(folder / "inputs.json", {"checkpoint": "c", "dataset": "d", "k": 5})


def consume_inputs(folder: Path) -> None:
    for name in ("x.jsonl", "y.jsonl.gz", "z.txt"):
        assert all(isinstance(text, str) for text in Texts(None, str(folder / name), TextParts()))
    assert isinstance(read_json(folder / "inputs.json"), dict)


KINDS = [
    Kind("dataset of tokens", make_tokens, consume_dataset, reseal_manifest),
    Kind("dataset of bags", make_bags, consume_dataset, reseal_manifest),
    Kind("matrices", make_matrices, consume_matrices),
    Kind("text files", make_text, consume_text),
    Kind("JSON lines", make_json, consume_json),
    Kind("vectors", make_vectors, consume_vectors),
    Kind("token maps", make_maps, consume_maps),
    Kind("inputs of commands", make_inputs, consume_inputs),
]
