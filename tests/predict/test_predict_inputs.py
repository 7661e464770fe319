"""Texts to predict: files, lines, ids and names."""

from __future__ import annotations

import bz2
import io
import json
import lzma
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prediction_inputs import LF, ask

from xmlkernels import InputError
from xmlkernels.cli import console, predict
from xmlkernels.cli.arguments import parse
from xmlkernels.cli.texts import Texts, lines_of, paired
from xmlkernels.data.text_parts import TextParts
from xmlkernels.predict.base import Label

PLAIN = TextParts()

RAW = TextParts(separator=" [SEP] ", marked=True)


def read(path: Path, parts: TextParts = PLAIN) -> tuple[list[str], list[Any]]:
    texts = Texts(None, str(path), parts)
    return list(texts), list(texts.ids)


# ---- what is read ----


@pytest.mark.parametrize("pack", [bytes, bz2.compress, lzma.compress])
def test_packed_files(tmp_path: Path, pack: Any) -> None:
    (tmp_path / "x.txt").write_bytes(pack("one\n\nzwei Füße\n".encode()))
    assert read(tmp_path / "x.txt") == (["one", "", "zwei Füße"], [None] * 3)
    (tmp_path / "x.jsonl.bz2").write_bytes(pack(b'"one"\n{"text": "two", "id": 7}\n'))
    assert read(tmp_path / "x.jsonl.bz2") == (["one", "two"], [None, 7])


def test_json_lines(tmp_path: Path) -> None:
    records: list[Any] = [
        "plain",
        {"text": "t", "id": "a-1"},
        {"title": "a", "content": "b", "uid": 3},
        {"title": "", "content": "b", "_id": "x"},
        {"text": "t", "id": True, "uid": None},
        {"text": "t", "id": ["no"]},
        {"text": "t", "id": "\ud800"},
        {"text": "t", "id": ""},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "\n\n")
    texts, ids = read(path)
    assert texts == ["plain", "t", "a b", "b", "t", "t", "t", "t"]
    assert ids == [
        None,
        "a-1",
        3,
        "x",
        None,
        None,
        "?",
        "",
    ]
    assert read(path, LF)[0][2:4] == ["a [SEP] b", "b"]
    assert read(path, TextParts("title"))[0][1:4] == ["t", "a", ""]
    path.write_text('"a"\n\n"b"\n')
    with pytest.raises(InputError, match="x.jsonl:2: .*got a blank line"):
        read(path)
    path.write_text('{"text": "a"}\n{"text": null}\n')
    with pytest.raises(
        InputError, match='x.jsonl:2: expected a text in "text", got null; write ""'
    ):
        read(path)
    path.write_text('[\n{"text": "a"}\n]\n')
    with pytest.raises(InputError, match=r"x.jsonl:1: .*from one list: `jq -c '.\[\]' FILE`"):
        read(path)
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(InputError, match="x.jsonl:1: expected a JSON string or object"):
        read(path)


