"""Raw files of every layout → the same dataset folder, kept or rebuilt by content."""

from __future__ import annotations

import gzip
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix, save_npz

from tiny_tokenizer import make_tokenizer
from xmlkernels.cli.main import main
from xmlkernels.data import corpus
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.tokens import Tokenizer
from xmlkernels.errors import InputError
from xmlkernels.files import DataWarning
from xmlkernels.locks import own_place

TRAIN = ["w1 w2", "w3", "", "w4 w5 w6 w7", "w8 W9"]
TEST = ["w10 w11", "w12"]
TRAIN_ROWS = [[0, 2], [1], [], [3], [0, 1, 2]]
TEST_ROWS = [[2], [0, 3]]
NAMES = ["w20", "w21 w22", "w23", "w24"]


def matrix(rows: list[list[int]], labels: int = 4) -> csr_matrix:
    found = np.zeros((len(rows), labels), np.float32)
    for number, row in enumerate(rows):
        found[number, row] = 1
    return csr_matrix(found)


def sparse(rows: list[list[int]], labels: int = 4) -> str:
    return f"{len(rows)} {labels}\n" + "".join(
        " ".join(f"{label}:1" for label in row) + "\n" for row in rows
    )


def text_files(folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    content = {
        "trn_X.txt": "\n".join(TRAIN) + "\n",
        "trn_X_Y.txt": sparse(TRAIN_ROWS),
        "tst_X.txt": "\n".join(TEST) + "\n",
        "tst_X_Y.txt": sparse(TEST_ROWS),
        "Y.txt": "\n".join(NAMES) + "\n",
        "trn_filter.txt": "0 1\n4 3\n2 2\n4 3\n",
        "tst_filter.txt": "1 0\n",
    }
    for name, text in content.items():
        (folder / name).write_text(text)
    return {
        "train_text": folder / "trn_X.txt",
        "train_labels": folder / "trn_X_Y.txt",
        "test_text": folder / "tst_X.txt",
        "test_labels": folder / "tst_X_Y.txt",
        "label_text": folder / "Y.txt",
    }


@pytest.fixture
def config(tmp_path: Path, tokenizer_folder: Path) -> PrepareConfig:
    files = text_files(tmp_path / "raw")
    return PrepareConfig(tmp_path / "out" / "small", str(tokenizer_folder), 5, **files)  # type: ignore[arg-type]


pytestmark = pytest.mark.filterwarnings("ignore::xmlkernels.files.DataWarning")


def expect(
    dataset: Dataset, tokenizer: Tokenizer, *, texts: bool = True, joiner: str = " "
) -> None:
    """The folder holds TRAIN and TEST whole, whatever they were read from; `joiner` stands behind
    the first word.
    """
    assert list(dataset.splits) == ["train", "test"] and dataset.num_labels == 4
    for name, source, rows in (("train", TRAIN, TRAIN_ROWS), ("test", TEST, TEST_ROWS)):
        split = dataset.splits[name]
        joined = [joiner.join(filter(None, text.split(" ", 1))) for text in source]
        assert [row.tolist() for row in split.tokens] == [
            row.tolist() for row in tokenizer.encode_batch(joined, 5)
        ]
        assert (split.labels != matrix(rows)).nnz == 0 and split.labels.shape == (len(rows), 4)
        if texts:
            assert split.texts == source


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


def test_same_inputs_are_used_again(
    config: PrepareConfig, tmp_path: Path, tokenizer_folder: Path
) -> None:
    prepare(config)
    before, told = (config.output / "manifest.json").stat(), []  # type: ignore[var-annotated]
    copies = text_files(tmp_path / "elsewhere")
    again = replace(config, **copies, overwrite=True, tokenizer=str(make_tokenizer(tmp_path / "t")))  # type: ignore[arg-type]
    prepare(again, told.append)
    assert told == [f"{config.output}: made from the same inputs before, used again"]
    assert (config.output / "manifest.json").stat().st_ino == before.st_ino


def other_tokenizer(config: PrepareConfig, tmp_path: Path) -> PrepareConfig:
    return replace(config, tokenizer=str(make_tokenizer(tmp_path / "case", lower=False)))


def other_content(config: PrepareConfig, tmp_path: Path) -> PrepareConfig:
    (tmp_path / "raw" / "tst_X.txt").write_text("w10 w11\nw13\n")
    return config


CHANGES = [
    other_tokenizer,
    other_content,
    *(
        lambda config, _, options=options: replace(config, **options)
        for options in (
            {"max_length": 6},
            {"keep_texts": True},
            {"unlabelled": "drop"},
            {"propensity_a": 0.6},
            {"validation_share": 0.2},
            {"name": "n"},
            {"label_text": None},
            {"merge_duplicates": True},
        )
    ),
]


@pytest.mark.parametrize("change", CHANGES)
def test_other_inputs_need_overwrite(config: PrepareConfig, tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    first = prepare(config)
    changed = change(config, tmp_path)
    with pytest.raises(InputError, match="--overwrite"):
        prepare(changed)
    assert Dataset.open(config.output, verify=True).key == first.key
    second = prepare(replace(changed, overwrite=True))
    assert second.key != first.key and Dataset.open(config.output, verify=True).key == second.key
    assert [path.name for path in config.output.parent.iterdir()] == ["small"]


def test_damaged_dataset(config: PrepareConfig) -> None:
    prepare(config)
    path = config.output / "train" / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match="tokens.bin.*make it again with --overwrite"):
        prepare(config)
    prepare(replace(config, overwrite=True))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\x07")
    prepare(replace(config, overwrite=True))
    assert path.read_bytes() == data


def test_foreign_folder_is_never_touched(config: PrepareConfig) -> None:
    config.output.mkdir(parents=True)
    (config.output / "thesis.tex").write_text("ten years")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="got other files; choose another --output"):
            prepare(replace(config, overwrite=overwrite))
    (config.output / "thesis.tex").rename(config.output.parent / "kept")
    assert prepare(config).num_labels == 4, "an empty folder is a free place"
    with pytest.raises(InputError, match="got a file"):
        prepare(replace(config, output=config.output.parent / "kept", overwrite=True))


