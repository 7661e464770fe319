"""Small raw files in several layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.data.dataset import Dataset
from xmlkernels.data.tokens import Tokenizer

TRAIN = ["w1 w2", "w3", "", "w4 w5 w6 w7", "w8 W9"]

TEST = ["w10 w11", "w12"]

TRAIN_ROWS = [[0, 2], [1], [], [3], [0, 1, 2]]

TEST_ROWS = [[2], [0, 3]]

NAMES = ["w20", "w21 w22", "w23", "w24"]


def matrix(rows: list[list[int]], labels: int = 4) -> csr_matrix:
    found = np.zeros((len(rows), labels), np.float32)
    for number, row in enumerate(rows):
        found[number, row] = 1
    return csr_matrix(found)


def sparse(rows: list[list[int]], labels: int = 4) -> str:
    return f"{len(rows)} {labels}\n" + "".join(
        " ".join(f"{label}:1" for label in row) + "\n" for row in rows
    )


def text_files(folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    content = {
        "trn_X.txt": "\n".join(TRAIN) + "\n",
        "trn_X_Y.txt": sparse(TRAIN_ROWS),
        "tst_X.txt": "\n".join(TEST) + "\n",
        "tst_X_Y.txt": sparse(TEST_ROWS),
        "Y.txt": "\n".join(NAMES) + "\n",
        "trn_filter.txt": "0 1\n4 3\n2 2\n4 3\n",
        "tst_filter.txt": "1 0\n",
    }
    for name, text in content.items():
        (folder / name).write_text(text)
    return {
        "train_text": folder / "trn_X.txt",
        "train_labels": folder / "trn_X_Y.txt",
        "test_text": folder / "tst_X.txt",
        "test_labels": folder / "tst_X_Y.txt",
        "label_text": folder / "Y.txt",
    }


def expect(
    dataset: Dataset, tokenizer: Tokenizer, *, texts: bool = True, joiner: str = " "
) -> None:
    """The folder holds TRAIN and TEST whole, whatever they were read from; `joiner` stands behind
    the first word.
    """
    assert list(dataset.splits) == ["train", "test"] and dataset.num_labels == 4
    for name, source, rows in (("train", TRAIN, TRAIN_ROWS), ("test", TEST, TEST_ROWS)):
        split = dataset.splits[name]
        joined = [joiner.join(filter(None, text.split(" ", 1))) for text in source]
        assert [row.tolist() for row in split.tokens] == [
            row.tolist() for row in tokenizer.encode_batch(joined, 5)
        ]
        assert (split.labels != matrix(rows)).nnz == 0 and split.labels.shape == (len(rows), 4)
        if texts:
            assert split.texts == source
