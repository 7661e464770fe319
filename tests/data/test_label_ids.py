"""Label files as users write them: far-apart ids, blank lines at the end, names divided in several
ways.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from tiny_tokenizer import make_tokenizer
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.label_ids import MOST_LABELS, label_lines, name_lines
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.raw import Raw, RawSplit
from xmlkernels.errors import InputError
from xmlkernels.files import DataWarning

RAW_IDS = "48213377\n7\n4000000000 7\n"


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """A function that prepares three documents from the files given, and keeps what is told."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "x.txt").write_text("w1 w2\nw3\nw4\n")

    def make(
        labels: str, told: list[str] | None = None, *, output: str = "out", **more: Any
    ) -> Dataset:
        files = {"train_text": tmp_path / "x.txt", "train_labels": tmp_path / "y.txt"}
        for name in [
            name
            for name, value in more.items()
            if isinstance(value, str) and name.endswith(("_text", "_names", "_filter"))
        ]:
            files[name] = tmp_path / f"{name}.txt"
            files[name].write_text(more.pop(name))
        (tmp_path / "y.txt").write_text(labels)
        config = PrepareConfig(
            tmp_path / output, str(tokenizer), 8, keep_texts=True, **files, **more
        )
        return prepare(config, (told if told is not None else []).append)

    return make


def rows(dataset: Dataset, name: str = "train") -> list[list[int]]:
    labels = dataset.splits[name].labels
    return [labels[row].indices.tolist() for row in range(labels.shape[0])]


def test_far_apart_ids_are_refused_or_numbered_anew(made: Any, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"y.txt: .*ids up to 4,000,000,000 .3 in use.; .*--remap-labels"
    ):
        made(RAW_IDS)
    assert not (tmp_path / "out").exists()
    dataset = made(RAW_IDS, remap_labels=True, train_filter="0 7\n2 48213377\n1 5\n")
    assert rows(dataset) == [[1], [0], [0, 2]]
    assert dataset.label_names == [
        "7",
        "48213377",
        "4000000000",
    ]
    assert dataset.splits["train"].filter_pairs.tolist() == [[0, 0], [2, 1]], (
        "those of labels without documents go"
    )
    declared = "3 4000000001\n48213377:1\n7:1\n4000000000:1\n"
    with pytest.raises(
        InputError,
        match="got ids up to 4,000,000,000 .*; number them anew with --remap-labels, .*names$",
    ):
        made(declared, output="b")
    assert rows(made(declared, output="c", remap_labels=True)) == [[1], [0], [2]]


def test_ids_that_are_only_many_are_taken_when_told_so(made: Any) -> None:
    ids = "0\n70000\n5\n"
    with pytest.raises(InputError, match="or say --num-labels 70001 where so many labels exist"):
        made(ids)
    told: list[str] = []
    assert made(ids, told, num_labels=70001).num_labels == 70001
    assert "note: labels: 70,001, of which 69,998 (100.0%) have no document in any split" in told
    assert made("3 70001\n0:1\n70000:1\n5:1\n", output="header").num_labels == 70001
    assert made("0\n9000\n5\n", output="few").num_labels == 9001


def test_names_texts_and_features_follow_new_numbers(made: Any) -> None:
    dataset = made("1\n4\n1 4\n", label_text="w0\nw1\nw2\nw3\nw4\n", remap_labels=True)
    assert dataset.label_names == ["w1", "w4"] and rows(dataset) == [[0], [1], [0, 1]]
    assert dataset.label_tokens is not None
    assert [row.tolist()[1] for row in dataset.label_tokens] == [5, 8]


def test_the_other_splits_decide_too_which_labels_there_are(made: Any, tmp_path: Path) -> None:
    (tmp_path / "test_y.txt").write_text("7 9000000\n")
    more = {"test_text": "w1\n", "test_labels": tmp_path / "test_y.txt", "remap_labels": True}
    dataset = made(RAW_IDS, **more)
    assert dataset.label_names == ["7", "9000000", "48213377", "4000000000"]
    assert rows(dataset, "test") == [[0, 1]]


def raw_of(columns: list[int], labels: int) -> Raw:
    matrix = csr_matrix((np.ones(len(columns)), columns, [0, len(columns)]), shape=(1, labels))
    return Raw({"train": RawSplit(["a"], matrix)})


def test_what_is_told_of_labels() -> None:
    assert label_lines(raw_of([0, 1, 2], 3)) == []
    assert label_lines(raw_of([0, 2], 3)) == [
        "note: labels: 3, of which 1 (33.3%) have no document in any split"
    ]
    assert "begin at 1" in label_lines(raw_of([1, 2, 3], 4))[1]
    assert len(label_lines(raw_of([1, 9], 40))) == 1, (
        "most labels have no document: that label 0 has none says nothing"
    )
    assert label_lines(raw_of([0, MOST_LABELS - 1], MOST_LABELS))[0].startswith(
        "note: labels: 2,147,483,647, of which"
    )
    assert name_lines(["art", "law", "sea", "zoo", "war", "x"]) == [
        "labels: 6, the first 'art', 'law', 'sea', 'zoo', 'war'"
    ]
    assert name_lines(["a; b", "a", "b", "c"])[1].startswith(
        "note: labels: 1 name looks like several in one ('a; b')"
    )
    assert name_lines(["x,y", "z,w", "v"])[1].startswith(
        "note: labels: 2 names look like several in one ('x,y')"
    )
    assert len(name_lines(["Hotels, bars", "law", "war"])) == 1


