"""Sparse text, bags of words and label lines: what is read and what is refused."""

import gzip
import os

import numpy as np
import pytest

from sparse_texts import equal
from xmlkernels.data.formats.sparse_text import (
    read_bow,
    read_label_lines,
    read_sparse,
)
from xmlkernels.errors import InputError


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
def test_matrix(parser, write_rows, text):
    equal(read_sparse(write_rows(text)), [[1, 0, 0, 0.5], [0, -0.2, 0, 0]])


def test_blank_and_comment_lines_are_empty_rows(parser, write_rows):
    equal(read_sparse(write_rows("4 2\n\n1:1\n# none\n\n")), [[0, 0], [0, 1], [0, 0], [0, 0]])


def test_only_a_header(parser, write_rows):
    assert read_sparse(write_rows("0 7\n")).shape == (0, 7)
    assert read_sparse(write_rows("0 7")).shape == (0, 7)
    assert read_sparse(write_rows("2 0\n\n\n")).shape == (2, 0)


def test_without_header(parser, write_rows):
    path = write_rows("0:1 2:3\n\n1:2\n")
    equal(read_sparse(path, header=False), [[1, 0, 3], [0, 0, 0], [0, 2, 0]])
    assert read_sparse(path, header=False, rows=3, cols=9).shape == (3, 9)
    with pytest.raises(InputError, match=r"txt:3: expected 2 rows, got 3"):
        read_sparse(path, header=False, rows=2)


def test_bare_labels_are_ones(parser, write_rows):
    equal(read_sparse(write_rows("2 4\n3 1\n0:0.5 2\n"), bare=True), [[0, 1, 0, 1], [0.5, 0, 1, 0]])


def test_indices_beyond_32_bits(parser, write_rows):
    matrix = read_sparse(write_rows("1 5000000000\n4999999999:2 7:1\n"))
    assert matrix.indices.tolist() == [7, 4999999999] and matrix.data.tolist() == [1, 2]


def test_gzip(parser, write_rows):
    equal(read_sparse(write_rows(gzip.compress(b"1 2\n1:3\n"), "a.txt.gz")), [[0, 3]])


@pytest.mark.parametrize(("policy", "value"), [("sum", 6.5), ("max", 4), ("first", 2)])
def test_duplicates_as_asked(parser, write_rows, policy, value):
    equal(read_sparse(write_rows("1 3\n1:2 0:1 1:0.5 1:4\n"), duplicates=policy), [[1, value, 0]])


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
def test_mistakes_name_file_and_line(parser, write_rows, text, line, expected, got):
    path = write_rows(text)
    with pytest.raises(InputError) as caught:
        read_sparse(path)
    assert caught.value.where == (f"{path}:{line}" if line else str(path))
    assert expected in caught.value.expected
    assert caught.value.got == got
    assert len(str(caught.value)) < 600


def test_shape_that_was_asked_for(parser, write_rows):
    path = write_rows("1 4\n0:1\n")
    with pytest.raises(InputError, match="txt:1: expected 2 rows, got 1"):
        read_sparse(path, rows=2)
    with pytest.raises(InputError, match="txt:1: expected 5 cols, got 4"):
        read_sparse(path, cols=5)


def test_sum_beyond_float32(parser, write_rows):
    with pytest.raises(InputError, match=r"txt:2: .*finite float32"):
        read_sparse(write_rows("1 4\n0:3e38 0:3e38\n"), duplicates="sum")


def test_wrong_arguments(parser, write_rows):
    path = write_rows("1 4\n0:1\n")
    with pytest.raises(InputError, match="duplicates: expected error, sum, max or first"):
        read_sparse(path, duplicates="last")
    with pytest.raises(InputError, match="threads: expected at least 1"):
        read_sparse(path, threads=0)


@pytest.mark.parametrize("cut", [5, 30, -1])
def test_gzip_cut_short(parser, write_rows, cut):
    packed = gzip.compress(b"1000 2\n" + b"1:3\n" * 1000)
    with pytest.raises(InputError, match="whole gzip file"):
        read_sparse(write_rows(packed[:cut], "a.gz"))


def test_gzip_damaged(parser, write_rows):
    packed = bytearray(gzip.compress(os.urandom(2000).hex().encode()))
    packed[100] ^= 255
    with pytest.raises(InputError, match="whole gzip file"):
        read_sparse(write_rows(bytes(packed), "a.gz"))
    with pytest.raises(InputError, match="an empty file"):
        read_sparse(write_rows(gzip.compress(b""), "b.gz"))


def test_missing_and_folder(parser, tmp_path):
    with pytest.raises(InputError, match="no file of that name"):
        read_sparse(tmp_path / "none.txt")
    with pytest.raises(InputError, match="a folder"):
        read_sparse(tmp_path)


def test_a_row_of_a_million_labels(parser, write_rows):
    count = 1_000_000 if parser == "native" else 100_000
    labels = np.random.default_rng(0).permutation(count)
    body = " ".join(f"{label}:1" for label in labels.tolist())
    matrix = read_sparse(write_rows(f"3 {count}\n0:1\n{body}\n5:1\n"))
    assert np.diff(matrix.indptr).tolist() == [1, count, 1]
    np.testing.assert_array_equal(matrix.indices[1:-1], np.arange(count))
    with pytest.raises(InputError, match=r"txt:3: expected every index once.*'17' twice"):
        read_sparse(write_rows(f"3 {count}\n0:1\n{body} 17:1\n5:1\n"))


BOW = "5 4 6\n1,5 0:1 2:0.5\n 3:2\n0:7\n\n4\n"


def test_bow(parser, write_rows):
    features, labels = read_bow(write_rows(BOW, "train.txt"))
    equal(features, [[1, 0, 0.5, 0], [0, 0, 0, 2], [7, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    equal(labels, [[0, 1, 0, 0, 0, 1], [0] * 6, [0] * 6, [0] * 6, [0, 0, 0, 0, 1, 0]])


def test_bow_order_comments_and_qid(parser, write_rows):
    features, labels = read_bow(
        write_rows("2 4 6\r\n5,1 qid:2 2:.5 0:1 # 9,9 9:9\r\n#\r\n", "train.txt")
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
def test_bow_mistakes(parser, write_rows, text, line, expected, got):
    path = write_rows(text, "train.txt")
    with pytest.raises(InputError) as caught:
        read_bow(path)
    assert caught.value.where == f"{path}:{line}"
    assert expected in caught.value.expected and caught.value.got == got


def test_label_lines(parser, write_rows):
    dense = [[0, 1, 0, 1], [0] * 4, [1, 0, 0, 0]]
    for text in ("1,3\n\n0\n", "3 1\n\n0\n", "3, 1,\r\n\r\n0", "1\t3\n \n0\n"):
        equal(read_label_lines(write_rows(text, "Y.trn.txt")), dense)
    assert read_label_lines(write_rows("1,3\n", "Y.trn.txt"), labels=9, rows=1).shape == (1, 9)


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
def test_label_line_mistakes(parser, write_rows, text, line, message):
    path = write_rows(text, "Y.trn.txt")
    with pytest.raises(InputError) as caught:
        read_label_lines(path, labels=4, rows=2)
    assert f"{path}:{line}: " in str(caught.value) and message in str(caught.value)
