"""`xmlkernels prepare` on tables: every flag arrives, and the profile is shown."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from own_tables import LABELS, write
from xmlkernels import Dataset
from xmlkernels.cli import prepare


def test_a_table_is_prepared_by_its_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path, "a.csv")
    words = ["--data", str(data), "--label-separator", ";", "--text", "text", "id"]
    words += ["--text-separator", " / ", "--validation-share", "0.2", "--test-share", "0.2"]
    prepare.main([*words, "--output", str(tmp_path / "d")])
    dataset = Dataset.open(tmp_path / "d")
    assert list(dataset.splits) == ["train", "val", "test"]
    assert dataset.label_names == list(LABELS)
    assert all(" / " in text for text in dataset.splits["test"].texts)
    told = capsys.readouterr()
    assert told.out.startswith(f"{tmp_path / 'd'}: 5 labels, content ")
    assert "documents per label, by tenths of the labels: " in told.err