def test_blank_lines_at_the_end(made: Any) -> None:
    with pytest.warns(DataWarning, match=r"y.txt: 1 blank line behind the last row left out"):
        assert rows(made("0\n1\n3\n\n")) == [[0], [1], [3]]
    with pytest.warns(DataWarning, match=r"y.txt: 2 blank lines behind"):
        assert rows(made("a b\nb\na\n\n \n", output="b", source="attentionxml")) == [
            [0, 1],
            [1],
            [0],
        ]
    with pytest.raises(InputError, match="3 texts in .*got 5 label rows"):
        made("0\n1\n3\n\n2\n", output="c")


def test_blank_lines_at_the_end_of_the_texts(made: Any, tmp_path: Path) -> None:
    made("0\n1\n2\n")
    (tmp_path / "x.txt").write_text("w1\n\n\n\n")
    for number, labels in enumerate(("0\n1\n", "2 2\n0:1\n1:1\n", "2 2\n0\n1\n")):
        with pytest.warns(DataWarning, match=r"x.txt: 2 blank lines behind the last row left out"):
            assert rows(made(labels, output=str(number))) == [[0], [1]]
    (tmp_path / "x.txt").write_text("w1\nw2\n\n")
    with pytest.raises(InputError, match="y.txt:1: expected a clear format"):
        made("2 3\n0\n1\n", output="unclear")
    with pytest.warns(DataWarning):
        assert rows(made("2 3\n0\n1\n", output="clear", label_format="sparse")) == [[0], [1]]


def test_a_blank_last_label_text_is_no_label(made: Any) -> None:
    with pytest.warns(
        DataWarning, match="label_text.txt: 1 blank line behind the last row left out"
    ):
        dataset = made("0\n1\n2\n", label_text="w0\nw1\nw2\n\n")
    assert dataset.num_labels == 3 and dataset.label_names == ["w0", "w1", "w2"]
    with pytest.warns(DataWarning, match="label_names.txt: 2 blank lines behind"):
        assert made("0\n1\n2\n", output="b", label_names="a\nb\nc\n\n\n").label_names == [
            "a",
            "b",
            "c",
        ]
    with pytest.warns(
        DataWarning, match=r"label_text.txt:4: 1 label has no name .the first: label 3"
    ):
        kept = made("3 4\n0:1\n1:1\n2:1\n", output="c", label_text="w0\nw1\nw2\n\n")
    assert kept.num_labels == 4, "the header counts it"
    with pytest.warns(DataWarning, match="no name"):
        assert made("0\n1\n3\n", output="d", label_text="w0\nw1\nw2\n\n").num_labels == 4, (
            "a document has it"
        )
    with pytest.warns(DataWarning, match="no name"):
        assert made("0\n1\n2\n", output="e", label_text="w0\n\nw2\n").label_names == [
            "w0",
            "",
            "w2",
        ]


def test_a_bare_header_over_too_few_rows(made: Any) -> None:
    with pytest.raises(
        InputError,
        match="y.txt:1: .*cut short by one row, or its last row is blank and lacks its line end",
    ):
        made("3 10\n1\n2\n")
    with pytest.warns(DataWarning, match="1 of 3 documents have no label"):
        assert rows(made("3 10\n1\n2\n\n")) == [[1], [2], []]
    with pytest.raises(InputError, match="y.txt:2: expected 3 rows, as the header says, got 1"):
        made("3 10\n1\n", output="b")
    assert rows(made("3 10\n1\n2\n", output="d", label_format="lines")) == [[3, 10], [1], [2]]


def test_divided_names(made: Any) -> None:
    told: list[str] = []
    dataset = made("State aid\tEU law\nEU law\nState aid\n", told, source="attentionxml")
    assert dataset.label_names == ["EU law", "State aid"]
    assert "labels: 2, the first 'EU law', 'State aid'" in told
    assert dataset.manifest["source"]["label_divider"] == "tab"
    assert made("1,101\n7\n101\n", output="b", source="attentionxml").label_names == [
        "1",
        "101",
        "7",
    ]
    other = made("a,b c\nb\nc\n", told, output="c", source="attentionxml", label_divider="space")
    assert other.label_names == ["a,b", "b", "c"]


def test_settings_of_other_sources_are_refused(made: Any) -> None:
    with pytest.raises(InputError, match="--label-divider: expected --source attentionxml"):
        made("0\n1\n2\n", label_divider="comma")
    with pytest.raises(InputError, match="--fields: expected --source lf or attentionxml"):
        made("0\n1\n2\n", fields="title")


def test_keys_of_datasets_that_were_made_before(made: Any, tmp_path: Path) -> None:
    """Settings that came later must not make an old folder one of other inputs."""
    dataset = made("0\n1\n2\n")
    config = PrepareConfig(
        tmp_path / "out",
        str(tmp_path / "tokenizer"),
        8,
        keep_texts=True,
        train_text=tmp_path / "x.txt",
        train_labels=tmp_path / "y.txt",
    )
    assert prepare(config).key == dataset.key
    with pytest.raises(InputError, match="--overwrite"):
        prepare(replace(config, remap_labels=True))
