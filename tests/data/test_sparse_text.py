"""Sparse text: both parsers against the same cases, then against each other."""

import errno
import gzip
import os
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix, random_array
from sklearn.datasets import load_svmlight_file

from xmlkernels.data.formats import sparse_python, sparse_text
from xmlkernels.data.formats.sparse_text import (
    read_bow,
    read_label_lines,
    read_sparse,
    write_sparse,
)
from xmlkernels.errors import InputError
from xmlkernels.files import DataWarning


@pytest.fixture(params=["native", "python"])
def parser(request, monkeypatch):
    chosen = sparse_python.parse_sparse
    if request.param == "native":
        chosen = pytest.importorskip(
            "xmlkernels._host", reason="the native library is not built"
        ).parse_sparse
    monkeypatch.setattr(sparse_text, "_parser", lambda: chosen)
    return request.param


@pytest.fixture
def write(tmp_path):
    def write_file(content, name="trn_X_Y.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def equal(matrix, dense):
    assert matrix.format == "csr" and matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix.toarray(), np.array(dense, dtype=np.float32))
    fresh = csr_matrix((matrix.data, matrix.indices, matrix.indptr), shape=matrix.shape)
    assert fresh.has_canonical_format and (fresh.data != 0).all()


@pytest.mark.parametrize(
    "text",
    [
        "2 4\n0:1 3:0.5\n1:-2e-1\n",
        "2 4\r\n0:1 3:0.5\r\n1:-2e-1\r\n",
        "2 4\n0:1 3:0.5\n1:-2e-1",
        "\ufeff2 4\n0:1 3:0.5\n1:-2e-1",
        "2 4 # a comment\n  0:1\t3:.5 \n1:-0.2 # 2:1\n",
        "2 4\nqid:7 0:1 3:5.e-1\nqid:8 1:-.2\n\n  \n",
        "2 4\n3:+0.5 0:1.000000\n1:-0.2000000000000000000000001 2:0 3:-0.0 0:1e-400#end\n",
    ],
)
def test_matrix(parser, write, text):
    equal(read_sparse(write(text)), [[1, 0, 0, 0.5], [0, -0.2, 0, 0]])


def test_blank_and_comment_lines_are_empty_rows(parser, write):
    equal(read_sparse(write("4 2\n\n1:1\n# none\n\n")), [[0, 0], [0, 1], [0, 0], [0, 0]])


def test_only_a_header(parser, write):
    assert read_sparse(write("0 7\n")).shape == (0, 7)
    assert read_sparse(write("0 7")).shape == (0, 7)
    assert read_sparse(write("2 0\n\n\n")).shape == (2, 0)


def test_without_header(parser, write):
    path = write("0:1 2:3\n\n1:2\n")
    equal(read_sparse(path, header=False), [[1, 0, 3], [0, 0, 0], [0, 2, 0]])
    assert read_sparse(path, header=False, rows=3, cols=9).shape == (3, 9)
    with pytest.raises(InputError, match=r"txt:3: expected 2 rows, got 3"):
        read_sparse(path, header=False, rows=2)


def test_bare_labels_are_ones(parser, write):
    equal(read_sparse(write("2 4\n3 1\n0:0.5 2\n"), bare=True), [[0, 1, 0, 1], [0.5, 0, 1, 0]])


def test_indices_beyond_32_bits(parser, write):
    matrix = read_sparse(write("1 5000000000\n4999999999:2 7:1\n"))
    assert matrix.indices.tolist() == [7, 4999999999] and matrix.data.tolist() == [1, 2]


def test_gzip(parser, write):
    equal(read_sparse(write(gzip.compress(b"1 2\n1:3\n"), "a.txt.gz")), [[0, 3]])


@pytest.mark.parametrize(("policy", "value"), [("sum", 6.5), ("max", 4), ("first", 2)])
def test_duplicates_as_asked(parser, write, policy, value):
    equal(read_sparse(write("1 3\n1:2 0:1 1:0.5 1:4\n"), duplicates=policy), [[1, value, 0]])


