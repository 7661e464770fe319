"""Which datasets a trained model knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_tokenizer import make_tokenizer
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.inputs import BowInputs, TokenInputs, check_dataset
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.tokens import load_tokenizer
from xmlkernels.data.vectorizer import Vectorizer
from xmlkernels.errors import InputError

LABELS = 3


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents as texts and as bags of words of 5 and of 6 columns."""
    folder = tmp_path_factory.mktemp("raw")
    (folder / "X.txt").write_text("w0 w1\nw2\nw1 w2\n")
    (folder / "Y.txt").write_text(f"3 {LABELS}\n0:1\n1:1\n2:1\n")
    for columns in (5, 6):
        (folder / f"bow{columns}.txt").write_text(
            f"3 {columns} {LABELS}\n0 0:1 1:1\n1 2:1\n2 4:1\n"
        )
    return folder


def texts(raw: Path, output: Path, *, lower: bool = True) -> Dataset:
    tokenizer = make_tokenizer(output / "tokenizer", lower=lower)
    config = PrepareConfig(
        output / "set",
        str(tokenizer),
        max_length=8,
        train_text=raw / "X.txt",
        train_labels=raw / "Y.txt",
        keep_texts=True,
    )
    return prepare(config)


def bags(raw: Path, output: Path, columns: int) -> Dataset:
    return prepare(
        PrepareConfig(output / "bags", source="bow", train_text=raw / f"bow{columns}.txt")
    )


def refused(
    dataset: Dataset, inputs: TokenInputs | BowInputs, message: str, labels: int = LABELS
) -> None:
    with pytest.raises(InputError, match=message) as told:
        check_dataset(dataset, labels, inputs)
    assert str(dataset.folder) in str(told.value) and "\n" not in str(told.value)


def test_a_model_of_tokens(raw: Path, tmp_path: Path) -> None:
    own = texts(raw, tmp_path / "a")
    inputs = TokenInputs(None, load_tokenizer(own.tokenizer_folder), 8)
    check_dataset(own, LABELS, inputs)
    refused(own, inputs, "expected 4 labels, as the model has, got 3", labels=4)
    other = texts(raw, tmp_path / "b", lower=False)
    refused(other, inputs, "expected tokens of the model's tokenizer, got those of another")
    refused(
        bags(raw, tmp_path, 5), inputs, "expected a dataset of tokens, got one of bags of words"
    )


def test_a_model_of_words(raw: Path, tmp_path: Path) -> None:
    """One with a vocabulary reads texts, whatever their tokenizer; one without reads bags of as
    many columns.
    """
    own, five = texts(raw, tmp_path / "a", lower=False), bags(raw, tmp_path / "b", 5)
    vectorizer = Vectorizer(min_df=1)
    vectorizer.fit(own.splits["train"].texts)
    check_dataset(own, LABELS, BowInputs(None, vectorizer))
    refused(
        five,
        BowInputs(None, vectorizer),
        "expected a dataset of texts, for the model's own vocabulary",
    )
    ready = BowInputs(None, None, columns=5)
    check_dataset(five, LABELS, ready)
    refused(five, ready, "expected 2 labels, as the model has, got 3", labels=2)
    refused(
        bags(raw, tmp_path / "c", 6),
        ready,
        "expected bags of words of 5 columns, as the model was trained on, got 6",
    )
    refused(
        own,
        ready,
        "expected bags of words of 5 columns, as the model was trained on, got one of texts",
    )
