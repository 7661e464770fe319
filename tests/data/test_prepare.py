"""Raw files of every layout give the same dataset folder."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import save_npz

from raw_sets import NAMES, TEST, TEST_ROWS, TRAIN, TRAIN_ROWS, expect, matrix, sparse
from tiny_tokenizer import make_tokenizer
from xmlkernels.data import corpus
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.tokens import Tokenizer
from xmlkernels.errors import InputError
from xmlkernels.files import DataWarning

pytestmark = pytest.mark.filterwarnings("ignore::xmlkernels.files.DataWarning")


def test_text_files(config: PrepareConfig, tokenizer: Tokenizer) -> None:
    told: list[str] = []
    dataset = prepare(replace(config, keep_texts=True), told.append)
    expect(dataset, tokenizer)
    assert dataset.label_names == NAMES and dataset.name == "small"
    assert dataset.label_tokens is not None
    assert [row.tolist() for row in dataset.label_tokens] == [
        r.tolist() for r in tokenizer.encode_batch(NAMES, 5)
    ]
    assert dataset.manifest["splits"]["train"] == {
        "documents": 5,
        "positives": 7,
        "unlabelled": 1,
        "filter_pairs": 0,
        "tokens": 18,
        "at_max_length": 1,
    }
    assert told[0].startswith(
        "train: 5 documents, 1.40 labels each (1 without), 3.6 tokens each (20.0% at"
    )
    Dataset.open(config.output, verify=True)
    assert [path.name for path in config.output.parent.iterdir()] == ["small"]


@pytest.mark.parametrize("kind", ["npz", "bow", "comma", "space", "json"])
def test_label_formats(
    config: PrepareConfig, tokenizer: Tokenizer, tmp_path: Path, kind: str
) -> None:
    paths = {}
    for name, rows in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
        path = paths[f"{name}_labels"] = tmp_path / f"{name}.{kind}"
        if kind == "npz":
            save_npz(path, matrix(rows))
        elif kind == "bow":
            lines = [",".join(map(str, row)) + " 0:1.5 2:1\n" for row in rows]
            path.write_text(f"{len(rows)} 3 4\n" + "".join(lines))
        elif kind == "json":
            records = [
                {"uid": str(n), "title": "", "target_ind": row} for n, row in enumerate(rows)
            ]
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        else:
            path.write_text(
                "".join(
                    ("," if kind == "comma" else " ").join(map(str, row)) + "\n" for row in rows
                )
            )
    expect(prepare(replace(config, keep_texts=True, **paths)), tokenizer)  # type: ignore[arg-type]
    if kind in ("comma", "space", "json"):
        # Without label texts the largest number decides, over all splits: label 3 stands in both,
        # so nothing is lost.
        expect(
            prepare(
                replace(config, output=tmp_path / "o", keep_texts=True, label_text=None, **paths)
            ),
            tokenizer,
        )  # type: ignore[arg-type]


def test_width_is_that_of_the_widest_split_or_of_a_header(
    config: PrepareConfig, tmp_path: Path
) -> None:
    (tmp_path / "train.lines").write_text("0\n1\n\n2\n0\n")
    (tmp_path / "test.lines").write_text("5\n1\n")
    lines = {
        "train_labels": tmp_path / "train.lines",
        "test_labels": tmp_path / "test.lines",
        "label_text": None,
    }
    found = prepare(replace(config, **lines))  # type: ignore[arg-type]
    assert found.num_labels == 6 and found.splits["train"].labels.shape == (5, 6)
    wide = prepare(replace(config, output=tmp_path / "wide", num_labels=9, **lines))  # type: ignore[arg-type]
    assert wide.num_labels == 9
    with pytest.raises(InputError, match=r"test.lines:1: .*from 0 to 3.*'5'"):
        prepare(
            replace(
                config, output=tmp_path / "x", test_labels=tmp_path / "test.lines", label_text=None
            )
        )


def test_lf_json(config: PrepareConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def write(name: str, texts: list[str], rows: list[list[int]] | None) -> Path:
        with gzip.open(tmp_path / name, "wt") as file:
            for number, text in enumerate(texts):
                title, _, content = text.partition(" ")
                record: dict[str, object] = {
                    "uid": f"u{number}",
                    "title": title,
                    "content": content,
                }
                if rows is not None:
                    record |= {"target_ind": rows[number], "target_rel": [0.5] * len(rows[number])}
                file.write(json.dumps(record) + "\n")
        return tmp_path / name

    files = {
        "train_text": write("trn.json.gz", TRAIN, TRAIN_ROWS),
        "test_text": write("tst.json.gz", TEST, TEST_ROWS),
        "label_text": write("lbl.json.gz", NAMES, None),
        "train_labels": None,
        "test_labels": None,
    }
    config, told = replace(config, source="lf", keep_texts=True, **files), []  # type: ignore[arg-type, var-annotated]
    dataset = prepare(config, told.append)
    expect(dataset, tokenizer, joiner=" [SEP] ")
    assert dataset.label_names == ["w20", "w21", "w23", "w24"] and dataset.label_tokens is not None
    assert len(dataset.label_tokens[1]) == 5, "title, separator and content"
    assert (
        dataset.manifest["source"] | {"fields": "all", "separator": " [SEP] "}
        == dataset.manifest["source"]
    )
    assert "title and body: joined by [SEP]" in told
    assert any("7 label values are not 1" in line for line in told)
    titles = prepare(replace(config, output=tmp_path / "titles", fields="title"))
    assert titles.splits["train"].texts == ["w1", "w3", "", "w4", "w8"]
    assert prepare(replace(config, output=tmp_path / "b", fields="body")).splits["test"].texts == [
        "w11",
        "",
    ]
    with pytest.raises(InputError, match="give --source lf"):
        prepare(replace(config, source="text", train_labels=files["train_text"]))


def test_attentionxml(config: PrepareConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    names = ["alpha", "beta", "gamma", "zeta"]
    for name, texts, rows in (("train", TRAIN, TRAIN_ROWS), ("test", TEST, TEST_ROWS)):
        raw = [" /SEP/ ".join(text.split(" ", 1)) if " " in text else text for text in texts]
        (tmp_path / f"{name}_raw_texts.txt").write_text("\n".join(raw) + "\n")
        (tmp_path / f"{name}_labels.txt").write_text(
            "".join(" ".join(names[i] for i in row) + "\n" for row in rows)
        )
    files = {
        f"{name}_{kind}": tmp_path / f"{name}_{'raw_texts' if kind == 'text' else 'labels'}.txt"
        for name in ("train", "test")
        for kind in ("text", "labels")
    }
    config = replace(config, source="attentionxml", keep_texts=True, label_text=None, **files)  # type: ignore[arg-type]
    dataset = prepare(config)
    expect(dataset, tokenizer, joiner=" [SEP] ")
    assert dataset.label_names == names
    assert "[SEP]" not in (dataset.folder / "train" / "texts.jsonl").read_text()
    without, told = make_tokenizer(tmp_path / "other", sep=False), []  # type: ignore[var-annotated]
    plain = prepare(replace(config, output=tmp_path / "plain", tokenizer=str(without)), told.append)
    assert "title and body: joined by a space: the tokenizer has no separator" in told
    assert plain.splits["train"].tokens[0].tolist() == [2, 5, 6, 3], "[CLS] w1 w2 [SEP]"
    files["test_labels"].write_text("alpha\n")
    with pytest.raises(InputError, match="test_labels.txt"):
        prepare(replace(config, output=tmp_path / "x"))


def test_built_in_corpus(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "PACKAGES", ("json", "email"))
    build = corpus.build_corpus
    built = build(packages=("json", "email"), workers=1)
    builds: list[int | None] = []

    def count(documents: int | None) -> corpus.Corpus:
        builds.append(documents)
        return build(documents, packages=corpus.PACKAGES, workers=1)

    monkeypatch.setattr(corpus, "build_corpus", count)
    config = PrepareConfig(
        tmp_path / "docs", str(tokenizer_folder), 16, source="docstrings", keep_texts=True
    )
    dataset = prepare(config)
    assert dataset.label_names == built.label_names and dataset.label_tokens is not None
    assert dataset.manifest["source"]["corpus_hash"] == built.hash
    assert {name: split.texts for name, split in dataset.splits.items()} == built.texts
    assert all(
        (split.labels != built.labels[name]).nnz == 0 for name, split in dataset.splits.items()
    )
    assert prepare(config).key == dataset.key and builds == [None], (
        "known again without building it"
    )
    with pytest.raises(InputError, match="--overwrite"):
        prepare(replace(config, documents=20))
    monkeypatch.setattr(corpus, "PACKAGES", ("json",))
    with pytest.raises(InputError, match="--overwrite"):
        prepare(config)


def write_maps(folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir()
    for name, texts in (("trn_doc", TRAIN), ("tst_doc", TEST), ("lbl", NAMES)):
        ids = np.zeros((len(texts), 5), np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(tokenizer.encode_batch(texts, 5)):
            ids[number, : len(row)], mask[number, : len(row)] = row, 1
        ids.tofile(folder / f"{name}_input_ids.dat")
        mask.tofile(folder / f"{name}_attention_mask.dat")


def test_upstream_token_maps(config: PrepareConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_maps(tmp_path / "tiny-5", tokenizer)
    config = replace(config, train_text=None, test_text=None, token_maps=tmp_path / "tiny-5")
    dataset = prepare(config)
    expect(dataset, tokenizer, texts=False)
    assert dataset.label_tokens is not None and len(dataset.label_tokens) == 4
    part = prepare(
        replace(config, output=tmp_path / "part", unlabelled="drop", validation_share=0.25, seed=1)
    )
    whole, sizes = tokenizer.encode_batch(TRAIN, 5), {"train": 3, "val": 1, "test": 2}
    assert {name: len(split) for name, split in part.splits.items()} == sizes
    kept = [row.tolist() for name in ("train", "val") for row in part.splits[name].tokens]
    assert sorted(kept) == sorted(whole[i].tolist() for i in (0, 1, 3, 4))
    with pytest.raises(InputError, match="fits max_length 5"):
        prepare(replace(config, output=tmp_path / "x", max_length=10))
    other = make_tokenizer(tmp_path / "other", specials=False)
    assert prepare(replace(config, output=tmp_path / "y", tokenizer=str(other))).num_labels == 4
    ids = np.fromfile(tmp_path / "tiny-5" / "trn_doc_input_ids.dat", np.int64)
    ids[5] = 7
    ids.tofile(tmp_path / "tiny-5" / "trn_doc_input_ids.dat")
    with pytest.raises(InputError, match="made from others"):
        prepare(config)
    with pytest.raises(InputError, match="train split: expected rows that start with 2.*got 7"):
        prepare(replace(config, output=tmp_path / "z"))


def test_unlabelled_documents(config: PrepareConfig, tmp_path: Path) -> None:
    (tmp_path / "raw" / "tst_X_Y.txt").write_text(sparse([[], [0, 3]]))
    pairs = {
        "train_filter": tmp_path / "raw" / "trn_filter.txt",
        "test_filter": tmp_path / "raw" / "tst_filter.txt",
    }
    config = replace(config, keep_texts=True, **pairs)  # type: ignore[arg-type]
    expected = {"keep": (5, 2), "drop-train": (4, 2), "drop": (4, 1)}
    for number, (choice, sizes) in enumerate(expected.items()):
        with pytest.warns(DataWarning, match=r"train split: 1 of 5 documents .*(kept|dropped)"):
            found = prepare(replace(config, output=tmp_path / str(number), unlabelled=choice))  # type: ignore[arg-type]
        assert (len(found.splits["train"]), len(found.splits["test"])) == sizes
        train, test = found.splits["train"], found.splits["test"]
        assert train.texts == [
            text for row, text in enumerate(TRAIN) if choice == "keep" or row != 2
        ]
        last = 4 if choice == "keep" else 3
        assert train.filter_pairs.tolist() == [[0, 1]] + ([[2, 2]] if choice == "keep" else []) + [
            [last, 3]
        ]
        assert test.filter_pairs.tolist() == ([[0, 0]] if choice == "drop" else [[1, 0]])


def test_validation_share(config: PrepareConfig, tmp_path: Path) -> None:
    rows = [[n % 7] for n in range(100)]
    (tmp_path / "raw" / "trn_X.txt").write_text("".join(f"w{n}\n" for n in range(100)))
    (tmp_path / "raw" / "trn_X_Y.txt").write_text(sparse(rows, 9))
    (tmp_path / "raw" / "tst_X_Y.txt").write_text(sparse(TEST_ROWS, 9))
    (tmp_path / "raw" / "trn_filter.txt").write_text("".join(f"{n} {n % 9}\n" for n in range(100)))
    config = replace(
        config, label_text=None, keep_texts=True, train_filter=tmp_path / "raw" / "trn_filter.txt"
    )
    chosen = []
    for number, seed in enumerate((0, 0, 1)):
        found = prepare(
            replace(
                config, output=tmp_path / str(number), name="n", validation_share=0.1, seed=seed
            )
        )
        assert list(found.splits) == ["train", "val", "test"]
        members = {
            name: [int(text[1:]) for text in found.splits[name].texts] for name in ("train", "val")
        }
        assert len(members["val"]) == 10
        assert sorted(members["train"] + members["val"]) == list(range(100))
        for name, numbers in members.items():
            assert numbers == sorted(numbers)
            assert found.splits[name].labels.indices.tolist() == [n % 7 for n in numbers]
            assert found.splits[name].filter_pairs.tolist() == [
                [at, n % 9] for at, n in enumerate(numbers)
            ]
        chosen.append((members["val"], found.content_hash))
    assert chosen[0] == chosen[1] and chosen[0][0] != chosen[2][0]
    with pytest.raises(InputError, match="leaves some of 100 documents"):
        prepare(replace(config, output=tmp_path / "x", validation_share=0.999))


def test_propensity_is_never_guessed(config: PrepareConfig, tmp_path: Path) -> None:
    assert prepare(replace(config, name="Amazon-Wiki")).propensity == (0.55, 1.5)
    for number, (options, expected) in enumerate(
        [
            ({"propensity": "amazon"}, (0.6, 2.6)),
            ({"propensity": "wikipedia"}, (0.5, 0.4)),
            ({"propensity": "wikipedia", "propensity_b": 0.7}, (0.5, 0.7)),
        ]
    ):
        found = prepare(replace(config, output=tmp_path / str(number), **options))  # type: ignore[arg-type]
        assert found.propensity == expected
