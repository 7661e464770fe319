"""`xmlkernels.errors`: the one exception for a user's mistake."""

import copy
from concurrent.futures import ProcessPoolExecutor

import pytest

import xmlkernels
from xmlkernels.errors import InputError

PARTS = ("labels.txt, line 7", "a label below 19", "'19'", "number labels from 0")


def test_the_message_is_one_sentence_of_its_parts() -> None:
    error = InputError(*PARTS)
    assert (
        str(error)
        == "labels.txt, line 7: expected a label below 19, got '19'; number labels from 0"
    )
    assert (error.where, error.expected, error.got, error.mend) == PARTS


def test_it_is_a_value_error_and_public() -> None:
    assert issubclass(InputError, ValueError)
    assert xmlkernels.InputError is InputError
    with pytest.raises(ValueError, match="line 7"):
        raise InputError(*PARTS)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy])
def test_copies_keep_message_and_parts(again) -> None:  # type: ignore[no-untyped-def]
    error = again(InputError(*PARTS))
    assert type(error) is InputError
    assert str(error) == str(InputError(*PARTS))
    assert error.mend == PARTS[3]


def fail(_: int) -> None:
    raise InputError(*PARTS)


def test_it_crosses_a_process_boundary() -> None:
    with (
        ProcessPoolExecutor(1) as pool,
        pytest.raises(InputError, match="line 7: expected a label") as raised,
    ):
        list(pool.map(fail, [0]))
    assert raised.value.got == PARTS[2]


@pytest.mark.parametrize("part", ["", "two\nlines", "100% {of} it"])
def test_parts_stand_as_they_were_given(part: str) -> None:
    assert str(InputError("here", part, part, part)) == f"here: expected {part}, got {part}; {part}"