@pytest.mark.parametrize(
    "manifest", ["theirs", '{"name": "an app"}', "", '{"format": "xmlkernels-dataset"}']
)
def test_a_bare_manifest_costs_the_files_beside_it_nothing(
    config: PrepareConfig, manifest: str
) -> None:
    config.output.mkdir(parents=True)
    (config.output / "manifest.json").write_text(manifest)
    (config.output / "thesis.tex").write_text("ten years")
    with pytest.raises(InputError, match="other files in it: .*nothing was deleted"):
        prepare(replace(config, overwrite=True))
    assert (config.output / "thesis.tex").read_text() == "ten years"
    (config.output / "thesis.tex").unlink()
    if "dataset" not in manifest:
        with pytest.raises(InputError, match="other files in it: manifest.json"):
            prepare(replace(config, overwrite=True))


def test_a_damaged_manifest_is_replaced_with_its_dataset_but_no_foreign_file(
    config: PrepareConfig,
) -> None:
    prepare(config)
    (config.output / "manifest.json").write_text("{ cut sho")
    (config.output / "train" / "notes").write_text("mine")
    with pytest.raises(InputError, match="other files in it: train/notes"):
        prepare(replace(config, overwrite=True))
    (config.output / "train" / "notes").unlink()
    prepare(replace(config, overwrite=True))
    assert Dataset.open(config.output, verify=True).num_labels == 4


def test_what_a_killed_process_left_is_cleared_or_put_back(config: PrepareConfig) -> None:
    first = prepare(config)
    hidden = config.output.with_name(".small.0123456789ab.old")
    config.output.rename(hidden)  # killed between the two renames
    config.output.with_name(".small.0123456789ab.part").mkdir()
    assert prepare(config).content_hash == first.content_hash and not hidden.exists()
    hidden.mkdir()  # killed before it could remove the old one
    prepare(replace(config, max_length=4, overwrite=True))
    assert [path.name for path in config.output.parent.iterdir()] == ["small"]


def test_one_cache_for_two_at_once(config: PrepareConfig) -> None:
    """The second waits, says so, and uses what the first has made; where none is to wait it is
    refused.
    """
    told: list[str] = []
    (first := config.output.parent).mkdir(parents=True)
    with own_place(config.output):
        with pytest.raises(InputError, match=f"--output: .*held by process {os.getpid()}"):
            prepare(config)

        def tell(line: str) -> None:
            told.append(line)
            if "waiting" in line:
                go.set()

        go = threading.Event()
        waiting = threading.Thread(target=prepare, args=(config, tell), kwargs={"wait": True})
        waiting.start()
        assert go.wait(60)
        made = prepare(replace(config, output=first / "other", name="small"))
        (first / "other").rename(config.output)  # as the first one does at its end
    waiting.join(60)
    assert any("used again" in line for line in told)
    assert Dataset.open(config.output).content_hash == made.content_hash


