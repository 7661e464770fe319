"""Both parsers agree on anything, in any chunks; what is written is read bit for bit."""

import errno
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix, random_array
from sklearn.datasets import load_svmlight_file

from sparse_texts import equal
from xmlkernels.data.formats import sparse_python, sparse_text
from xmlkernels.data.formats.sparse_text import (
    read_bow,
    read_sparse,
    write_sparse,
)
from xmlkernels.errors import InputError
from xmlkernels.files import DataWarning


def sparse_rows(cols):
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False).filter(bool)
    return st.lists(st.dictionaries(st.integers(0, cols - 1), finite, max_size=6), max_size=12)


def matrix_of(rows, cols):
    entries = [(r, c, v) for r, row in enumerate(rows) for c, v in row.items()]
    r, c, v = zip(*entries, strict=True) if entries else ((), (), ())
    return csr_matrix(
        (np.array(v, np.float32), (np.array(r, int), np.array(c, int))), shape=(len(rows), cols)
    )


@settings(max_examples=60, deadline=None)
@given(rows=sparse_rows(9))
def test_what_is_written_is_read_bit_for_bit(rows, tmp_path_factory):
    native = pytest.importorskip(
        "xmlkernels._host", reason="the native library is not built"
    ).parse_sparse
    path = tmp_path_factory.mktemp("round") / "m.txt"
    matrix = matrix_of(rows, 9)
    write_sparse(path, matrix)
    content = path.read_bytes()
    start = content.index(b"\n") + 1
    for parse in (native, sparse_python.parse_sparse):
        ((indptr, indices, data),), problem = parse(
            content, start, len(rows), 9, -1, False, False, False, "error", 2
        )
        assert problem is None
        np.testing.assert_array_equal(indptr, matrix.indptr)
        np.testing.assert_array_equal(indices, matrix.indices)
        np.testing.assert_array_equal(data.view(np.uint32), matrix.data.view(np.uint32))


PIECES = [
    "0:1",
    "3:0.25",
    "2",
    "7:1",
    "-1:1",
    "-2",
    "-:1",
    "1:nan",
    "4:1e-50",
    "5:",
    ":1",
    "1,2",
    "5,1",
    "1:2:3",
    "qid:1",
    "qid:x",
    "#",
    " ",
    "\t",
    "\r",
    "\n",
    "\n",
    ",",
    "\x0b",
    "a",
    "1:0x1",
    "1:1e",
    "3:+1",
    "3:.",
    "2:1e400",
    "2:0e999",
    "1:1.17549429e-38",
    "1:123456789012345678",
    "1:0.1234567890123456789",
    "18446744073709551617:1",
    "+1:1",
]


@settings(max_examples=600, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=24),
    glue=st.sampled_from([" ", ""]),
    rows=st.sampled_from([-1, 2, 3]),
    cols=st.sampled_from([-1, 6, 9]),
    mode=st.sampled_from(
        [(True, False, False), (False, True, False), (False, True, True), (False, False, False)]
    ),
    duplicates=st.sampled_from(["error", "sum", "max", "first"]),
)
def test_both_parsers_agree_on_anything(pieces, glue, rows, cols, mode, duplicates):
    native = pytest.importorskip(
        "xmlkernels._host", reason="the native library is not built"
    ).parse_sparse
    text = glue.join(pieces).encode()
    arguments = (text, 0, rows, cols, cols, *mode, duplicates, 2)
    ours, problem = native(*arguments)
    theirs, other = sparse_python.parse_sparse(*arguments)
    assert problem == other
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def many_chunks(rows=24_000):
    """Over 1 MB: several chunks, with what makes a chunk's entries fewer than its bound."""
    rng = np.random.default_rng(3)
    lines = []
    for row in range(rows):
        picked = rng.choice(500, 1 + row % 7, replace=False).tolist()
        labels = ",".join(map(str, sorted(picked))) if row % 5 else ""
        comment = " # 1:1 2:2" if row % 11 == 0 else ""
        lines.append(
            labels
            + " "
            + " ".join(f"{f}:{f / 8 + 1}" for f in picked)
            + (" 499:0" if 499 not in picked else "")
            + comment
        )
    return lines


