"""Texts, LF JSON, string labels, npz, filter pairs, token maps, and what chooses between them."""

import gzip
import json
import warnings
import zipfile

import numpy as np
import pytest
import scipy.sparse
from scipy.sparse import csr_matrix

from xmlkernels.data import formats
from xmlkernels.errors import InputError
from xmlkernels.files import DataWarning


@pytest.fixture
def write(tmp_path):
    def write_file(content, name="trn_X.txt"):
        path = tmp_path / name
        content = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write_file


def silent(read, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read(*arguments, **options)


# Text lines


@pytest.mark.parametrize("name", ["trn_X.txt", "trn_X.txt.gz"])
def test_lines(write, name):
    text = "one\u2028still one\r\ntwo\x0b\x0c\x1c\x85still two\rthree\n\n fünf \n"
    expected = ["one\u2028still one", "two\x0b\x0c\x1c\x85still two", "three", "", " fünf "]
    assert silent(formats.read_lines, write(text, name)) == expected
    assert silent(formats.read_lines, write("\ufeff" + text.rstrip("\n"), name)) == expected
    assert silent(formats.read_lines, write("\n", name)) == [""]


def test_broken_utf8_is_replaced_counted_and_told_once(write):
    path = write(b"fine\n\xc3\xa9t\xc3 \xe2\x82 \xff\nfine \xc3\xa9\n\x80\n")
    with pytest.warns(DataWarning) as told:
        assert formats.read_lines(path) == ["fine", "ét\ufffd \ufffd \ufffd", "fine é", "\ufffd"]
    assert len(told) == 1
    assert f"{path}:2: not UTF-8" in str(told[0].message) and "in 2 lines" in str(told[0].message)


def test_broken_utf8_across_a_read_buffer(write):
    line = "é" * 5000
    with pytest.warns(DataWarning, match="in 1 line of"):
        texts = formats.read_lines(write(f"{line}\n".encode() * 4 + b"\xe9\n" + line.encode()))
    assert texts == [line] * 4 + ["\ufffd", line]


@pytest.mark.parametrize("name", ["trn_X.txt", "trn_X.txt.gz"])
def test_empty_utf16_missing_and_cut_short(write, tmp_path, name):
    with pytest.raises(InputError, match="an empty file"):
        formats.read_lines(write("", name))
    with pytest.raises(InputError, match=":1: expected UTF-8 text, got UTF-16"):
        formats.read_lines(write("text".encode("utf-16"), name))
    with pytest.raises(InputError, match="no file of that name"):
        formats.read_lines(tmp_path / "none.txt")
    packed = gzip.compress(b"line\n" * 1000)
    (tmp_path / "cut.gz").write_bytes(packed[:-10])
    with pytest.raises(
        InputError, match="cut.gz: expected a whole gzip file, got one that is cut short"
    ):
        formats.read_lines(tmp_path / "cut.gz")


def test_lines_are_streamed(write):
    lines = formats.iter_lines(write("a\nb\n"))
    assert next(lines) == "a"
    lines.close()


def test_write_lines(tmp_path):
    path = tmp_path / "Y.txt"
    formats.write_lines(path, ["a", "", "ü\u2028b"])
    assert path.read_bytes() == "a\n\nü\u2028b\n".encode()
    assert formats.read_lines(path) == [
        "a",
        "",
        "ü\u2028b",
    ]
    with pytest.raises(InputError, match="text 1 for .*expected one line"):
        formats.write_lines(path, ["a", "b\nc"])
    assert formats.read_lines(path) == ["a", "", "ü\u2028b"] and list(tmp_path.iterdir()) == [path]


def test_same_length(write):
    silent(formats.check_same_length, "X.txt", 3, "Y.txt", 3)
    with pytest.raises(
        InputError,
        match=r"X.txt:3: expected 5 texts in X.txt and as many .* Y.txt, got 2 label rows",
    ):
        formats.check_same_length("X.txt", 5, "Y.txt", 2)
    with pytest.raises(InputError, match=r"Y.txt:2: .*X.txt is cut short"):
        formats.check_same_length("X.txt", 1, "Y.txt", 2)


# AttentionXML


def test_raw_texts(write):
    path = write("a title /SEP/ a body /SEP/ more\nonly body\n/SEP/b\n", "train_raw_texts.txt")
    assert formats.read_raw_texts(path) == ["a title a body more", "only body", "b"]
    assert formats.read_raw_texts(path, joiner=" [SEP] ") == [
        "a title [SEP] a body [SEP] more",
        "only body",
        "b",
    ]
    assert formats.read_raw_texts(path, part="title") == ["a title", "", ""]
    assert formats.read_raw_texts(path, part="body") == ["a body /SEP/ more", "only body", "b"]
    with pytest.raises(InputError, match="part: expected all, title or body"):
        formats.read_raw_texts(path, part="bodies")


@pytest.mark.parametrize(
    ("content", "divider", "rows"),
    [
        (
            "zoo art\n\nart  10 \u00c4\u00a0b\r\n",
            "space",
            [["zoo", "art"], [], ["art", "10", "\u00c4\u00a0b"]],
        ),
        ("State aid\tEU law\nEU law\n", "tab", [["State aid", "EU law"], ["EU law"]]),
        ("State aid\nart, law\tfish\t\n", "tab", [["State aid"], ["art, law", "fish"]]),
        (
            "aid eu_law\nfish trade\t\n\tx y\n",
            "space",
            [["aid", "eu_law"], ["fish", "trade"], ["x", "y"]],
        ),  # stray tabs
        ("1,101\n7\n101\n", "comma", [["1", "101"], ["7"], ["101"]]),
        (
            "sports, news\nnews\nmusic,sports\n",
            "comma",
            [["sports", "news"], ["news"], ["music", "sports"]],
        ),
        ("State aid, EU law\nEU law\n", "comma", [["State aid", "EU law"], ["EU law"]]),
        (
            "art,history books\nlaw books\nzoo books\n",
            "space",
            [["art,history", "books"], ["law", "books"], ["zoo", "books"]],
        ),
        ("a\nb\n", "space", [["a"], ["b"]]),
        ("a,\nb\n", "space", [["a,"], ["b"]]),
    ],
)
def test_string_labels(write, content, divider, rows):
    path = write(content, "train_labels.txt")
    assert formats.label_divider([path]) == divider
    assert (
        formats.read_label_strings(path)
        == formats.read_label_strings(path, divider=divider)
        == rows
    )


def test_string_labels_of_several_splits_are_divided_alike(write):
    train, test = write("State aid\tart\n", "train.txt"), write("State aid\n", "test.txt")
    assert formats.label_divider([test, train]) == "tab"
    assert formats.read_label_strings(test, divider="tab") == [["State aid"]]
    assert formats.read_label_strings(test, divider="comma") == [["State aid"]]
    with pytest.raises(InputError, match="divider: expected tab, comma or space"):
        formats.read_label_strings(test, divider=";")


def test_string_labels_twice_in_a_row(write):
    twice = write("a\nb c b\n", "twice.txt")
    with pytest.raises(
        InputError, match="twice.txt:2: .*once in a row, got 'b' twice; .*--merge-duplicates"
    ):
        formats.read_label_strings(twice)
    assert formats.read_label_strings(twice, duplicates="merge") == [["a"], ["b", "c"]]


def test_one_mapping_for_train_and_test():
    train, test = [["zoo", "art"], []], [["art", "new"], ["newer", "new"]]
    with pytest.warns(
        DataWarning,
        match="2 labels .in 3 places. do not occur in the training rows, the first 'new'; kept",
    ):
        kept = formats.encode_label_strings(train, test)
    assert kept.names == ["art", "new", "newer", "zoo"] and kept.unseen == 2
    assert [m.toarray().tolist() for m in kept.splits] == [
        [[1, 0, 0, 1], [0] * 4],
        [[1, 1, 0, 0], [0, 1, 1, 0]],
    ]
    with pytest.warns(DataWarning, match="dropped"):
        dropped = formats.encode_label_strings(train, test, unseen="drop")
    assert dropped.names == ["art", "zoo"]
    assert [m.toarray().tolist() for m in dropped.splits] == [[[1, 1], [0, 0]], [[1, 0], [0, 0]]]
    again = silent(formats.encode_label_strings, train[::-1], [["art", "art"]])
    assert again.names == ["art", "zoo"] and again.splits[1].toarray().tolist() == [[1, 0]]
    with pytest.raises(InputError, match="unseen: expected keep or drop"):
        formats.encode_label_strings(train, unseen="ignore")


# LF JSON


def lines_of(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


RECORDS = (
    {
        "uid": "B01",
        "title": "A tïtle",
        "content": "Text",
        "target_ind": [3, 0],
        "target_rel": [1.0, 0.5],
    },
    {"uid": 7, "title": "", "content": None, "target_ind": [], "target_rel": []},
    {"uid": "x", "title": "No content", "target_ind": [1, 2], "other": {}},
    {"uid": "y", "title": "Zero", "target_ind": [1, 2], "target_rel": [0, 2]},
)


@pytest.mark.parametrize("name", ["trn.json", "trn.json.gz"])
def test_lf_json(write, name):
    records = silent(formats.read_lf_json, write(lines_of(*RECORDS) + "\n\n", name), num_labels=5)
    assert records.uid == ["B01", "7", "x", "y"]
    assert records.title == [
        "A tïtle",
        "",
        "No content",
        "Zero",
    ]
    assert records.content == ["Text", "", "", ""]
    expected = [[0.5, 0, 0, 1, 0], [0] * 5, [0, 1, 1, 0, 0], [0, 0, 2, 0, 0]]
    np.testing.assert_array_equal(records.labels.toarray(), np.array(expected, np.float32))
    assert records.labels.dtype == np.float32 and records.labels.nnz == 5
    assert records.texts() == ["A tïtle Text", "", "No content", "Zero"]
    assert records.texts(content=False) == records.title


def test_lf_width_from_the_label_file(write):
    labels = write(lines_of(*({"uid": str(i), "title": "l"} for i in range(9))), "lbl.json.gz")
    path = write(lines_of(*RECORDS), "trn.json")
    assert formats.count_lf_records(labels) == 9
    assert formats.read_lf_json(path, num_labels=labels).labels.shape == (4, 9)
    assert formats.read_lf_json(path).labels.shape == (4, 4)
    own = formats.read_lf_json(labels)
    assert own.labels.shape == (9, 0) and own.title == ["l"] * 9


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"uid": "a", "title": "t"', 'expected a JSON object, got \'{"uid": "a", "title": "t"\''),
        ("[1, 2]", "expected a JSON object, got '[1, 2]'"),
        ('{"title": "t"}', "as uid, got no uid"),
        ('{"uid": "a"}', "a text as title, got no title"),
        ('{"uid": "a", "title": 3}', "a text as title, got '3'"),
        ('{"uid": "a", "title": "t", "content": []}', "a text as content, got '[]'"),
        ('{"uid": "a", "title": "t", "target_ind": "1"}', "a list of label numbers"),
        ('{"uid": "a", "title": "t", "target_ind": [1.0]}', "a list of label numbers"),
        ('{"uid": "a", "title": "t", "target_ind": [true]}', "a list of label numbers"),
        ('{"uid": "a", "title": "t", "target_ind": [5]}', "label numbers from 0 to 4, got '5'"),
        ('{"uid": "a", "title": "t", "target_ind": [-1]}', "label numbers from 0 to 4, got '-1'"),
        (
            '{"uid": "a", "title": "t", "target_ind": [1], "target_rel": [1, 1]}',
            "1 numbers in target_rel",
        ),
        (
            '{"uid": "a", "title": "t", "target_ind": [1], "target_rel": [NaN]}',
            "finite float32 relevances, got 'nan'",
        ),
        (
            '{"uid": "a", "title": "t", "target_ind": [1], "target_rel": [1e39]}',
            "finite float32 relevances",
        ),
        (
            '{"uid": "a", "title": "t", "target_ind": [1], "target_rel": ["1"]}',
            "a list of numbers as target_rel",
        ),
        ('{"uid": "a", "title": "t", "target_ind": [1, 1]}', "every label once, got 1 twice"),
        ('{"uid": "a", "title": "t", "target_ind": [' + "9" * 5000 + "]}", "thousands of digits"),
        ("[" * 100_000, "expected a JSON object"),
        ("", "got a blank line"),
    ],
)
def test_lf_mistakes_name_file_and_line(write, line, message):
    path = write(lines_of(RECORDS[0]) + line + "\n" + lines_of(RECORDS[1]), "trn.json")
    with pytest.raises(InputError) as caught:
        formats.read_lf_json(path, num_labels=5)
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)


def test_lf_merges_when_asked(write):
    record = {"uid": "a", "title": "t", "target_ind": [1, 1], "target_rel": [0.5, 2]}
    path = write(lines_of(record), "trn.json")
    assert formats.read_lf_json(path, merge_duplicates=True).labels.toarray().tolist() == [[0, 2]]


def test_lf_broken_text_is_told_once(write):
    content = (
        b'{"uid": "a", "title": "\xff"}\n{"uid": "b", "title": "x \\ud800", "content": "\\udcff"}\n'
    )
    path = write(content + lines_of({"uid": "c", "title": "\U0001f600"}).encode(), "trn.json")
    with pytest.warns(DataWarning) as told:
        records = formats.read_lf_json(path)
    assert records.title == ["\ufffd", "x \ufffd", "\U0001f600"] and records.content[1] == "\ufffd"
    assert len(told) == 1
    assert "trn.json:1" in str(told[0].message)
    assert "in 2 lines" in str(told[0].message)


def test_lf_cut_short(tmp_path):
    path = tmp_path / "trn.json.gz"
    path.write_bytes(gzip.compress(lines_of(*RECORDS * 500).encode())[:-20])
    with pytest.raises(InputError, match="cut short"):
        formats.read_lf_json(path, num_labels=5)


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
