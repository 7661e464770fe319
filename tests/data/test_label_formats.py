"""Label matrices from any of the label formats."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from raw_files import lines_of, silent
from xmlkernels.data import formats
from xmlkernels.errors import InputError

# Any label file


LABELS = np.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=np.float32)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trn_X_Y.txt", "3 4\n1:1 3:1\n\n0:1\n"),
        ("trn_X_Y.txt", "3 4\n1 3\n\n0\n"),
        ("trn_X_Y.txt.gz", "\ufeff3 4\r\n1:1 3:1\r\n\r\n0:1\r\n"),
        ("train.txt", "3 9 4\n1,3 0:1\n 1:1\n0\n"),
        ("Y.trn.txt", "1,3\n\n0\n"),
        ("Y.trn.txt", "1 3\n\n0\n"),
        (
            "trn.json",
            lines_of(*({"uid": 1, "title": "", "target_ind": row} for row in ([1, 3], [], [0]))),
        ),
    ],
)
def test_read_labels(write, name, content):
    matrix = silent(formats.read_labels, write(content, name), rows=3, labels=4)
    np.testing.assert_array_equal(matrix.toarray(), LABELS)
    with pytest.raises(InputError, match="expected 2 rows"):
        formats.read_labels(write(content, name), rows=2, labels=4)
    with pytest.raises(InputError, match=f"{name}.*(expected 3 (cols|columns)|from 0 to 2)"):
        formats.read_labels(write(content, name), rows=3, labels=3)


def test_read_labels_npz(tmp_path):
    formats.write_npz(tmp_path / "Y.npz", csr_matrix(LABELS))
    np.testing.assert_array_equal(
        formats.read_labels(tmp_path / "Y.npz", rows=3, labels=4).toarray(), LABELS
    )


def test_a_header_or_a_row(write):
    path = write("3 4\n1 3\n2\n0\n", "Y.txt")
    with pytest.raises(
        InputError,
        match="Y.txt:1: .*clear format, .*--label-format sparse if .*--label-format lines if",
    ):
        formats.read_labels(path)
    assert formats.read_labels(path, rows=3).shape == (3, 4)
    assert formats.read_labels(path, rows=4).shape == (4, 5)
    assert formats.read_labels(path, format="lines").shape == (4, 5)
    # Of three documents, the last without labels and without line end.
    path = write("3 10\n1\n2\n", "Y.txt")
    for rows in (None, 3):
        with pytest.raises(
            InputError, match="Y.txt:1: .*cut short by one row, or its last row is blank and lacks"
        ):
            formats.label_format(path, rows)
    assert formats.label_format(path, 2) == "lines"
    assert formats.read_labels(path, 3, format="lines").shape == (3, 11)
    path = write("3 10\n1\n2\n\n", "Y.txt")
    assert [formats.label_format(path, rows) for rows in (3, 4)] == ["sparse", "lines"]
    assert formats.read_labels(path, 3).toarray().nonzero()[1].tolist() == [1, 2]
    path = write("2 10\n1\n2\n\n\n", "Y.txt")
    assert [formats.label_format(path, rows) for rows in (2, 3, 5)] == ["sparse", "lines", "lines"]
    path = write("9 10\n1\n2\n", "Y.txt")
    assert [formats.label_format(path, rows) for rows in (9, 3, None)] == [
        "sparse",
        "lines",
        "lines",
    ]
    path = write("3 4\n1 3\n2\n0\n", "Y.txt")
    assert formats.read_labels(path, format="sparse").shape == (3, 4)
    assert formats.read_labels(write("2 4\n\n\n", "Y.txt")).shape == (2, 4)
    with pytest.raises(InputError, match="Y.txt:1: expected a header"):
        formats.read_labels(write("2:1 4:1\n3:1\n", "Y.txt"))
    with pytest.raises(InputError, match="format: expected npz"):
        formats.read_labels(path, format="csv")
