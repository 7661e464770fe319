"""Matrices in .npz files, filter pairs and token maps."""

import zipfile

import numpy as np
import pytest
import scipy.sparse
from scipy.sparse import csr_matrix

from raw_files import silent
from xmlkernels.data import formats
from xmlkernels.errors import InputError
from xmlkernels.files import DataWarning

# scipy .npz


DENSE = np.array([[0, 1.5, 0], [0, 0, 0], [2, 0, 1]], dtype=np.float32)


@pytest.mark.parametrize("layout", ["csr", "csc", "coo", "bsr", "dia"])
@pytest.mark.parametrize("kind", [scipy.sparse.csr_matrix, scipy.sparse.csr_array])
def test_npz_of_scipy(tmp_path, layout, kind):
    path = tmp_path / "Y.trn.npz"
    scipy.sparse.save_npz(path, kind(DENSE.astype(np.float64)).asformat(layout))
    matrix = formats.read_npz(path, rows=3, cols=3)
    assert type(matrix) is csr_matrix and matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix.toarray(), DENSE)


def test_npz_keeps_stored_zeros_where_they_are_scores(tmp_path):
    scores = csr_matrix(
        (np.array([0, 2], np.float32), np.array([1, 0]), np.array([0, 1, 2])), (2, 3)
    )
    formats.write_npz(tmp_path / "s.npz", scores, keep_zeros=True)
    assert formats.read_npz(tmp_path / "s.npz", keep_zeros=True).indices.tolist() == [1, 0]
    assert formats.read_npz(tmp_path / "s.npz").nnz == 1
    formats.write_npz(tmp_path / "s.npz", scores)
    assert formats.read_npz(tmp_path / "s.npz", keep_zeros=True).nnz == 1


def test_npz_round_trip(tmp_path):
    path = tmp_path / "m.npz"
    formats.write_npz(path, csr_matrix(DENSE))
    first = path.read_bytes()
    np.testing.assert_array_equal(formats.read_npz(path).toarray(), DENSE)
    np.testing.assert_array_equal(scipy.sparse.load_npz(path).toarray(), DENSE)
    formats.write_npz(path, csr_matrix(DENSE))
    assert path.read_bytes() == first and list(tmp_path.iterdir()) == [path]


def save(path, **changes):
    parts = {
        "format": b"csr",
        "shape": np.array([3, 3]),
        "data": np.ones(3),
        "indices": [1, 0, 2],
        "indptr": [0, 1, 1, 3],
    }
    np.savez(path, **{k: np.asarray(v) for k, v in (parts | changes).items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": [1, np.nan, 1]}, "row 2, column 0: expected a finite float32 value, got nan"),
        ({"data": [1, 1, 1e39]}, "row 2, column 2: expected a finite float32 value, got inf"),
        ({"data": [1, 1, 1j]}, "expected real numbers"),
        ({"indices": [1, 0, 3]}, "indices, entry 2: expected indices from 0 to 2, got 3"),
        ({"indices": [1, 0, -1]}, "indices, entry 2: expected indices from 0 to 2, got -1"),
        ({"indptr": [0, 2, 1, 3]}, "indptr, entry 2: expected at least 2, as before it, got 1"),
        (
            {"indptr": [0, 2, 1, 0]},
            "indptr, entry 2: expected at least 2",
        ),  # scipy looks at none where the last is 0
        ({"indices": [1, 2, 2]}, "row 2, column 2: expected one entry, got two"),
        (
            {"data": [object(), 1, 2]},
            "data: expected an array of numbers, got one of Python objects, which is a pickle",
        ),
    ],
)
def test_npz_mistakes(tmp_path, changes, message):
    path = tmp_path / "Y.npz"
    save(path, **changes)
    with pytest.raises(InputError, match=message) as caught:
        formats.read_npz(path)
    assert str(path) in str(caught.value)


