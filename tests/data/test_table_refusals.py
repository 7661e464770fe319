"""What is wrong with a table is one sentence: file, line, what was expected, what to do."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from own_tables import as_csv, as_jsonl, as_parquet, made, write
from xmlkernels import InputError, PrepareConfig, prepare
from xmlkernels.data.tables.options import Tables

TWO = '{"text": "a", "labels": ["x"]}\n'
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    # name of the file: content, settings, the sentence
    "wrong.csv": (
        "id,body,tags\n1,a,x\n", {"labels": ("tgas",)},
        "--labels tgas: expected a column of .*wrong.csv ('id', 'body', 'tags'), got none of that "
        "name; did you mean tags?",
    ),
    "near.csv": (
        "text,lables\na,x\n", {},
        "near.csv: expected a column of labels with a usual name (labels, label, tags, tag, "
        "subjects, …), got the columns 'text', 'lables'; name it with --labels lables",
    ),
    "odd.csv": (
        "Ticket,Subject line,Lable(s),agent\n1,a,x,y\n", {"text": ("Ticket",)},
        "name it with --labels 'Lable(s)'",
    ),
    "nameless.csv": (
        "some words,x\nmore,y\n", {},
        "name it with --labels COLUMN, or the columns of a file without a line of names with "
        "--columns",
    ),
    "textless.jsonl": (
        '{"n": 1, "labels": []}\n', {}, "expected a column of the text with a usual name",
    ),
    "empty.csv": ("", {}, "expected at least one line, got an empty file"),
    "header.csv": ("text,labels\n", {}, "header.csv: expected training documents, got none"),
    "unlabelled.jsonl": (
        '{"text": "a", "labels": []}\n', {},
        "unlabelled.jsonl: expected documents with labels, got no label in 1 documents",
    ),
    "cells.csv": (
        "text,labels\na,x\n\nb,y,z\n", {},
        "cells.csv:4: expected 2 cells, one for each column, got 3; quote cells",
    ),
    "quote.csv": (
        'text,labels\n"a,x\n', {}, "quote.csv:2: expected cells whose quotation marks open and",
    ),
    "twice.csv": ("text,tags,tags\na,x,y\n", {}, "twice.csv:1: expected each column once"),
    "line.jsonl": (TWO + '{"text": \n', {}, "line.jsonl:2: expected a JSON object, got"),
    "list.jsonl": (TWO + "[1]\n", {}, "list.jsonl:2: expected a JSON object, got '[1]'"),
    "open.json": (f"[{TWO},\n{TWO}", {}, "open.json:4: expected an object of a list"),
    "number.jsonl": (
        '{"text": 17, "labels": ["x"]}\n', {},
        "number.jsonl:1: expected a text in column 'text', got a number: '17'; write it as a "
        "text, or name the columns",
    ),
    "object.jsonl": (
        '{"text": "a", "labels": [{"weight": 1}]}\n', {},
        "object.jsonl:1: expected an object with uri, id, label or name for each label",
    ),
    "fold.jsonl": (
        '{"text": "a", "labels": "x", "fold": "seven"}\n', {"split_column": "fold"},
        "fold.jsonl:1: expected train, validation or test in column 'fold', got 'seven'",
    ),
    "unknown.data": ("some words\n", {}, "say --format csv|tsv|jsonl|json|parquet|fasttext|annif"),
    "annif.tsv": (
        "a\t<http://x>\nb\tc\n", {}, "annif.tsv:2: expected a text, a tab and <uri> <uri> …",
    ),
    "share.jsonl": (TWO, {"test_share": 1.0}, "--test-share: expected a share from 0 that leaves"),
    "one.jsonl": (
        TWO, {"test_share": 0.5}, "the data: expected more than 1 different texts, got 1",
    ),
    "both.jsonl": (
        TWO, {"test_share": 0.5, "split_column": "x"},
        "--split-column: expected no other way to split",
    ),
    "all.jsonl": (TWO, {"all_labels": True}, "--all-labels: expected --label-file, got none"),
    "separator.csv": ("a", {"separator": "ab"}, "--separator: expected one character"),
    "encoding.csv": ("a", {"encoding": "utf-9"}, "--encoding: expected an encoding that Python"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_mistakes_in_a_table(name: str, tmp_path: Path) -> None:
    content, settings, sentence = CASES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as raised:
        made(tmp_path / "d", tmp_path / name, **settings)
    pattern = re.escape(sentence).replace(re.escape(".*"), ".*")
    assert re.search(pattern, str(raised.value)), str(raised.value)
    assert "\n" not in str(raised.value) and not (tmp_path / "d").exists()


def test_damaged_files(tmp_path: Path) -> None:
    packed = gzip.compress(as_jsonl().encode())
    parquet = tmp_path / "a.parquet"
    as_parquet(parquet)
    zst = write(tmp_path, "a.jsonl.zst").read_bytes()
    latin = as_csv().replace("with", "à").encode("latin-1")
    for name, content, sentence in (
        ("cut.jsonl.gz", packed[:-40], "expected a whole gzip file, got one that is cut short"),
        ("broken.jsonl.gz", packed[:40] + b"zzzz" + packed[44:], "expected a whole gzip file"),
        ("cut.jsonl.zst", zst[:-40], "expected a whole zstd file"),
        ("cut.parquet", parquet.read_bytes()[:-40], "expected a whole Parquet file"),
        (
            "text.parquet",
            parquet.read_bytes().replace(b"ok", b"\xff\xfe"),
            "expected a whole Parquet file, got 'utf-8' codec",
        ),
        ("page.parquet", _page_broken(parquet.read_bytes()), "expected a whole Parquet file"),
        ("latin.csv", latin, "latin.csv:2: expected text in UTF-8, got the byte 0xe0 in"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=sentence) as raised:
            made(tmp_path / "d", tmp_path / name)
        assert name in str(raised.value) and not (tmp_path / "d").exists(), name
    with pytest.raises(InputError, match="expected a file, got no file of that name"):
        made(tmp_path / "d", tmp_path / "none.csv")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="expected files of a table .* got an empty folder"):
        made(tmp_path / "d", tmp_path / "folder")


def _page_broken(content: bytes) -> bytes:
    """A Parquet file whose head and tail are whole."""
    return content[:8] + b"\xff" * 60 + content[68:]


def test_files_of_two_kinds_of_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(TWO)
    (tmp_path / "b.jsonl").write_text('{"text": "a", "tags": ["x"]}\n')
    with pytest.raises(InputError, match="expected the columns text, labels, as the first file"):
        made(tmp_path / "d", tmp_path)
    with pytest.raises(InputError, match="expected the columns text, labels, as the first file"):
        made(tmp_path / "d", tmp_path / "a.jsonl", test=tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text('{"text": "a", "labels": []}\n')
    with pytest.raises(InputError, match="the test split: expected documents with labels"):
        made(tmp_path / "d", tmp_path / "a.jsonl", test=tmp_path / "c.jsonl")


def test_files_of_labels_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text(TWO)
    for name, content, sentence in (
        ("v.csv", "uri,name\ny,why\n", "expected names of the labels that documents have"),
        ("w.csv", "uri,weight\ny,1\n", "expected columns of ids and of names"),
        ("v.jsonl", json.dumps({"id": "x", "name": 3}), "v.jsonl:1: expected a name in column"),
        ("v.ttl", "<a> <b>", "expected SKOS, got"),
        ("n.ttl", "<http://a> <http://b> <http://c> .", "expected concepts with skos:prefLabel"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=sentence):
            made(tmp_path / "d", tmp_path / "a.jsonl", label_file=tmp_path / name)
    monkeypatch.setitem(__import__("sys").modules, "rdflib", None)
    with pytest.raises(InputError, match=r"pip install \"xmlkernels\[skos\]\""):
        made(tmp_path / "d", tmp_path / "a.jsonl", label_file=tmp_path / "v.ttl")


def test_a_table_or_raw_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data: expected a table, for the flags of one"):
        prepare(PrepareConfig(tmp_path / "d", tables=Tables(text=("a",))))
    both = PrepareConfig(tmp_path / "d", train_text=tmp_path, tables=Tables(tmp_path))
    with pytest.raises(InputError, match="--data: expected no flags of raw files beside it"):
        prepare(both)
    taken = PrepareConfig(tmp_path / "d", validation_share=0.1,
                          tables=Tables(tmp_path, validation=tmp_path))  # fmt: skip
    with pytest.raises(InputError, match="--validation-share: expected 0 beside --validation"):
        prepare(taken)
    tested = PrepareConfig(tmp_path / "d", tables=Tables(tmp_path, test=tmp_path, test_share=0.1))
    with pytest.raises(InputError, match="--test-share: expected no --test"):
        prepare(tested)