def test_chunks_and_threads_give_one_answer(write_rows):
    native = pytest.importorskip(
        "xmlkernels._host", reason="the native library is not built"
    ).parse_sparse
    lines = many_chunks()
    text = "\n".join(lines).encode()
    assert len(text) > 800_000
    expected, problem = sparse_python.parse_sparse(
        text, 0, -1, 500, 500, True, False, False, "error"
    )
    assert problem is None
    for threads in (1, 2, 7):
        found, problem = native(text, 0, len(lines), 500, 500, True, False, False, "error", threads)
        assert problem is None
        for a, b in zip(found, expected, strict=True):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y)


def test_the_first_of_several_problems_is_told(write_rows):
    native = pytest.importorskip(
        "xmlkernels._host", reason="the native library is not built"
    ).parse_sparse
    lines = many_chunks()
    for row in range(20_111, len(lines), 50):
        lines[row] = " 1:bad"
    text = "\n".join(lines).encode()
    for _ in range(5):
        assert native(text, 0, -1, 500, 500, True, False, False, "error", 4)[1] == (
            "value",
            20_111,
            b"1:bad",
        )


def test_same_matrix_as_sklearn(parser, write_rows):
    # sklearn reads sorted features only
    lines = []
    for line in many_chunks(2_000):
        labels, _, features = line.partition("#")[0].partition(" ")
        lines.append(
            labels
            + " "
            + " ".join(sorted(features.split(), key=lambda e: int(e.partition(":")[0])))
        )
    features, labels = read_bow(write_rows("\n".join(["2000 500 500", *lines]) + "\n", "train.txt"))
    body = write_rows("\n".join(lines) + "\n", "body.txt")
    expected, rows = load_svmlight_file(
        str(body), n_features=500, dtype=np.float32, multilabel=True, zero_based=True
    )
    assert (features != expected).nnz == 0
    for row, names in enumerate(rows):
        assert labels[row].indices.tolist() == [int(name) for name in names]


def test_writer(tmp_path):
    path = tmp_path / "m.txt"
    matrix = csr_matrix(np.array([[0, 0.1, 1], [0, 0, 0], [3e-7, 0, 16777216]], dtype=np.float64))
    write_sparse(path, matrix)
    assert path.read_text() == "3 3\n1:0.1 2:1\n\n0:3e-07 2:16777216\n"
    assert (read_sparse(path) != matrix.astype(np.float32)).nnz == 0
    write_sparse(tmp_path / "m.txt.gz", matrix)
    assert (read_sparse(tmp_path / "m.txt.gz") != matrix.astype(np.float32)).nnz == 0
    big = csr_matrix(
        random_array((9_000, 50), density=0.05, rng=np.random.default_rng(1), dtype=np.float32)
    )
    write_sparse(path, big)
    assert (read_sparse(path) != big).nnz == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "m.txt",
        "m.txt.gz",
    ]


def test_writer_leaves_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "m.txt"
    write_sparse(path, csr_matrix(np.eye(2)))
    with pytest.raises(InputError, match="row 1, column 0.*finite"):
        write_sparse(path, csr_matrix(np.array([[1, 0], [np.nan, 1]])))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(np, "unique", full)
    with pytest.raises(OSError, match="no space"):
        write_sparse(path, csr_matrix(np.ones((2, 2))))
    assert path.read_text() == "2 2\n0:1\n1:1\n" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="a folder that can be written"):
        write_sparse(tmp_path / "none" / "m.txt", csr_matrix(np.eye(2)))


def test_missing_library_is_told_once(monkeypatch, write_rows):
    monkeypatch.setitem(__import__("sys").modules, "xmlkernels._host", None)
    monkeypatch.delenv("XMLKERNELS_REQUIRE_NATIVE", raising=False)
    sparse_text._parser.cache_clear()
    try:
        path = write_rows("1 2\n1:3\n")
        with pytest.warns(DataWarning, match="not built"):
            equal(read_sparse(path), [[0, 3]])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            equal(read_sparse(path), [[0, 3]])
        sparse_text._parser.cache_clear()
        monkeypatch.setenv("XMLKERNELS_REQUIRE_NATIVE", "1")
        with pytest.raises(ImportError):
            read_sparse(path)
    finally:
        sparse_text._parser.cache_clear()