def test_npz_duplicates_merged_when_asked_and_zeros_dropped(tmp_path):
    save(tmp_path / "Y.npz", indices=[1, 2, 2], data=[0, 1, 1])
    matrix = formats.read_npz(tmp_path / "Y.npz", merge_duplicates=True)
    assert matrix.toarray()[2, 2] == 2 and matrix.nnz == 1


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_npz_wrong_files(tmp_path, write):
    save(tmp_path / "Y.npz")
    with pytest.raises(InputError, match="Y.npz: expected 4 rows, got 3"):
        formats.read_npz(tmp_path / "Y.npz", rows=4)
    with pytest.raises(InputError, match="Y.npz: expected 4 columns, got 3"):
        formats.read_npz(tmp_path / "Y.npz", cols=4)
    whole = (tmp_path / "Y.npz").read_bytes()
    np.save(tmp_path / "trap.npy", np.array([Trap()], object), allow_pickle=True)
    trap = (tmp_path / "trap.npy").read_bytes()
    for content in (b"text", whole[: len(whole) // 2], trap):
        with pytest.raises(InputError, match="cannot be read"):
            formats.read_npz(write(content, "bad.npz"))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as file:
        file.writestr("a.txt", "b")
    with pytest.raises(InputError, match="the array 'format' is missing"):
        formats.read_npz(tmp_path / "other.npz")
    with pytest.raises(InputError, match="expected a scipy sparse matrix"):
        formats.write_npz(tmp_path / "dense.npz", DENSE)


# Filter pairs


def test_filter_pairs(write, tmp_path):
    pairs = formats.read_filter_pairs(write("3 7\n\n0\t1\r\n3 2"), rows=4, labels=8)
    assert pairs.dtype == np.int64 and pairs.tolist() == [[3, 7], [0, 1], [3, 2]]
    assert formats.read_filter_pairs(write("")).shape == (0, 2)
    formats.write_filter_pairs(tmp_path / "f.txt", pairs)
    np.testing.assert_array_equal(formats.read_filter_pairs(tmp_path / "f.txt"), pairs)
    formats.write_filter_pairs(tmp_path / "f.txt", np.empty((0, 2), np.int64))
    assert (tmp_path / "f.txt").read_bytes() == b""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("4 0", "expected a row from 0 to 3, got '4'"),
        ("0 8", "expected a label from 0 to 7, got '8'"),
        ("-1 0", "expected `row label`, two ids from 0, got '-1 0'"),
        ("1", "got '1'"),
        ("1 2 3", "got '1 2 3'"),
        ("a b", "got 'a b'"),
        ("9999999999999999999 0", "expected a row from 0 to 3"),
        ("0 " + "1" * 5000, "expected `row label`, two ids from 0"),
        ("0 0" + " " * 5000, "expected `row label`, two ids from 0"),
    ],
)
def test_filter_pair_mistakes(write, line, message):
    path = write(f"0 0\n{line}\n")
    with pytest.raises(InputError) as caught:
        formats.read_filter_pairs(path, rows=4, labels=8)
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)


@pytest.mark.parametrize("pairs", [np.ones((2, 3), int), np.array([[0, -1]]), np.array([[0.5, 1]])])
def test_filter_pairs_that_cannot_be_written(tmp_path, pairs):
    with pytest.raises(InputError, match="whole numbers from 0"):
        formats.write_filter_pairs(tmp_path / "f.txt", pairs)
    assert not list(tmp_path.iterdir())


# Documents without labels


def test_drop_unlabelled():
    labels = csr_matrix(np.array([[0, 1], [0, 0], [1, 1], [0, 0]]))
    with pytest.warns(
        DataWarning, match=r"Y.txt: 2 of 4 documents have no label .first: row 1.; dropped"
    ):
        rows = formats.drop_unlabelled(labels, keep=False, name="Y.txt")
    assert rows.tolist() == [0, 2] and rows.dtype == np.int64
    pairs = np.array([[0, 1], [1, 1], [2, 0], [3, 0], [2, 1]])
    assert formats.select_pairs(pairs, rows).tolist() == [[0, 1], [1, 0], [1, 1]]
    assert formats.select_pairs(np.empty((0, 2), np.int64), rows).shape == (0, 2)
    with pytest.warns(DataWarning, match="kept"):
        assert formats.drop_unlabelled(labels, keep=True, name="Y.txt").tolist() == [0, 1, 2, 3]
    assert silent(formats.drop_unlabelled, labels[[0, 2]], keep=False, name="Y.txt").tolist() == [
        0,
        1,
    ]
    with pytest.raises(
        InputError, match="Y.txt: expected documents with labels, got 2 without any"
    ):
        formats.drop_unlabelled(labels[[1, 3]], keep=True, name="Y.txt")


# Renee's token maps


def test_token_maps(tmp_path):
    ids = np.array([[101, 5, 102, 0], [101, 102, 0, 0], [1, 2, 3, 4]], dtype=np.int64)
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=np.int64)
    ids.tofile(tmp_path / "trn_doc_input_ids.dat")
    mask.tofile(tmp_path / "trn_doc_attention_mask.dat")
    read_ids, read_mask = formats.open_token_maps(tmp_path / "trn_doc", rows=3, max_length=4)
    assert isinstance(read_ids, np.memmap)
    assert read_ids.dtype == np.int64
    assert not read_ids.flags.writeable
    np.testing.assert_array_equal(read_ids, ids)
    np.testing.assert_array_equal(read_mask, mask)
    rows = formats.token_rows(read_ids, read_mask, 1, 3, "trn_doc")
    assert [row.tolist() for row in rows] == [[101, 102], [1, 2, 3, 4]]
    path = tmp_path / "trn_doc_input_ids.dat"
    with pytest.raises(
        InputError,
        match=r"64 bytes .2 rows × 4 tokens × 8., got 96 bytes; .* max_length 6 for 2 rows or 3 "
        r"rows of max_length 4",
    ):
        formats.open_token_map(path, rows=2, max_length=4)
    with pytest.raises(
        InputError, match=r"120 bytes .*got 96 bytes; its size fits max_length 4 for 3 rows"
    ):
        formats.open_token_map(path, rows=3, max_length=5)
    with pytest.raises(InputError, match="rows: expected at least 1, got 0"):
        formats.open_token_map(path, rows=0, max_length=5)
    mask[1, 2] = 2
    with pytest.raises(
        InputError, match="trn_doc, row 1: expected an attention mask of 0 and 1, got 2"
    ):
        formats.token_rows(ids, mask, 1, 3, "trn_doc")
    ids[0, 1] = -4
    with pytest.raises(InputError, match="trn_doc, row 0: expected token ids from 0, got -4"):
        formats.token_rows(ids, mask, 0, 1, "trn_doc")