@pytest.mark.parametrize(
    ("text", "line", "expected", "got"),
    [
        ("3 4\n0:1\n1:1\n", 3, "3 rows", "2"),  # cut short
        ("1 4\n0:1\n1:1\n", 3, "1 rows", "2"),
        ("", 0, "at least one line", "an empty file"),
        ("0:1 1:1\n", 1, "a header of 2 numbers `rows cols`", "'0:1 1:1'"),
        ("1 2 3\n0:1\n", 1, "a header of 2 numbers `rows cols`", "'1 2 3'"),
        ("1 -2\n0:1\n", 1, "a header of 2 numbers `rows cols`", "'1 -2'"),
        ("2 4\n0:1\n4:1\n", 3, "index from 0 to 3", "'4:1'"),
        ("2 4\n0:1\n-1:1\n", 3, "index from 0 to 3", "'-1:1'"),
        (
            "1 4\n99999999999999999999999999:1\n",
            2,
            "index from 0 to 3",
            "'99999999999999999999999999:1'",
        ),
        ("1 4\nthree:1\n", 2, "`index:value` with a whole number", "'three:1'"),
        ("1 4\n1.5:1\n", 2, "`index:value` with a whole number", "'1.5:1'"),
        ("1 4\n1 :2\n", 2, "`index:value`", "'1'"),
        ("1 4\n0:1 qid:3\n", 2, "`index:value` with a whole number", "'qid:3'"),
        ("1 4\n0:1 2:nan\n", 2, "a finite float32 number", "'2:nan'"),
        ("1 4\n0:1 2:-inf\n", 2, "a finite float32 number", "'2:-inf'"),
        ("1 4\n0:1e39\n", 2, "a finite float32 number", "'0:1e39'"),
        ("1 4\n0:1e999\n", 2, "a finite float32 number", "'0:1e999'"),
        ("1 4\n0:x\n", 2, "a finite float32 number", "'0:x'"),
        ("1 4\n0:\n", 2, "a finite float32 number", "'0:'"),
        ("1 4\n0:1:2\n", 2, "a finite float32 number", "'0:1:2'"),
        ("1 4\n0:+-1\n", 2, "a finite float32 number", "'0:+-1'"),
        ("1 4\n0:1_0\n", 2, "a finite float32 number", "'0:1_0'"),
        ("1 4\n0:1\x00\n", 2, "UTF-8 text", "a NUL byte, as binary files hold"),
        ("2 4\n\n3:1 1:1 3:2\n", 3, "every index once in a row", "'3' twice"),
        ("2 4\n0:1\n" + "9" * 500 + "x:1\n", 3, "`index:value`", "'" + "9" * 40 + "'…"),
    ],
)
def test_mistakes_name_file_and_line(parser, write, text, line, expected, got):
    path = write(text)
    with pytest.raises(InputError) as caught:
        read_sparse(path)
    assert caught.value.where == (f"{path}:{line}" if line else str(path))
    assert expected in caught.value.expected
    assert caught.value.got == got
    assert len(str(caught.value)) < 600


def test_shape_that_was_asked_for(parser, write):
    path = write("1 4\n0:1\n")
    with pytest.raises(InputError, match="txt:1: expected 2 rows, got 1"):
        read_sparse(path, rows=2)
    with pytest.raises(InputError, match="txt:1: expected 5 cols, got 4"):
        read_sparse(path, cols=5)


def test_sum_beyond_float32(parser, write):
    with pytest.raises(InputError, match=r"txt:2: .*finite float32"):
        read_sparse(write("1 4\n0:3e38 0:3e38\n"), duplicates="sum")


def test_wrong_arguments(parser, write):
    path = write("1 4\n0:1\n")
    with pytest.raises(InputError, match="duplicates: expected error, sum, max or first"):
        read_sparse(path, duplicates="last")
    with pytest.raises(InputError, match="threads: expected at least 1"):
        read_sparse(path, threads=0)


@pytest.mark.parametrize("cut", [5, 30, -1])
def test_gzip_cut_short(parser, write, cut):
    packed = gzip.compress(b"1000 2\n" + b"1:3\n" * 1000)
    with pytest.raises(InputError, match="whole gzip file"):
        read_sparse(write(packed[:cut], "a.gz"))


def test_gzip_damaged(parser, write):
    packed = bytearray(gzip.compress(os.urandom(2000).hex().encode()))
    packed[100] ^= 255
    with pytest.raises(InputError, match="whole gzip file"):
        read_sparse(write(bytes(packed), "a.gz"))
    with pytest.raises(InputError, match="an empty file"):
        read_sparse(write(gzip.compress(b""), "b.gz"))


def test_missing_and_folder(parser, tmp_path):
    with pytest.raises(InputError, match="no file of that name"):
        read_sparse(tmp_path / "none.txt")
    with pytest.raises(InputError, match="a folder"):
        read_sparse(tmp_path)


def test_a_row_of_a_million_labels(parser, write):
    count = 1_000_000 if parser == "native" else 100_000
    labels = np.random.default_rng(0).permutation(count)
    body = " ".join(f"{label}:1" for label in labels.tolist())
    matrix = read_sparse(write(f"3 {count}\n0:1\n{body}\n5:1\n"))
    assert np.diff(matrix.indptr).tolist() == [1, count, 1]
    np.testing.assert_array_equal(matrix.indices[1:-1], np.arange(count))
    with pytest.raises(InputError, match=r"txt:3: expected every index once.*'17' twice"):
        read_sparse(write(f"3 {count}\n0:1\n{body} 17:1\n5:1\n"))


