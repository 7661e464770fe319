"""`xmlkernels.records`: JSON from files, checked by type, every fault one sentence."""

import json
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from xmlkernels import InputError
from xmlkernels.records import Count, Positive, Sha256, check_record, parse_record, read_record


class Part(TypedDict):
    documents: Count


class Head(TypedDict):
    name: str
    labels: Positive
    splits: dict[str, Part]
    share: NotRequired[float]
    pair: NotRequired[tuple[float, float]]
    maybe: NotRequired[Count | None]
    mode: NotRequired[Literal["a", "b"]]
    hash: NotRequired[Sha256]
    rows: NotRequired[list[Part]]
    state: NotRequired[Any]


GOOD: dict[str, Any] = {
    "name": "n",
    "labels": 3,
    "splits": {"train": {"documents": 4}, "odd name": {"documents": 0}},
}
KIND = {"format": "f", "version": 1}


def parse(text: bytes | str) -> Any:
    return parse_record(text, Head, where="head.json", mend="save it again")


def refused(text: bytes | str) -> InputError:
    with pytest.raises(InputError) as raised:
        parse(text)
    assert raised.value.mend == "save it again" and "\n" not in str(raised.value)
    return raised.value


def test_a_record_comes_back_whole_with_keys_that_the_type_does_not_name() -> None:
    value = GOOD | {
        "new": [1, {"x": None}],
        "maybe": None,
        "share": 1,
        "pair": [1, 2.5],
        "mode": "b",
        "rows": [],
    }
    value |= {"state": {"big": 10**40, "nan": {"__float__": "nan"}, "text": "ä\u2028"}}
    assert parse(json.dumps(value)) == value
    assert check_record(value, Head, where="w", mend="m") is value


@pytest.mark.parametrize(
    "change, where, expected, got",
    [
        ({"name": 5}, "$.name", "a text", "5"),
        ({"name": None}, "$.name", "a text", "null"),
        ({"labels": 0}, "$.labels", "a whole number >= 1", "0"),
        ({"labels": True}, "$.labels", "a whole number", "true"),
        ({"labels": 1.5}, "$.labels", "a whole number", "1.5"),
        ({"labels": "3"}, "$.labels", "a whole number", '"3"'),
        ({"labels": 10**30}, "$.labels", "a whole number <= 9223372036854775807", str(10**30)),
        (
            {"splits": {"train": {"documents": 4}, "odd name": {"documents": -1}}},
            '$.splits["odd name"].documents',
            "a whole number >= 0",
            "-1",
        ),
        (
            {"splits": {"train": {"documents": 4}, "val": []}},
            "$.splits.val",
            "an object",
            "a list of 0",
        ),
        ({"splits": {"test": {}}}, "$.splits.test", "a key 'documents'", "none"),
        ({"splits": []}, "$.splits", "an object", "a list of 0"),
        ({"share": "x"}, "$.share", "a number", '"x"'),
        ({"share": 10**400}, "$.share", "a number that fits a double", None),
        ({"pair": [1]}, "$.pair", "a list of length 2", "a list of 1"),
        ({"pair": [1, "2"]}, "$.pair[1]", "a number", '"2"'),
        ({"maybe": "x"}, "$.maybe", "a whole number or null", '"x"'),
        ({"mode": "c"}, "$.mode", "another value", '"c"'),
        ({"hash": "12"}, "$.hash", "a text matching regex", '"12"'),
        (
            {"rows": [{"documents": 1}, {"documents": []}]},
            "$.rows[1].documents",
            "a whole number",
            "a list of 0",
        ),
    ],
)
def test_a_value_of_another_type_is_named(
    change: dict[str, Any], where: str, expected: str, got: str | None
) -> None:
    error = refused(json.dumps(GOOD | change))
    assert error.where == f"head.json, {where}" and error.expected.startswith(expected)
    assert got is None or error.got == got


def test_a_missing_key_at_the_top() -> None:
    error = refused(json.dumps({"name": "n", "labels": 1}))
    assert (error.where, error.expected, error.got) == ("head.json", "a key 'splits'", "none")


@pytest.mark.parametrize(
    "text, got",
    [
        (b"", "an empty text"),
        (b" \n", "an empty text"),
        (b"[]", "a list of 0"),
        (b"null", "null"),
        (b'{"name": ', "Expecting value (line 1, column 10)"),
        (b"{} x", "Extra data (line 1, column 4)"),
        (b'{"share": NaN}', "NaN"),
        (b'{"share": -Infinity}', "-Infinity"),
        (b'{"share": 1e999}', "1e999, a number beyond a double"),
        (b'{"name": "a", "name": "b"}', 'the key "name" twice'),
        (b'{"\\ud800": 1, "name": "a"}', "half of a surrogate pair"),
        (b'{"labels": "\\ud800"}', "half of a surrogate pair"),
        (b'{"x": {"name": "a", "name": "b"}}', 'the key "name" twice'),
        (b'{"name": "\xff"}', "a byte that is none (at 10)"),
        ('{"name": "ä"}'.encode("utf-16"), "a byte that is none (at 0)"),
        (b'{"labels": ' + b"1" * 5000 + b"}", "a number of thousands of digits"),
        (b'{"state": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "more"),
        (b'{"state": ' + b"[" * 150 + b"]" * 150 + b"}", "more"),
    ],
)
def test_what_is_no_strict_json_is_refused(text: bytes, got: str) -> None:
    assert refused(text).got == got


def test_format_and_version_come_before_everything_else(tmp_path: Path) -> None:
    path = tmp_path / "head.json"

    def read() -> Head:
        return read_record(path, Head, mend="save it again", kind=KIND)

    for value, expected, got in (
        ({"format": "g", "labels": "bad"}, "format f", '"g"'),
        ({"labels": "bad"}, "format f", "none"),
        ([], "format f", "a list of 0"),
        ({"format": "f", "version": 2}, "version 1", "2"),
        ({"format": "f", "version": True}, "version 1", "true"),
    ):
        path.write_text(json.dumps(value))
        with pytest.raises(InputError) as raised:
            read()
        assert (raised.value.where, raised.value.expected, raised.value.got) == (
            str(path),
            expected,
            got,
        )
    path.write_text(json.dumps(GOOD | KIND))
    assert read()["labels"] == 3


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_record(tmp_path / "none.json", Head, mend="m")
    with pytest.raises(InputError, match="Is a directory"):
        read_record(tmp_path, Head, mend="m")
    huge = tmp_path / "huge.json"
    with open(huge, "wb") as file:
        file.truncate(1 << 40)  # a hole: nothing is on the disk, a terabyte would be in memory
    with pytest.raises(InputError, match="at most 67,108,864 bytes, got 1,099,511,627,776 bytes"):
        read_record(huge, Head, mend="m")
