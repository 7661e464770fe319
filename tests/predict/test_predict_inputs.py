"""xmlkernels predict: what it reads texts from, ids that come back, pairs that are never predicted,
and its output's encoding.
"""

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

import numpy as np
import pytest
import scipy.sparse
from train_runs import ROOT, make_dataset, run, tiny

from xmlkernels import InputError
from xmlkernels.cli import console, predict
from xmlkernels.cli.arguments import parse
from xmlkernels.cli.filters import Barred
from xmlkernels.cli.texts import Texts, lines_of, paired
from xmlkernels.data.inputs import TextParts
from xmlkernels.predict.base import Label
from xmlkernels.predict.model import Predictor

RUN = ROOT / "tests" / "fixtures" / "v1" / "run"  # 30 labels
PLAIN = TextParts()
LF = TextParts(separator=" [SEP] ")
RAW = TextParts(separator=" [SEP] ", marked=True)


def read(path: Path, parts: TextParts = PLAIN) -> tuple[list[str], list[Any]]:
    texts = Texts(None, str(path), parts)
    return list(texts), list(texts.ids)


def ask(**options: Any) -> None:
    predict.run(predict.Options(str(RUN), **options))


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
    assert texts == ["plain", "t", "a b", "b", "t", "t", "t", "t"] and ids == [
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
    path.write_text('[\n{"text": "a"}\n]\n')
    with pytest.raises(InputError, match=r"x.jsonl:1: .*of one list: `jq -c '.\[\]' FILE`"):
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
        assert [x["text"] for x in found] == [0, 1, 2] and [x.get("id") for x in found] == [
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


# ---- pairs that are never predicted ----


def test_filter_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["w0 w1 w2", "w30 w31", "w60", "w3"]
    (tmp_path / "x.txt").write_text("".join(f"{text}\n" for text in texts))
    plain = [[label.id for label in labels] for labels in Predictor.load(RUN).predict(texts, 6)]
    pairs = [
        (0, plain[0][0]),
        (0, plain[0][2]),
        (2, plain[2][1]),
        (2, 29),
        (2, 29),
        (3, plain[3][3]),
    ]
    (tmp_path / "pairs.txt").write_text("".join(f"{text} {label}\n" for text, label in pairs))
    expected = [[x for x in row if (text, x) not in pairs][:4] for text, row in enumerate(plain)]
    given: dict[str, Any] = {
        "input": str(tmp_path / "x.txt"),
        "filter": str(tmp_path / "pairs.txt"),
        "top_k": 4,
    }
    for more in ({}, {"batch": 1}, {"latency": True}):
        ask(**given, **more, output=str(tmp_path / "out.jsonl"))
        found = [
            json.loads(line)["labels"] for line in (tmp_path / "out.jsonl").read_text().splitlines()
        ]
        assert [[label["id"] for label in labels] for labels in found] == expected
    ask(**given, output=str(tmp_path / "out.npz"))
    matrix = scipy.sparse.load_npz(tmp_path / "out.npz")
    assert [sorted(matrix[row].indices.tolist()) for row in range(4)] == [
        sorted(row) for row in expected
    ]
    ask(**given)
    assert len(capsys.readouterr().out.splitlines()) == 4
    ask(**{**given, "top_k": 30}, output=str(tmp_path / "all.npz"))
    assert scipy.sparse.load_npz(tmp_path / "all.npz").getnnz(1).tolist() == [28, 30, 28, 29]


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ("0 30\n", "pairs.txt:1: expected a label from 0 to 29"),
        ("0 1\n2 1\n", "pairs.txt: expected texts from 0 to 1"),
        ("a\n", "pairs.txt:1"),
    ],
)
@pytest.mark.parametrize("output", ["out.jsonl", "out.npz"])
def test_filter_pairs_of_other_texts(tmp_path: Path, pairs: str, told: str, output: str) -> None:
    (tmp_path / "x.txt").write_text("w0\nw1\n")
    (tmp_path / "pairs.txt").write_text(pairs)
    with pytest.raises(InputError, match=told):
        ask(
            input=str(tmp_path / "x.txt"),
            filter=str(tmp_path / "pairs.txt"),
            output=str(tmp_path / output),
        )
    assert not (tmp_path / output).exists()


