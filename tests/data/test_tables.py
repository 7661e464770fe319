"""Own tables: every kind of file gives the same dataset, and every setting has its effect."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from own_tables import LABELS, ROWS, TEXT_FILES, TEXTS, as_csv, as_jsonl, made, write
from xmlkernels import Dataset
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.tables import streams
from xmlkernels.data.tables.cells import labels_of
from xmlkernels.data.tables.options import Tables
from xmlkernels.data.tables.splits import places_of
from xmlkernels.data.text_parts import TextParts
from xmlkernels.files import DataWarning


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts, labels = zip(*ROWS, strict=True)
    folder = tmp_path_factory.mktemp("memory") / "memory"
    return Dataset.from_texts(folder, (texts, labels), label_names=LABELS).content_hash


@pytest.mark.parametrize("name", [*TEXT_FILES, "a.parquet", "a.csv.gz", "a.jsonl.zst"])
def test_every_kind_of_file_gives_the_same_dataset(
    name: str, expected: str, tmp_path: Path
) -> None:
    dataset, _ = made(tmp_path / "d", write(tmp_path, name))
    assert dataset.content_hash == expected


def test_standard_input_is_read_once_and_known_by_its_content(
    expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams.from_stdin.cache_clear()
    content = SimpleNamespace(buffer=io.BytesIO(as_jsonl().encode()))
    monkeypatch.setattr(sys, "stdin", content)
    for _ in range(2):
        dataset, _ = made(tmp_path / "d", Path("-"))
        assert dataset.content_hash == expected
    streams.from_stdin.cache_clear()


def test_a_folder_of_parts_is_one_table_and_its_names_may_be_splits(
    expected: str, tmp_path: Path
) -> None:
    lines = as_jsonl().splitlines(keepends=True)
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "_SUCCESS").write_text("")
    (parts / "part-0.jsonl").write_text("".join(lines[:25]))
    (parts / "part-1.json").write_text("".join(lines[25:]))
    assert made(tmp_path / "d", parts)[0].content_hash == expected
    splits = tmp_path / "splits"
    splits.mkdir()
    for name, part in (
        ("train-00000-of-00002.jsonl", lines[:10]),
        ("train-00001-of-00002.jsonl", lines[10:25]),
        ("validation.jsonl", lines[25:30]),
        ("test.jsonl", lines[30:]),
    ):
        (splits / name).write_text("".join(part))
    dataset, _ = made(tmp_path / "s", splits)
    sizes = {name: len(split) for name, split in dataset.splits.items()}
    assert sizes == {"train": 25, "val": 5, "test": 10}


@pytest.mark.parametrize(("text", "labels"), [("Text:", "Tag(s)"), ("TEXT", "Subject-URIs")])
def test_usual_names_have_other_signs_and_capitals(text: str, labels: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"n,{text},{labels}\n1,a b,x\n2,c,y\n")
    found, _ = made(tmp_path / "d", tmp_path / "a.csv")
    assert found.num_labels == 2 and list(found.splits["train"].texts) == ["a b", "c"]


def test_splits_by_files_and_by_a_column(tmp_path: Path) -> None:
    lines = as_jsonl().splitlines(keepends=True)
    for name, part in (("a", lines[:30]), ("b", lines[30:35]), ("c", lines[35:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    files = {"validation": tmp_path / "b.jsonl", "test": tmp_path / "c.jsonl"}
    by_files, _ = made(tmp_path / "files", tmp_path / "a.jsonl", **files)
    with open(tmp_path / "all.jsonl", "w") as file:
        for n, (text, labels) in enumerate(ROWS):
            fold = "train" if n < 30 else "dev" if n < 35 else "TEST"
            file.write(json.dumps({"text": text, "labels": labels, "fold": fold}) + "\n")
    _, told = made(tmp_path / "no", tmp_path / "all.jsonl")
    assert any("the column fold is not used; --split-column fold" in line for line in told)
    by_column, _ = made(tmp_path / "column", tmp_path / "all.jsonl", split_column="fold")
    assert by_files.content_hash == by_column.content_hash
    assert list(by_files.splits) == ["train", "val", "test"]


def test_shares_are_drawn_by_a_hash_that_keeps_equal_texts_together(tmp_path: Path) -> None:
    texts = [f"text {n % 150}" if n % 2 else f"TEXT  {n % 150}" for n in range(300)]
    rows = [{"text": text, "labels": ["a"]} for text in texts]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset, _ = made(tmp_path / "d", path, 0.2, test_share=0.3)
    found = {name: {" ".join(text.lower().split()) for text in split.texts}
             for name, split in dataset.splits.items()}  # fmt: skip
    assert sum(map(len, found.values())) == 150 and len(set().union(*found.values())) == 150
    assert 0.1 < len(found["val"]) / 150 < 0.3 and 0.2 < len(found["test"]) / 150 < 0.4
    # the places are those of any machine and any run
    assert places_of(["a b"], 0)[0] == places_of(["A  B"], 0)[0] != places_of(["a b"], 1)[0]
    assert round(places_of(["a b"], 0)[0], 6) == 0.899059


def test_few_texts_leave_no_split_empty(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"text": "t{n}", "labels": "a"}}\n' for n in range(3)))
    dataset, _ = made(tmp_path / "d", path, 0.01, test_share=0.01)
    assert [len(split) for split in dataset.splits.values()] == [1, 1, 1]


# ---- columns and cells ----


def table(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_several_columns_of_the_text_are_joined_and_so_are_texts_to_predict(tmp_path: Path) -> None:
    path = table(tmp_path / "t.jsonl", {"title": "A", "abstract": "b", "note": "n", "tags": "x"},
                 {"title": "C", "abstract": None, "note": "m", "tags": "y"})  # fmt: skip
    dataset, told = made(tmp_path / "d", path, text_separator=" | ")
    assert dataset.splits["train"].texts == ["A | b", "C"]
    assert told[0].startswith("text: title + abstract; labels: tags (by their names;")
    assert "not read: note" in told[0]
    assert TextParts.of(dataset).join("t", "b") == "t | b"
    dataset, told = made(tmp_path / "o", path, text=("note", "title"), labels=("tags",))
    assert dataset.splits["train"].texts == ["n A", "m C"] and "by their names" not in told[0]


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        (["b", " a "], ["a", "b"]),
        ('["b", "a"]', ["a", "b"]),
        ("['b', 'a']", ["a", "b"]),
        ("<http://x/b> <http://x/a>", ["http://x/a", "http://x/b"]),
        ([{"uri": "http://x/a", "label": "A"}, {"label": "b"}], ["b", "http://x/a"]),
        ([17, 4], ["4", "17"]),
        (17, ["17"]),
        (17.0, ["17"]),
        (True, ["True"]),
        ("a, b", ["a, b"]),
        ("a;b ; a", ["a", "b"]),
    ],
)
def test_labels_of_a_cell(cell: Any, labels: list[str], tmp_path: Path) -> None:
    path = table(tmp_path / "t.jsonl", {"text": "t", "labels": cell})
    dataset, _ = made(tmp_path / "d", path)
    assert dataset.label_names == labels and dataset.splits["train"].labels.nnz == len(labels)


def test_half_a_character_of_an_escape_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a\\ud800", "labels": ["b\\udfff", {"uri": "c\\ud800"}]}\n')
    dataset, told = made(tmp_path / "d", path)
    assert dataset.splits["train"].texts == ["a\ufffd"]
    assert dataset.label_names == ["b\ufffd", "c\ufffd"]
    assert any("damaged characters" in line for line in told)


def test_what_divides_labels_is_found_or_given(tmp_path: Path) -> None:
    names = ["x, y", "y, z", "x, z", "x, y, z", "z", "z, y"]
    path = table(tmp_path / "t.jsonl", *({"text": f"t{n}", "tag": n} for n in names))
    dataset, told = made(tmp_path / "found", path)
    assert dataset.label_names == ["x", "y", "z"] and "divided by ','" in told[1]
    dataset, _ = made(tmp_path / "none", path, label_separator="")
    assert dataset.label_names == sorted(names)
    dataset, _ = made(tmp_path / "given", path, label_separator="y")
    assert ", z" in (dataset.label_names or ())
    ids = table(tmp_path / "ids.jsonl", {"text": "a", "y": "3 17"}, {"text": "b", "y": "4"})
    assert made(tmp_path / "ids", ids)[0].label_names == ["3", "4", "17"]


def test_csv_without_names_without_quotes_and_of_another_separator(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('say "hi"~x\nno~y\n')
    more = {"columns": ("text", "labels"), "separator": "~", "quotes": False}
    dataset, _ = made(tmp_path / "d", path, **more)
    assert dataset.splits["train"].texts == ['say "hi"', "no"]
    (tmp_path / "q.csv").write_text('text~labels\n"a ""b"" c"~x\n')
    dataset, _ = made(tmp_path / "q", tmp_path / "q.csv", separator="~")
    assert dataset.splits["train"].texts == ['a "b" c']


def test_a_format_that_the_name_hides_and_other_encodings(tmp_path: Path) -> None:
    path = tmp_path / "table.data"
    path.write_text(as_jsonl())
    dataset, _ = made(tmp_path / "d", path, format="jsonl")
    assert dataset.splits["train"].texts == TEXTS
    path.write_bytes(as_csv().replace("with", "à").encode("cp1252"))
    dataset, _ = made(tmp_path / "e", path, format="csv", encoding="cp1252")
    assert " à " in dataset.splits["train"].texts[0]
    dataset, _ = made(tmp_path / "r", path, format="csv", repair_encoding=True)
    assert " \ufffd " in dataset.splits["train"].texts[0]


def test_numbered_classes_of_the_hub_have_their_names(tmp_path: Path) -> None:
    told = {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}
    made_table = pyarrow.table({"sentence": ["a", "b"], "label": [1, 0]})
    made_table = made_table.replace_schema_metadata({"huggingface": json.dumps(told)})
    pyarrow.parquet.write_table(made_table, tmp_path / "t.parquet")
    dataset, _ = made(tmp_path / "d", tmp_path / "t.parquet")
    assert dataset.label_names == ["no", "yes"]
    assert dataset.splits["train"].labels.toarray().tolist() == [[0, 1], [1, 0]]


# ---- corpora of others ----


def test_corpora_of_annif(tmp_path: Path) -> None:
    (tmp_path / "short.tsv").write_text("boil an egg\t<http://x/1> <http://x/2>\nfry\t\n")
    short, _ = made(tmp_path / "short", tmp_path / "short.tsv")
    folder = tmp_path / "long"
    folder.mkdir()
    (folder / "a.txt").write_text("boil an\negg\n")
    (folder / "a.tsv").write_text("<http://x/1>\tone\n<http://x/2>\ttwo\n")
    (folder / "b.txt").write_text("fry\n")
    long, _ = made(tmp_path / "d", folder)
    (folder / "a.tsv").unlink()
    (folder / "a.key").write_text("http://x/1\nhttp://x/2\n")
    keys, _ = made(tmp_path / "k", folder)
    lines = table(
        tmp_path / "t.jsonl",
        {"text": "boil an egg", "subjects": [{"uri": "http://x/1"}, {"uri": "http://x/2"}]},
        {"text": "fry", "subjects": []},
    )
    last, _ = made(tmp_path / "j", lines)
    assert len({made.content_hash for made in (short, long, keys, last)}) == 1
    assert short.label_names == ["http://x/1", "http://x/2"]


def test_folders_of_the_repository(tmp_path: Path) -> None:
    (tmp_path / "trn_X.txt").write_text("a\nb\n")
    (tmp_path / "trn_X_Y.txt").write_text("2 2\n0:1\n1:1\n")
    (tmp_path / "tst_X.txt").write_text("c\n")
    (tmp_path / "tst_X_Y.txt").write_text("1 2\n1:1\n")
    (tmp_path / "Y.txt").write_text("x\ny\n")
    dataset, _ = made(tmp_path / "d", tmp_path)
    assert dataset.label_names == ["x", "y"] and list(dataset.splits) == ["train", "test"]
    lf = tmp_path / "lf"
    lf.mkdir()
    (lf / "trn.json").write_text('{"uid": "1", "title": "a", "target_ind": [1]}\n')
    (lf / "lbl.json").write_text('{"uid": "7", "title": "x"}\n{"uid": "8", "title": "y"}\n')
    for data in (lf, lf / "trn.json"):
        more = {} if data == lf else {"label_file": lf / "lbl.json"}
        dataset, _ = made(tmp_path / data.name / "d", data, **more)
        held = dataset.splits["train"].labels.indices
        assert [(dataset.label_names or ())[label] for label in held] == ["y"]


# ---- names of labels ----

SKOS = """@prefix skos: <http://www.w3.org/2004/02/skos/core#> .
<http://x/1> a skos:Concept ; skos:prefLabel "egg"@en, "Ei"@de ; skos:altLabel "eggs"@en-GB .
<http://x/2> a skos:Concept ; skos:prefLabel "boil"@en .
<http://x/3> a skos:Concept ; skos:prefLabel "fry"@en ; skos:altLabel "braten"@de .
"""
VOCABULARIES = {
    "v.ttl": SKOS,
    "v.tsv": "<http://x/1>\tegg\n<http://x/2>\tboil\n<http://x/3>\tfry\n",
    "v.csv": "uri,name\nhttp://x/1,egg\nhttp://x/2,boil\nhttp://x/3,fry\n",
    "v.jsonl": "".join(
        json.dumps({"id": f"http://x/{n}", "label": name}) + "\n"
        for n, name in enumerate(("egg", "boil", "fry"), 1)
    ),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_names_of_labels_come_from_a_second_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("boil an egg\t<http://x/1> <http://x/2>\n")
    (tmp_path / name).write_text(VOCABULARIES[name])
    more: dict[str, Any] = {"label_file": tmp_path / name}
    dataset, told = made(tmp_path / "d", tmp_path / "t.tsv", **more)
    assert dataset.label_names == ["egg", "boil"] and "2 of 2 have a name" in " ".join(told)
    assert dataset.label_ids == ["http://x/1", "http://x/2"]
    dataset, _ = made(tmp_path / "all", tmp_path / "t.tsv", all_labels=True, **more)
    assert dataset.label_names == ["egg", "boil", "fry"]
    if name == "v.ttl":
        dataset, _ = made(tmp_path / "de", tmp_path / "t.tsv", language="de", **more)
        assert dataset.label_names == ["Ei", "boil"]


def test_a_name_per_line_names_ids_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    path = table(tmp_path / "t.jsonl", {"text": "a", "labels": [2, 0, 1]})
    (tmp_path / "names.txt").write_text("x\ny\nx\n")
    dataset, _ = made(tmp_path / "d", path, label_file=tmp_path / "names.txt")
    assert dataset.label_names == ["x (0)", "y", "x (2)"]


def test_half_a_million_rows_would_take_a_minute_at_most(tmp_path: Path) -> None:
    """In proportion, in CPU time, with a margin for a machine that is shared."""
    import time

    path = tmp_path / "t.jsonl"
    text = "words of a usual text that goes on for a while " * 4
    path.write_text("".join(
        json.dumps({"text": f"{text}{n}", "labels": [f"l{n % 997}", f"k{n % 89}"]}) + "\n"
        for n in range(5000)
    ))  # fmt: skip
    began = time.process_time()
    dataset, _ = made(tmp_path / "d", path, 0.1, test_share=0.1)
    assert time.process_time() - began < 60 * 5000 / 500_000 * 5
    assert np.sum([len(split) for split in dataset.splits.values()]) == 5000


def test_quotation_marks_hold_a_label_together() -> None:
    """As cells of CSV do; a single mark is a letter as any other."""
    found = labels_of('"soups; stews";eggs; "5"" cake"', ";", "row", "tags")
    assert found == ["soups; stews", "eggs", '5" cake']
    assert labels_of('5" cake;eggs', ";", "row", "tags") == ['5" cake', "eggs"]


def test_the_first_document_without_a_label_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "u.csv"
    path.write_text("text,tags\n" + "".join(f"t{n},{'' if n == 7 else 'a'}\n" for n in range(40)))
    told: list[str] = []
    with pytest.warns(DataWarning, match="documents have no label; ") as warned:
        prepare(PrepareConfig(tmp_path / "d", tables=Tables(path, test_share=0.2)), told.append)
    assert not any("row 0" in str(one.message) for one in warned)
    assert any("u.csv" in line and "9" in line for line in told if "without a label" in line)
