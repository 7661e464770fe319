"""Datasets of texts and labels in memory: by name, by id, with a tokenizer and without one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from tiny_tokenizer import make_tokenizer
from xmlkernels import Dataset, InputError, PrepareConfig, prepare
from xmlkernels.data.tokens import load_tokenizer
from xmlkernels.files import DataWarning

TEXTS = ["w1 w2", "w3", "w1 w4\nw5", ""]
NAMES = [["b", "a"], ["c"], [], ["a", "a"]]
IDS: list[list[int]] = [[1, 0], [2], [], [0]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "words")


def test_names_are_numbered_sorted_and_texts_are_tokenised(tmp_path: Path, tokenizer: Path) -> None:
    test = (["w9"], [["c", "b"]])
    made = Dataset.from_texts(
        tmp_path / "d", (TEXTS, NAMES), test=test, tokenizer=tokenizer, max_length=8
    )
    assert (made.label_names, list(made.splits)) == (["a", "b", "c"], ["train", "test"])
    train = made.splits["train"]
    assert train.labels.toarray().tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert made.splits["test"].labels.toarray().tolist() == [[0, 1, 1]]
    expected = load_tokenizer(tokenizer).encode_batch(TEXTS, 8)
    assert [list(row) for row in expected] == [list(train.tokens[n]) for n in range(len(TEXTS))]
    assert train.texts == TEXTS and made.label_tokens is not None and made.propensity == (0.55, 1.5)


def test_it_is_what_prepare_makes_of_the_same_files(tmp_path: Path, tokenizer: Path) -> None:
    texts = [text.replace("\n", " ") for text in TEXTS]
    (tmp_path / "X.txt").write_text("".join(f"{text}\n" for text in texts))
    (tmp_path / "Y.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in IDS))
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    files = prepare(
        PrepareConfig(
            tmp_path / "files",
            str(tokenizer),
            train_text=tmp_path / "X.txt",
            train_labels=tmp_path / "Y.txt",
            label_text=tmp_path / "names.txt",
            label_format="lines",
            keep_texts=True,
        )
    )
    memory = Dataset.from_texts(
        tmp_path / "memory", (texts, IDS), tokenizer=tokenizer, label_names=["a", "b", "c"]
    )
    assert memory.content_hash == files.content_hash


def test_ids_of_any_integers(tmp_path: Path) -> None:
    ids = [np.array([4, 1]), np.array([0]), (2, 2), []]
    made = Dataset.from_texts(tmp_path / "d", (TEXTS, ids), num_labels=7)
    assert made.num_labels == 7 and made.label_names is None
    assert made.splits["train"].labels.indices.tolist() == [1, 4, 0, 2]
    assert Dataset.from_texts(tmp_path / "e", (TEXTS, ids)).num_labels == 5


def test_names_in_an_order_of_ones_own(tmp_path: Path) -> None:
    made = Dataset.from_texts(tmp_path / "d", (TEXTS, NAMES), label_names=["z", "c", "b", "a"])
    assert made.label_names == ["z", "c", "b", "a"]
    assert made.splits["train"].labels.indices.tolist() == [2, 3, 1, 3]


def test_texts_alone_are_for_a_bag_of_words(tmp_path: Path) -> None:
    """Neither tokens nor features: no tokenizer, and none is asked for."""
    made = Dataset.from_texts(tmp_path / "d", (TEXTS, NAMES))
    assert made.splits["train"].texts == TEXTS and made.vocabulary is None
    assert made.manifest["splits"]["train"] == {
        "documents": 4,
        "positives": 4,
        "unlabelled": 1,
        "filter_pairs": 0,
    }
    told = "expected a dataset of tokens, got one of texts alone; train with --encoder bow"
    for wanted in (lambda: made.tokenizer_folder, lambda: made.splits["train"].tokens):
        with pytest.raises(InputError, match=told):
            wanted()
    with pytest.raises(InputError, match="bags of words, got one of texts"):
        made.splits["train"].features  # noqa: B018
    with pytest.raises(InputError, match="vocabulary of bags of words, got neither, and no texts"):
        (tmp_path / "d" / "train" / "texts.jsonl").unlink()
        manifest = tmp_path / "d" / "manifest.json"
        manifest.write_text(manifest.read_text().replace("train/texts.jsonl", "train/gone.jsonl"))
        Dataset.open(tmp_path / "d")


def test_prepare_without_a_tokenizer_keeps_the_texts(tmp_path: Path) -> None:
    (tmp_path / "X.txt").write_text("one\ntwo\n")
    (tmp_path / "Y.txt").write_text("0\n1 0\n")
    told: list[str] = []
    files = {"train_text": tmp_path / "X.txt", "train_labels": tmp_path / "Y.txt"}
    made = prepare(PrepareConfig(tmp_path / "d", **files), told.append)
    assert made.splits["train"].texts == ["one", "two"]
    assert any("no --tokenizer: the texts alone" in line for line in told)
    assert any("texts alone" in line and "2 documents" in line for line in told)


def test_a_validation_share_is_drawn(tmp_path: Path) -> None:
    made = Dataset.from_texts(
        tmp_path / "d", (TEXTS, NAMES), test=(TEXTS, NAMES), validation_share=0.5, seed=1
    )
    assert {name: len(split) for name, split in made.splits.items()} == {
        "train": 2,
        "val": 2,
        "test": 4,
    }


def test_the_same_is_made_once_and_another_never_replaces_it_unasked(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    made = Dataset.from_texts(folder, (TEXTS, NAMES))
    before = (folder / "manifest.json").stat().st_mtime_ns
    again = Dataset.from_texts(folder, (list(TEXTS), NAMES))
    assert again.key == made.key and (folder / "manifest.json").stat().st_mtime_ns == before
    other = [*TEXTS[:-1], "w7"]
    with pytest.raises(InputError, match="these inputs and settings, got one made from others"):
        Dataset.from_texts(folder, (other, NAMES))
    replaced = Dataset.from_texts(folder, (other, NAMES), overwrite=True)
    assert replaced.splits["train"].texts == other
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    with pytest.raises(InputError, match="a free place or a dataset folder, got other files"):
        Dataset.from_texts(tmp_path / "mine", (TEXTS, NAMES), overwrite=True)


def test_a_label_that_training_lacks_is_kept_and_told(tmp_path: Path) -> None:
    with pytest.warns(DataWarning, match="1 labels .* do not occur in the training rows"):
        made = Dataset.from_texts(tmp_path / "d", (TEXTS, NAMES), test=(["w1"], [["new"]]))
    assert made.label_names == ["a", "b", "c", "new"]


@pytest.mark.parametrize(
    ("texts", "labels", "more", "told"),
    [
        ("w1", NAMES, {}, "train texts: expected a list of strings, got one string"),
        ([], [], {}, "train texts: expected one text or more, got none"),
        (["a", 3], [[0], [0]], {}, "train texts, document 1: expected a string, got int"),
        (TEXTS, NAMES[:2], {}, "a list of labels for each text, got 2 lists for 4 texts"),
        (["a"], ["ab"], {}, "document 0: expected a list of labels, got the string 'ab'"),
        (["a"], [[1.5]], {}, r"names \(strings\) or ids \(integers\), got 1.5 \(float\)"),
        (["a"], [[True]], {}, "got True"),
        (["a", "b"], [["x"], [1]], {}, "labels: expected names alone, or ids alone, got both"),
        (["a"], [[-1]], {}, "document 0: expected ids from 0 to 0, got -1"),
        (["a"], [[3]], {"num_labels": 3}, "expected ids from 0 to 2, got 3"),
        (["a"], [[10**7]], {}, "label ids numbered from 0, of which most are used"),
        (["a"], [["x"]], {"label_names": ["y"]}, "names among label_names, got 'x'"),
        (["a"], [[0]], {"label_names": ["y", "y"]}, "each name once, got 'y' twice"),
        (["a"], [[0]], {"label_names": [3]}, "label_names: expected strings, got 3"),
        (["a"], [[0]], {"label_names": ["y"], "num_labels": 2}, "got 2 beside 1 label_names"),
        (TEXTS, NAMES, {"validation_share": 1.0}, "0 or a share below 1, got 1.0"),
        (TEXTS, NAMES, {"max_length": 0}, "max_length: expected at least 1, got 0"),
        (TEXTS, NAMES, {"propensity": (0, 1)}, "positive constants A and B"),
        (TEXTS, NAMES, {"tokenizer": "./nowhere"}, "a folder with tokenizer files"),
        ([[]], [[0]], {}, "document 0: expected a string, got list"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(
    tmp_path: Path, texts: Any, labels: Any, more: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        Dataset.from_texts(tmp_path / "d", (texts, labels), **more)
    assert list(tmp_path.iterdir()) == []


def test_sparse_matrices_of_words_and_labels(tmp_path: Path) -> None:
    """The same labels as lists of ids; bags of words are a dataset of bags, values as given."""
    labels = csr_matrix(np.array([[1, 1, 0], [0, 0, 2], [0, 0, 0], [1, 0, 0]]))
    lists = Dataset.from_texts(tmp_path / "lists", (TEXTS, IDS), num_labels=3)
    made = Dataset.from_texts(tmp_path / "texts", (TEXTS, labels))
    assert made.content_hash == lists.content_hash and made.label_names is None
    words = csr_matrix(np.array([[0.5, 0], [0, -2], [0, 0], [1, 1]]))
    bags = Dataset.from_texts(
        tmp_path / "bags", (words, labels), test=(words[:2], labels[:2]), label_names=list("abc")
    )
    assert bags.vocabulary == 2 and bags.label_names == list("abc")
    assert (bags.splits["train"].features != words).nnz == 0
    assert (bags.splits["test"].labels != lists.splits["train"].labels[:2]).nnz == 0
    held = Dataset.from_texts(tmp_path / "held", (words, labels), validation_share=0.25)
    assert len(held.splits["val"]) == 1 and held.splits["val"].features.shape == (1, 2)
    other = words.copy()
    other.data[0] = 3
    with pytest.raises(InputError, match="one made from others"):
        Dataset.from_texts(tmp_path / "bags", (other, labels), label_names=list("abc"))


@pytest.mark.parametrize(
    ("train", "more", "told"),
    [
        ((csr_matrix((0, 2)), csr_matrix((0, 3))), {}, "train documents: expected one row or more"),
        ((TEXTS, csr_matrix((3, 3))), {}, "expected 4 documents and 3 labels, got 3 and 3"),
        ((TEXTS, csr_matrix((4, 3))), {"num_labels": 5}, "4 documents and 5 labels"),
        ((csr_matrix((4, 2)), IDS), {"tokenizer": "x"}, "got bags of words and a tokenizer"),
        ((csr_matrix((4, 2)), IDS), {"test": (TEXTS, IDS)}, "got both kinds"),
    ],
)
def test_sparse_matrices_that_do_not_fit(
    tmp_path: Path, train: Any, more: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        Dataset.from_texts(tmp_path / "d", train, **more)