def test_filter_pairs_of_a_ranker(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("w0 w1 w2\nw30 w31\n")
    given: dict[str, Any] = {
        "ranker": (str(RUN.parent / "ranker_tree"),),
        "input": str(tmp_path / "x.txt"),
        "top_k": 3,
    }
    for name in ("plain", "barred"):
        predict.run(predict.Options(**given, output=str(tmp_path / f"{name}.jsonl")))
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        given |= {"filter": str(tmp_path / "pairs.txt")}
        if name == "plain":
            first = [[label["id"] for label in json.loads(line)["labels"]] for line in lines]
            (tmp_path / "pairs.txt").write_text(f"0 {first[0][1]}\n1 {first[1][0]}\n")
    left = [[label["id"] for label in json.loads(line)["labels"]] for line in lines]
    assert (
        left[0][:2] == [first[0][0], first[0][2]]
        and left[1][:2] == first[1][1:]
        and len(left[0]) == 3
    )
    assert first[0][1] not in left[0] and first[1][0] not in left[1]


def test_what_is_left_of_fewer_labels() -> None:
    barred = Barred("x", np.array([[0, 2], [1, 0], [1, 1], [1, 2]]), 3)
    assert barred.needed(2) == 3  # all there are
    values, rows = (
        np.array([[3, 2, 1], [3, 2, -np.inf]], np.float32),
        np.array([[2, 0, 1], [1, 0, -1]]),
    )
    kept, left = barred.kept_arrays(values, rows, 2)
    assert left.tolist() == [[0, 1], [-1, -1]] and kept.tolist() == [[2, 1], [-np.inf, -np.inf]]


def test_a_run_writes_no_filtered_pair(tmp_path: Path) -> None:
    """predictions.npz of train/run.py, and predict.py of the same texts and pairs."""
    raw = tmp_path / "raw"
    raw.mkdir()
    pairs = sorted({(n, (7 * n) % 30) for n in range(50)} | {(n, n % 30) for n in range(50)})
    (raw / "pairs.txt").write_text("".join(f"{text} {label}\n" for text, label in pairs))
    dataset = make_dataset(raw, test_filter=raw / "pairs.txt", keep_texts=True)
    run(tiny(dataset, tmp_path / "run", epochs=1))
    written = scipy.sparse.load_npz(tmp_path / "run" / "predictions.npz")
    assert written.nnz and not any(written[text, label] for text, label in pairs)
    options = predict.Options(
        str(tmp_path / "run"),
        input=str(raw / "tst_X.txt"),
        filter=str(raw / "pairs.txt"),
        top_k=5,
        output=str(tmp_path / "out.npz"),
    )
    predict.run(options)
    own = scipy.sparse.load_npz(tmp_path / "out.npz").tocsr()
    stored = set(zip(*own.nonzero(), strict=True))
    assert stored and not stored & set(pairs)


# ---- texts as in training ----


def test_a_model_joins_title_and_body_as_its_dataset_did(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, documents in (("trn", 160), ("val", 40)):
        random = np.random.default_rng(documents)
        lines = [
            {
                "uid": f"u{n}",
                "title": f"w{3 * (n % 30)}",
                "content": f"w{int(random.integers(90))}",
                "target_ind": [n % 30],
            }
            for n in range(documents)
        ]
        (raw / f"{name}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    labels = "".join(json.dumps({"uid": f"l{n}", "title": f"w{3 * n}"}) + "\n" for n in range(30))
    (raw / "lbl.json").write_text(labels)
    dataset = make_dataset(
        raw,
        splits=("train",),
        source="lf",
        train_text=raw / "trn.json",
        train_labels=None,
        label_text=raw / "lbl.json",
        validation_text=raw / "val.json",
        keep_texts=True,
    )
    run(tiny(dataset, tmp_path / "run", epochs=1))
    predictor = Predictor.load(tmp_path / "run")
    assert predictor.parts == LF
    (tmp_path / "x.jsonl").write_text('{"title": "w3", "content": "w9"}\n')
    predict.run(
        predict.Options(
            str(tmp_path / "run"),
            input=str(tmp_path / "x.jsonl"),
            output=str(tmp_path / "out.jsonl"),
        )
    )
    (found,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    (own,) = predictor.predict(["w3 [SEP] w9"], 10)
    assert [x["id"] for x in found["labels"]] == [x.id for x in own]
    assert [x["score"] for x in found["labels"]] == pytest.approx([x.score for x in own], abs=1e-3)
    (plain,) = predictor.predict(["w3 w9"], 10)
    assert [x.score for x in plain] != pytest.approx([x.score for x in own], abs=1e-3)


def test_older_checkpoints_join_by_a_space() -> None:
    assert Predictor.load(RUN).parts == TextParts()