@pytest.mark.parametrize("standing", [False, True])
def test_nothing_half_written(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, standing: bool
) -> None:
    if standing:
        prepare(config)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(replace(config, max_length=4, overwrite=True))
    assert [path.name for path in config.output.parent.glob("*")] == (["small"] if standing else [])
    if standing:
        assert Dataset.open(config.output, verify=True).max_length == 5


def test_folder_of_another_process(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What appeared at the place while this run was building stays."""

    def appear(self: Tokenizer, folder: Path) -> None:
        config.output.mkdir()
        (config.output / "manifest.json").write_text("theirs")

    monkeypatch.setattr(Tokenizer, "save", appear)
    with pytest.raises(InputError, match="a folder made meanwhile"):
        prepare(config)
    assert (config.output / "manifest.json").read_text() == "theirs"
    assert [path.name for path in config.output.parent.iterdir()] == ["small"]


def test_files_that_do_not_belong_together(config: PrepareConfig, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "short.txt").write_text("w1\nw2\n")
    (raw / "narrow.txt").write_text(sparse(TEST_ROWS, 3 + 2))
    (raw / "pairs.txt").write_text("7 0\n")
    for options, message in [
        ({"train_text": raw / "short.txt"}, "2 texts in .*short.txt .*got 5 label rows"),
        ({"test_labels": raw / "narrow.txt"}, r"narrow.txt:1: expected 4 cols, got 5"),
        (
            {"test_labels": raw / "narrow.txt", "label_text": None},
            r"narrow.txt:1: expected 4 cols, got 5",
        ),
        ({"label_text": raw / "short.txt"}, r"X_Y.txt:1: expected 2 cols, got 4"),
        (
            {"label_names": raw / "short.txt"},
            r"short.txt: expected 4 lines, one for each label, got 2",
        ),
        ({"num_labels": 7}, "expected 7 label texts, as --num-labels says"),
        ({"test_filter": raw / "pairs.txt"}, "pairs.txt:1: expected a row"),
        ({"test_text": raw / "none.txt"}, "none.txt: expected a file, got no such file"),
        ({"train_text": raw}, "got a folder"),
        ({"tokenizer": str(raw / "none")}, "tokenizer .*no such folder"),
    ]:
        with pytest.raises(InputError, match=message):
            prepare(replace(config, **options))  # type: ignore[arg-type]
    assert not config.output.parent.exists() or not any(config.output.parent.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "--max-length"),
        ({"max_length": 2}, "--max-length: expected at least 3"),
        ({"validation_share": 1.0}, "--validation-share"),
        (
            {"validation_share": 0.1, "validation_text": Path("x")},
            "--validation-share: expected 0 beside a validation split",
        ),
        ({"validation_labels": Path("x")}, "a text file for each split"),
        ({"propensity_a": -1.0}, "positive A and B"),
        ({"num_labels": 0}, "--num-labels"),
        ({"documents": 5}, "--documents: expected --source docstrings"),
        ({"source": "docstrings"}, "--source docstrings alone"),
        (
            {"source": "docstrings", "validation_share": 0.1},
            "--validation-share: expected 0 beside",
        ),
        ({"source": "lf"}, "none beside JSON lines"),
        (
            {"train_labels": None},
            "train split: expected a file with labels, got none; name it with --train-labels",
        ),
        ({"seed": -1}, "--seed"),
        ({"token_maps": Path("x"), "source": "attentionxml"}, "--token-maps"),
        ({"token_maps": Path("x"), "train_text": None, "keep_texts": True}, "--keep-texts"),
    ],
)
def test_settings_that_contradict(
    config: PrepareConfig, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prepare(replace(config, **options))  # type: ignore[arg-type]
    assert not config.output.exists()


def command(*arguments: str) -> int:
    try:
        main(["prepare", *arguments])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_command(
    config: PrepareConfig, capsys: pytest.CaptureFixture[str], tokenizer: Tokenizer
) -> None:
    names = (
        "train_text",
        "train_labels",
        "test_text",
        "test_labels",
        "label_text",
        "output",
        "tokenizer",
    )
    flags = [
        part
        for name in names
        for part in (f"--{name.replace('_', '-')}", str(getattr(config, name)))
    ]
    assert command(*flags, "--max-length", "5", "--keep-texts") == 0
    expect(Dataset.open(config.output), tokenizer)
    shown = capsys.readouterr()
    assert "4 labels, content" in shown.out
    assert (
        "note: the train split: 1 of 5 documents have no label (first: row 2); kept\n" in shown.err
    )
    assert "test: 2 documents" in shown.err
    assert command(*flags, "--max-length", "6") == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and "--overwrite" in shown.err
    assert command(*flags, "--max-lenght", "6") == 2
    assert "--max-length" in capsys.readouterr().err
