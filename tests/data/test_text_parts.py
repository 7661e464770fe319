"""`--text-parts`: columns of the text that are kept apart, where the place of a word decides."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xmlkernels as xk
from tiny_tokenizer import make_tokenizer
from xmlkernels import InputError
from xmlkernels.cli import predict, train
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.tables.options import Tables
from xmlkernels.data.text_parts import TextParts
from xmlkernels.serve.messages import Document, text_of
from xmlkernels.terms import PART, Terms

WORDS = ("eggs", "soup", "cake", "fish", "rice", "leek")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The word of the subject is the label; another label's word is in the body."""
    path = tmp_path_factory.mktemp("parts") / "table.csv"
    random = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "message", "tags"])
        for number in range(400):
            first, second = random.permutation(len(WORDS))[:2]
            writer.writerow([f"about {WORDS[first]}", f"{WORDS[second]} no {number}", WORDS[first]])
    return path


def run(table: Path, name: str, *more: str) -> tuple[Path, dict[str, Any]]:
    output = table.parent / name
    words = ["--data", str(table), "--cache", str(table.parent / "cache"), "--output", str(output)]
    named = ["--text", "subject", "message", "--threads", "1", "--no-report"]
    train.main(["auto", *words, *named, *more])
    return output, json.loads((output / "metrics.json").read_text())


def test_a_word_of_one_column_is_another_than_the_same_word_of_the_next(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Joined, both words are as likely; apart, the subject's is the label."""
    linear = ["--recipe", "linear", "--longest", "1"]
    _, joined = run(table, "joined", *linear)
    output, apart = run(table, "apart", *linear, "--text-parts")
    assert joined["test"]["ranker"]["P@1"] < 75
    assert apart["test"]["ranker"]["P@1"] == 100
    # An object with the columns as its keys is asked as it was trained, by every door.
    predictor = xk.load(output)
    asked = {"message": "soup", "subject": "rice"}
    assert [row[0].name for row in predictor.predict([asked], k=1)] == ["rice"]
    swapped = {"message": "rice", "subject": "soup"}
    _, rows = predictor.predict_arrays([swapped], k=1)
    assert predictor.label_names is not None and predictor.label_names[rows[0, 0]] == "soup"
    file, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    file.write_text(json.dumps(asked) + "\n" + json.dumps("leek") + "\n")
    words = ["--ranker", str(output), "--input", str(file), "--output", str(answers)]
    predict.main([*words, "--top-k", "1"])
    found = [json.loads(line)["labels"][0] for line in answers.read_text().splitlines()]
    assert [one.get("name") for one in found] == ["rice", "leek"]
    for text in (Document(**asked), Document(**swapped)):
        assert text_of(text, predictor, "text 0").count(PART) == 1  # type: ignore[union-attr]
    assert text_of(Document(text="leek"), predictor, "text 0") == "leek"
    for wrong in (Document(subjects="soup"), Document(subject="a", body="b")):  # type: ignore[call-arg]
        with pytest.raises(InputError, match="text 0: expected strings of subject, message, got"):
            text_of(wrong, predictor, "text 0")
    with pytest.raises(InputError, match="text 1: expected strings of subject, message"):
        list(predictor.predict([asked, {"body": "soup"}], k=1))


def test_a_bag_of_words_reads_the_parts_and_an_encoder_their_sum(table: Path) -> None:
    bow = ["--recipe", "bow", "--epochs", "20", "--batch", "32", "--ngrams", "1"]
    output, apart = run(table, "bow", *bow, "--text-parts")
    assert apart["test"]["P@1"] > 90
    assert xk.load(output).parts.columns == ("subject", "message")
    found = xk.load(output).predict([{"message": "soup", "subject": "rice"}], k=1)
    assert next(iter(found))[0].name == "rice"
    tokens = []
    for name, apart_ in (("t0", False), ("t1", True)):
        tables = Tables(table, text=("subject", "message"), text_parts=apart_, text_separator=" . ")
        folder = table.parent / name
        tokenizer = str(make_tokenizer(table.parent / "tokenizer"))
        dataset = prepare(PrepareConfig(folder, tokenizer, max_length=16, tables=tables))
        tokens.append((folder / "train" / "tokens.bin").read_bytes())
    assert tokens[0] == tokens[1], "an encoder reads them joined"
    assert TextParts.of(dataset).plain(f"a{PART}b") == "a . b"
    assert TextParts.of(Dataset.open(table.parent / "t0")).columns == ()


def test_terms_of_parts() -> None:
    title = ["eggs", "fried", "fried eggs"]
    found = sorted(Terms(2)(f"Fried eggs{PART}{PART}eggs"))
    assert found == sorted([*title, "eggs", *(f"0{PART}{term}" for term in title)])


def test_one_column_has_no_parts(table: Path, tmp_path: Path) -> None:
    tables = Tables(table, text=("subject",), text_parts=True)
    with pytest.raises(InputError, match="--text-parts: expected several columns .* subject"):
        prepare(PrepareConfig(tmp_path / "x", tables=tables))
