"""Lines of texts, labels as strings and JSON lines: what is read, changed and refused."""

import gzip

import numpy as np
import pytest

from raw_files import lines_of, silent
from xmlkernels.data import formats
from xmlkernels.errors import InputError
from xmlkernels.files import DataWarning

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
