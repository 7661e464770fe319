"""Bags of words → a dataset folder without tokens."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix, load_npz, save_npz

from xmlkernels.cli import prepare as prepare_command
from xmlkernels.data.batches.bags import BagBatches
from xmlkernels.data.batches.tokens import Batches
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.formats import write_sparse
from xmlkernels.data.manifest import content_hash, manifest_checksum
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::xmlkernels.files.DataWarning")
ROWS, WORDS, LABELS = {"train": 40, "test": 13}, 19, 7


def matrices(name: str) -> tuple[csr_matrix, csr_matrix]:
    """Features with small values and labels; row 3 has no label, row 5 no word."""
    random = np.random.default_rng(len(name))
    features = (
        random.integers(0, 8, (ROWS[name], WORDS)) / 4 * (random.random((ROWS[name], WORDS)) < 0.3)
    )
    labels = (random.random((ROWS[name], LABELS)) < 0.3).astype(np.float32)
    labels[3], features[5] = 0, 0
    return csr_matrix(features.astype(np.float32)), csr_matrix(labels)


def bow_text(name: str, words: int = WORDS, labels: int = LABELS) -> str:
    features, targets = matrices(name)
    lines = [f"{ROWS[name]} {words} {labels}"]
    for row in range(ROWS[name]):
        pairs = zip(features[row].indices, features[row].data, strict=True)
        lines.append(
            " ".join([",".join(map(str, targets[row].indices)), *(f"{i}:{v:g}" for i, v in pairs)])
        )
    return "\n".join(lines) + "\n"


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    for name in ROWS:
        (tmp_path / f"{name}.txt").write_text(bow_text(name))
    return PrepareConfig(
        tmp_path / "out" / "bags",
        source="bow",
        train_text=tmp_path / "train.txt",
        test_text=tmp_path / "test.txt",
    )


def expect(dataset: Dataset) -> None:
    assert (dataset.num_labels, dataset.vocabulary, list(dataset.splits)) == (
        LABELS,
        WORDS,
        ["train", "test"],
    )
    for name, split in dataset.splits.items():
        features, labels = matrices(name)
        np.testing.assert_array_equal(split.features.toarray(), features.toarray())
        np.testing.assert_array_equal(split.labels.toarray(), labels.toarray())
        assert len(split) == ROWS[name]
        assert split.features.dtype == np.float32
        assert split.features.has_canonical_format


def test_label_files_that_declare_many_labels(tmp_path: Path) -> None:
    """A sample of a set of 670,091 labels: the label file's header says how many there are."""
    (tmp_path / "Xf.txt").write_text("3 4\n0:1\n1:1 3:2\n2:1\n")
    (tmp_path / "Y.txt").write_text("3 670091\n670090:1\n5:1\n77:1 400000:1\n")
    output = tmp_path / "out"
    output.mkdir()
    dataset = prepare(
        PrepareConfig(
            output / "bags",
            source="bow",
            train_text=tmp_path / "Xf.txt",
            train_labels=tmp_path / "Y.txt",
        ),
        lambda line: None,
    )
    assert dataset.num_labels == 670_091
    assert dataset.splits["train"].labels.indices.tolist() == [
        670_090,
        5,
        77,
        400_000,
    ]


def test_the_old_bag_of_words_file(config: PrepareConfig) -> None:
    told: list[str] = []
    dataset = prepare(config, told.append)
    expect(dataset)
    expect(Dataset.open(config.output, verify=True))
    features, labels = matrices("train")
    assert dataset.manifest["splits"]["train"] == {
        "documents": 40,
        "positives": labels.nnz,
        "unlabelled": int((labels.getnnz(1) == 0).sum()),
        "filter_pairs": 0,
        "words": features.nnz,
    }
    assert f"{features.nnz / 40:.1f} words each" in told[0]
    files = {
        path.relative_to(config.output).as_posix()
        for path in config.output.rglob("*")
        if path.is_file()
    }
    inside = {
        f"{name}/{part}" for name in ROWS for part in ("features.npz", "labels.npz", "filter.npy")
    }
    assert files == inside | {"manifest.json", "profile.json"}
    batch = next(
        BagBatches(
            dataset.splits["test"].features, dataset.splits["test"].labels, 13, shuffle=False
        ).epoch(0)
    )
    assert len(batch.token) == matrices("test")[0].nnz


@pytest.mark.parametrize("labels", ["npz", "sparse"])
def test_features_and_labels_apart(config: PrepareConfig, tmp_path: Path, labels: str) -> None:
    """`trn_X_Xf.txt` beside a label file, and features of the labels."""
    files: dict[str, Any] = {}
    for name in ROWS:
        features, targets = matrices(name)
        write_sparse(tmp_path / f"{name}_Xf.txt", features)
        files |= {
            f"{name}_text": tmp_path / f"{name}_Xf.txt",
            f"{name}_labels": tmp_path / f"{name}.{labels}",
        }
        (save_npz if labels == "npz" else write_sparse)(files[f"{name}_labels"], targets)
    label_features = csr_matrix(np.arange(LABELS * WORDS, dtype=np.float32).reshape(LABELS, WORDS))
    write_sparse(tmp_path / "lbl_Xf.txt", label_features)
    (tmp_path / "names.txt").write_text("".join(f"label {n}\n" for n in range(LABELS)))
    files |= {"label_text": tmp_path / "lbl_Xf.txt", "label_names": tmp_path / "names.txt"}
    dataset = prepare(replace(config, **files))
    expect(dataset)
    assert dataset.label_features is not None and dataset.label_names is not None
    np.testing.assert_array_equal(dataset.label_features.toarray(), label_features.toarray())
    assert dataset.label_names[6] == "label 6" and dataset.label_tokens is None