BOW = "5 4 6\n1,5 0:1 2:0.5\n 3:2\n0:7\n\n4\n"


def test_bow(parser, write):
    features, labels = read_bow(write(BOW, "train.txt"))
    equal(features, [[1, 0, 0.5, 0], [0, 0, 0, 2], [7, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    equal(labels, [[0, 1, 0, 0, 0, 1], [0] * 6, [0] * 6, [0] * 6, [0, 0, 0, 0, 1, 0]])


def test_bow_order_comments_and_qid(parser, write):
    features, labels = read_bow(
        write("2 4 6\r\n5,1 qid:2 2:.5 0:1 # 9,9 9:9\r\n#\r\n", "train.txt")
    )
    equal(features, [[1, 0, 0.5, 0], [0] * 4])
    equal(labels, [[0, 1, 0, 0, 0, 1], [0] * 6])


@pytest.mark.parametrize(
    ("text", "line", "expected", "got"),
    [
        ("1 4\n1 0:1\n", 1, "a header of 3 numbers `rows features labels`", "'1 4'"),
        ("1 4 6\n1,6 0:1\n", 2, "label id from 0 to 5", "'6'"),
        ("1 4 6\n1,-1 0:1\n", 2, "label id from 0 to 5", "'-1'"),
        ("1 4 6\n1,,2 0:1\n", 2, "label ids divided by commas", "''"),
        ("1 4 6\n1,x 0:1\n", 2, "label ids divided by commas", "'x'"),
        ("1 4 6\n1, 2 0:1\n", 2, "label ids divided by commas", "''"),
        ("1 4 6\n1 2 0:1\n", 2, "`index:value`", "'2'"),
        ("1 4 6\n 2 0:1\n", 2, "`index:value`", "'2'"),
        ("1 4 6\n1 4:1\n", 2, "index from 0 to 3", "'4:1'"),
        ("2 4 6\n1 0:1\n3,2,3 0:1\n", 3, "every label id once in a row", "'3' twice"),
        ("1 4 6\n1 0:1 0:2\n", 2, "every index once in a row", "'0' twice"),
        ("2 4 6\n1 0:1\n", 2, "2 rows", "1"),
    ],
)
def test_bow_mistakes(parser, write, text, line, expected, got):
    path = write(text, "train.txt")
    with pytest.raises(InputError) as caught:
        read_bow(path)
    assert caught.value.where == f"{path}:{line}"
    assert expected in caught.value.expected and caught.value.got == got


def test_label_lines(parser, write):
    dense = [[0, 1, 0, 1], [0] * 4, [1, 0, 0, 0]]
    for text in ("1,3\n\n0\n", "3 1\n\n0\n", "3, 1,\r\n\r\n0", "1\t3\n \n0\n"):
        equal(read_label_lines(write(text, "Y.trn.txt")), dense)
    assert read_label_lines(write("1,3\n", "Y.trn.txt"), labels=9, rows=1).shape == (1, 9)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("1\n1,4\n", 2, "expected label id from 0 to 3, got '4'"),
        ("1\n1,,2\n", 2, "expected a label id between two commas"),
        (
            "1\nart\n",
            2,
            "label ids, divided by spaces or commas, got 'art'; mend the line; label names in "
            "place of",
        ),
        (
            "1\n2,2\n",
            2,
            "every label id once in a row, got '2' twice; leave one out, or count it once with "
            "--merge-",
        ),
        ("1\n2\n3\n", 3, "expected 2 rows, got 3"),
    ],
)
def test_label_line_mistakes(parser, write, text, line, message):
    path = write(text, "Y.trn.txt")
    with pytest.raises(InputError) as caught:
        read_label_lines(path, labels=4, rows=2)
    assert f"{path}:{line}: " in str(caught.value) and message in str(caught.value)


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
]
PIECES += [
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
]
PIECES += [
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


def test_chunks_and_threads_give_one_answer(write):
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


def test_the_first_of_several_problems_is_told(write):
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


def test_same_matrix_as_sklearn(parser, write):
    # sklearn reads sorted features only
    lines = []
    for line in many_chunks(2_000):
        labels, _, features = line.partition("#")[0].partition(" ")
        lines.append(
            labels
            + " "
            + " ".join(sorted(features.split(), key=lambda e: int(e.partition(":")[0])))
        )
    features, labels = read_bow(write("\n".join(["2000 500 500", *lines]) + "\n", "train.txt"))
    body = write("\n".join(lines) + "\n", "body.txt")
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


def test_missing_library_is_told_once(monkeypatch, write):
    monkeypatch.setitem(__import__("sys").modules, "xmlkernels._host", None)
    monkeypatch.delenv("XMLKERNELS_REQUIRE_NATIVE", raising=False)
    sparse_text._parser.cache_clear()
    try:
        path = write("1 2\n1:3\n")
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
