"""Files and settings that do not fit are refused before anything is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from raw_sets import TEST_ROWS, expect, sparse
from xmlkernels.cli.main import main
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.tokens import Tokenizer
from xmlkernels.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::xmlkernels.files.DataWarning")


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