def test_one_split_of_each_kind_and_packed(config: PrepareConfig, tmp_path: Path) -> None:
    features, targets = matrices("test")
    write_sparse(tmp_path / "Xf.txt.gz", features)
    save_npz(tmp_path / "Y.npz", targets)
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(bow_text("train").encode()))
    files = {"train_text": "train.txt.gz", "test_text": "Xf.txt.gz", "test_labels": "Y.npz"}
    expect(prepare(replace(config, **{name: tmp_path / path for name, path in files.items()})))  # type: ignore[arg-type]


def test_dropped_rows_and_a_validation_share(config: PrepareConfig) -> None:
    dataset = prepare(replace(config, unlabelled="drop-train", validation_share=0.25, seed=3))
    features, labels = matrices("train")
    kept = labels.getnnz(1) > 0
    found = [dataset.splits[name] for name in ("train", "val")]
    assert len(found[1]) == round(kept.sum() / 4) and sum(map(len, found)) == kept.sum()
    whole = {
        (*x, *y)
        for x, y in zip(
            features[kept].toarray().tolist(), labels[kept].toarray().tolist(), strict=True
        )
    }
    rows = [
        zip(s.features.toarray().tolist(), s.labels.toarray().tolist(), strict=True) for s in found
    ]
    assert {(*x, *y) for part in rows for x, y in part} == whole


def test_where_tokens_are_needed(config: PrepareConfig, tmp_path: Path) -> None:
    dataset = prepare(config)
    message = "expected a dataset of tokens, got one of bags of words.*--encoder bow"
    for use in (
        lambda: dataset.splits["train"].tokens,
        lambda: dataset.max_length,
        lambda: dataset.tokenizer_hash,
        lambda: dataset.tokenizer_folder,
        lambda: Batches(dataset.splits["train"], 4),
    ):
        with pytest.raises(InputError, match=message):
            use()
    with pytest.raises(InputError, match="--keep-texts"):
        _ = dataset.splits["train"].texts
    assert dataset.label_tokens is None and dataset.label_features is None


def test_where_features_are_needed(
    config: PrepareConfig, tmp_path: Path, tokenizer_folder: Path
) -> None:
    (tmp_path / "X.txt").write_text("w1\n" * 40)
    save_npz(tmp_path / "Y.npz", matrices("train")[1])
    text = PrepareConfig(
        tmp_path / "text",
        str(tokenizer_folder),
        train_text=tmp_path / "X.txt",
        train_labels=tmp_path / "Y.npz",
    )
    dataset = prepare(text)
    assert dataset.vocabulary is None and dataset.max_length == 128
    with pytest.raises(
        InputError, match="expected a dataset of bags of words, got one of tokens.*--source bow"
    ):
        _ = dataset.splits["train"].features


def test_same_inputs_are_used_again(config: PrepareConfig) -> None:
    told: list[str] = []
    first = prepare(config)
    assert prepare(config, told.append).key == first.key and "used again" in told[0]
    assert config.test_text is not None
    config.test_text.write_text(bow_text("test").replace(":0.25", ":0.75"))
    with pytest.raises(InputError, match="--overwrite"):
        prepare(config)
    assert prepare(replace(config, overwrite=True)).content_hash != first.content_hash


def test_damaged_features(config: PrepareConfig) -> None:
    prepare(config)
    features = load_npz(config.output / "test" / "features.npz")
    save_npz(config.output / "test" / "features.npz", features[:12])
    manifest = json.loads((config.output / "manifest.json").read_text())
    manifest |= {"files": {}, "checksums": {"files": {}}}
    manifest["content_hash"] = content_hash(manifest)
    manifest["checksums"]["manifest"] = manifest_checksum(manifest)
    (config.output / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"features.npz: expected 13 rows, got 12"):
        Dataset.open(config.output)


def test_files_that_do_not_belong_together(config: PrepareConfig, tmp_path: Path) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            prepare(replace(config, **options))
        assert not config.output.exists()

    (tmp_path / "wide.txt").write_text(bow_text("test", words=WORDS + 1))
    refused(r"wide.txt: expected 19 columns, got 20", test_text=tmp_path / "wide.txt")
    write_sparse(tmp_path / "Xf.txt", matrices("test")[0])
    save_npz(tmp_path / "Y.npz", matrices("train")[1])
    refused(
        "13 texts in .*Xf.txt and as many label rows.*got 40",
        test_text=tmp_path / "Xf.txt",
        test_labels=tmp_path / "Y.npz",
    )
    refused(r"Xf.txt:1: expected 7 rows, got 13", label_text=tmp_path / "Xf.txt")
    refused("expected 9 columns, got 7", num_labels=9)
    refused("header", train_text=tmp_path / "Xf.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "some"}, "--tokenizer: expected none for bags of words, got some"),
        (
            {"source": "text", "token_maps": Path("maps")},
            "--tokenizer: expected the one that made the",
        ),
        ({"keep_texts": True}, "--keep-texts: expected texts, got bags of words"),
        ({"test_text": None, "test_labels": Path("y")}, "a text file for each split"),
    ],
)
def test_settings_that_contradict(
    config: PrepareConfig, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prepare(replace(config, **options))


def test_command(config: PrepareConfig, tmp_path: Path) -> None:
    arguments = [
        "--output",
        str(config.output),
        "--source",
        "bow",
        "--train-text",
        str(tmp_path / "train.txt"),
    ]
    prepare_command.main(arguments)
    assert Dataset.open(config.output).vocabulary == WORDS