def test_title_and_body_in_lines(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a /SEP/ b /SEP/ c\nno title\n")
    assert read(tmp_path / "x.txt", RAW)[0] == ["a [SEP] b [SEP] c", "no title"]
    assert read(tmp_path / "x.txt", LF)[0] == ["a /SEP/ b /SEP/ c", "no title"], (
        "only AttentionXML's sets mark it so"
    )
    assert read(tmp_path / "x.txt", TextParts("title", marked=True))[0] == ["a", ""]
    assert list(Texts("a /SEP/ b", None, RAW)) == ["a [SEP] b"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.csv", b"text,labels\na,1\n", "a table with the columns text, labels"),
        ("x.txt", b"id,text\n1,a\n", "a table with the columns id, text"),
        ("x.parquet", b"PAR1\x15\x04" + bytes(30), "a Parquet table"),
        ("x.txt", b"\x28\xb5\x2f\xfd" + os.urandom(30), "a zstd archive"),
        ("x.jsonl", b"%PDF-1.4\n", "a PDF"),
        ("x.txt", b'{"text": "a"}\n', "name the file .jsonl"),
        ("x.txt", b"__label__a one\n", "fastText"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    for options in (
        {"input": str(tmp_path / name)},
        {"input": str(tmp_path / name), "output": str(tmp_path / "out.jsonl")},
    ):
        with pytest.raises(InputError) as error:
            ask(**options)
        assert told in str(error.value) and [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(InputError):
        list(lines_of(io.BufferedReader(io.BytesIO(content))))  # type: ignore[arg-type]


def test_packed_standard_input_is_refused() -> None:
    with pytest.raises(InputError, match="standard input: .*a packed file; .*zcat"):
        list(lines_of(io.BufferedReader(io.BytesIO(bz2.compress(b"a\n")))))  # type: ignore[arg-type]
    assert list(lines_of(io.BufferedReader(io.BytesIO(b"a\nb\n")))) == ["a", "b"]  # type: ignore[arg-type]


def test_texts_of_two_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": 1}\n{"text": "b", "id": 2}\n')
    (tmp_path / "b.txt").write_text("c\nd\n")
    texts = Texts(None, str(tmp_path / "a.jsonl"), LF)
    assert list(paired(texts, Texts(None, str(tmp_path / "b.txt"), TextParts()))) == [
        ("a", "c"),
        ("b", "d"),
    ]
    assert list(texts.ids) == [1, 2]
    (tmp_path / "b.txt").write_text("c\n")
    with pytest.raises(InputError, match="b.txt: expected as many texts as --input has, got fewer"):
        list(
            paired(
                Texts(None, str(tmp_path / "a.jsonl"), LF),
                Texts(None, str(tmp_path / "b.txt"), TextParts()),
            )
        )


# ---- texts that begin with a dash ----


@pytest.mark.parametrize(
    "text", ["-lemon", "-lemon --and more", "--", "-", "--lemon", "-1", "- a list", "--text"]
)
def test_a_text_may_begin_with_a_dash(text: str) -> None:
    if text != "--text":
        assert (
            parse(
                predict.Options,
                "predict",
                "",
                words=["--checkpoint", "x", "--text", text, "--top-k", "2"],
            ).text
            == text
        )
    assert (
        parse(
            predict.Options,
            "predict",
            "",
            words=["--checkpoint", "x", f"--text={text}", "--top-k", "2"],
        ).text
        == text
    )


def test_a_forgotten_text_is_no_flag() -> None:
    with pytest.raises(InputError, match="--text"):
        parse(predict.Options, "predict", "", words=["--text", "--top-k", "2"])


# ---- ids and encodings of the output ----


def test_ids_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text(
        '{"text": "w0 w1", "uid": "B01"}\n"w3"\n{"text": "w6", "id": 0}\n'
    )
    for options in ({"batch": 1}, {"batch": 2}, {"latency": True}):
        ask(input=str(tmp_path / "x.jsonl"), output=str(tmp_path / "out.jsonl"), top_k=2, **options)
        found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [list(x) for x in found] == [
            ["text", "id", "labels"],
            ["text", "labels"],
            ["text", "id", "labels"],
        ]
        assert [x["text"] for x in found] == [0, 1, 2]
        assert [x.get("id") for x in found] == [
            "B01",
            None,
            0,
        ]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("terminal", [False, True])
def test_names_outside_the_encoding_of_standard_output(
    monkeypatch: pytest.MonkeyPatch, encoding: str, terminal: bool
) -> None:
    """As UTF-8 into a pipe; on a terminal of that encoding with escapes."""
    answer = [Label(0, "雲 λ", 1.0)]
    fake = SimpleNamespace(
        labels=1, parts=TextParts(), predict=lambda texts, k, **_: ([*answer] for _ in texts)
    )
    monkeypatch.setattr(predict, "loaded", lambda options: fake)
    written = io.BytesIO()
    out = io.TextIOWrapper(written, encoding=encoding)
    monkeypatch.setattr(out, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", out)
    predict.run(predict.Options("x", text="a"))
    if terminal:
        assert "\\u96f2 \\u03bb" in written.getvalue().decode(encoding)
    else:
        assert json.loads(written.getvalue().decode("utf-8"))["labels"][0]["name"] == "雲 λ"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_no_command_ends_at_a_name_that_the_terminal_cannot_show(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.setattr(console, "_console", console.Console(highlight=False, width=120))
    names = {"雲 λ": {"P@1": 1.0}}
    console.command(
        lambda: (console.say("雲"), console.print_comparison("λ – 雲", names), print("雲"))
    )
    sys.stdout.flush()
    assert written.getvalue().decode(encoding).count("\\u96f2") == 4
