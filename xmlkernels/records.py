"""Read JSON and check every value by its type.

The one place for manifests, heads and settings in files.

Say the shape of a record as a TypedDict and read it::

    class Head(TypedDict):
        name: str
        rows: Count
        vocabulary: NotRequired[Count | None]
        state: dict[str, Any]                  # free-form: passed on as it is

    head = read_record(folder / "head.json", Head, mend="save it again", kind={"format":
    "xmlkernels-head", "version": 1})

`parse_record` does the same for JSON in a header, `check_record` for a value that was
parsed before. Keys that a type does not name are kept and not looked at, so a newer writer may add
some. A type may be anything that msgspec knows: TypedDict, dict, list, Literal, unions, and
`Annotated[int, Meta(ge=0)]` for ranges (`Meta` is here).

JSON here is strict: no NaN or Infinity, no number beyond a double, no key twice, UTF-8, at most
`DEEPEST` levels, a bounded size. What breaks a rule is an InputError that names the file, the key
(`$.splits.train.documents`), what was expected and what stood there.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import msgspec
from msgspec import Meta

from xmlkernels.errors import InputError

__all__ = [
    "DEEPEST",
    "MOST_BYTES",
    "Count",
    "Meta",
    "Positive",
    "Sha256",
    "check_record",
    "parse_json",
    "parse_record",
    "read_object",
    "read_record",
    "read_struct",
]

MOST_BYTES = 64 << 20
DEEPEST = 100

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""A whole number from 0 that fits int64."""
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
"""A whole number from 1 that fits int64."""
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
"""A sha256 in hexadecimal."""

T = TypeVar("T")
_PLAIN = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "null": "null",
}
_PLAIN |= {"object": "an object", "array": "a list"}
_REPORT = re.compile(
    r"(?P<what>.*?)(?:, got .*?)?(?: - at (?P<key>`key` in )?`\$(?P<path>.*)`)?", re.S
)
_STEP = re.compile(r"\[\.\.\.\]|\[(\d+)\]|\.([^.\[]+)")


def read_record(
    path: str | os.PathLike[str],
    shape: type[T],
    *,
    mend: str,
    kind: Mapping[str, Any] | None = None,
    most_bytes: int = MOST_BYTES,
) -> T:
    """Read the record of a JSON file.

    Args:
        path: the file.
        shape: its type.
        mend: how to put a file right that does not have it.
        kind: keys that are compared before everything else, such as format and version.
        most_bytes: a larger file is refused before it is read.

    Raises:
        InputError: the file is missing, cannot be read or is too large; it is no strict JSON; a
            value has another type.
    """
    name = os.fspath(path)
    try:
        size = Path(path).stat().st_size
        if size > most_bytes:
            raise InputError(name, f"JSON of at most {most_bytes:,} bytes", f"{size:,} bytes", mend)
        text = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(name, "a JSON file", "no such file", mend) from None
    except OSError as error:
        raise InputError(
            name, "a file that can be read", str(error.strerror or error), "check the path"
        ) from None
    return parse_record(text, shape, where=name, mend=mend, kind=kind)


def read_struct(
    path: str | os.PathLike[str],
    shape: type[T],
    *,
    mend: str,
    kind: Mapping[str, Any] | None = None,
) -> T:
    """Read the record of a JSON file into a dataclass, its inner dataclasses included.

    Arguments and errors are those of `read_record`; keys that the dataclass lacks are left out.
    """
    found: Any = read_record(path, shape, mend=mend, kind=kind)
    return msgspec.convert(found, shape, strict=True)


def read_object(path: str | os.PathLike[str], *, mend: str) -> dict[str, Any]:
    """Read a JSON object of any keys, written by Python's own writer.

    Raises:
        InputError: the file cannot be read, is too large or holds something else.
    """
    name = os.fspath(path)
    try:
        if (size := Path(path).stat().st_size) > MOST_BYTES:
            raise InputError(name, f"at most {MOST_BYTES:,} bytes", f"{size:,} bytes", mend)
        value = parse_json(Path(path).read_bytes(), name, mend, strict=False)
    except OSError as error:
        raise InputError(name, "a file that can be read", str(error.strerror), mend) from error
    if not isinstance(value, dict):
        raise InputError(name, "a JSON object", type(value).__name__, mend)
    return value


def parse_record(
    text: bytes | str,
    shape: type[T],
    *,
    where: str,
    mend: str,
    kind: Mapping[str, Any] | None = None,
) -> T:
    """Parse the record that a text holds.

    Arguments and errors are those of `read_record`; `where` is what messages call the text.
    """
    return check_record(parse_json(text, where, mend), shape, where=where, mend=mend, kind=kind)


def check_record(
    value: Any,
    shape: type[T],
    *,
    where: str,
    mend: str,
    kind: Mapping[str, Any] | None = None,
) -> T:
    """Return a value that was parsed before, if it has the type.

    It is returned unchanged, keys beyond the type included.

    Raises:
        InputError: names the key, what was expected and what is there.
    """
    if kind is not None:
        found = value if isinstance(value, dict) else {}
        for key, expected in kind.items():
            if type(found.get(key)) is not type(expected) or found[key] != expected:
                got = _shown(found[key]) if key in found else "none" if found else _shown(value)
                raise InputError(where, f"{key} {expected}", got, mend)
    try:
        msgspec.convert(value, shape, strict=True)
    except msgspec.ValidationError as error:
        raise _told(value, shape, str(error), where, mend) from None
    except UnicodeError:
        raise InputError(where, "texts in Unicode", "half of a surrogate pair", mend) from None
    return cast(T, value)


def parse_json(text: bytes | str, where: str, mend: str, *, strict: bool = True) -> Any:
    """JSON of any type.

    Args:
        strict: False takes NaN, Infinity and keys that occur twice (the last counts), as Python's
            own writers and readers do: for files that others wrote.

    Raises:
        InputError: see the module docstring.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = (_DECODER if strict else _LAX).decode(decoded)
    except UnicodeDecodeError as error:
        raise InputError(
            where, "JSON in UTF-8", f"a byte that is none (at {error.start})", mend
        ) from None
    except RecursionError:
        raise InputError(where, f"JSON of at most {DEEPEST} levels", "more", mend) from None
    except json.JSONDecodeError as error:
        got = (
            f"{error.msg} (line {error.lineno}, column {error.colno})"
            if decoded.strip()
            else "an empty text"
        )
        raise InputError(where, "JSON", got, mend) from None
    except _Broken as error:
        raise InputError(where, "strict JSON", str(error), mend) from None
    except ValueError:  # Python reads no whole number of more than 4300 digits
        raise InputError(where, "JSON", "a number of thousands of digits", mend) from None
    if _depth(value) > DEEPEST:
        raise InputError(where, f"JSON of at most {DEEPEST} levels", "more", mend)
    return value


class _Broken(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Broken(f"the key {_shown(twice)} twice")
    return found


def _no_constant(token: str) -> Any:
    raise _Broken(token)


def _finite(token: str) -> float:
    number = float(token)
    if not math.isfinite(number):
        raise _Broken(f"{token[:40]}, a number beyond a double")
    return number


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
)
_LAX = json.JSONDecoder()


def _depth(value: Any) -> int:
    """Count the levels of lists and objects.

    Not recursive; stops one level behind the deepest that is allowed.
    """
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        level = [inner for outer in level for inner in _inside(outer)]
        depth += 1
    return depth


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _told(value: Any, shape: Any, report: str, where: str, mend: str) -> InputError:
    """Make our sentence of msgspec's.

    Such as "Expected `int` >= 0, got `str` - at `$.splits[...].documents`".
    """
    parts = _REPORT.fullmatch(report)
    assert parts is not None  # every part is optional
    what, path = parts["what"], parts["path"] or ""
    steps, found = _located(value, shape, report, path)
    if steps:
        where = f"{where}, ${''.join(_step(step) for step in steps)}"
    missing = re.fullmatch(r"Object missing required field `(.*)`", what)
    if missing:
        return InputError(where, f"a key {missing[1]!r}", "none", mend)
    expected = re.sub(
        r"`([^`]*)`", lambda m: " or ".join(_PLAIN.get(w, w) for w in m[1].split(" | ")), what
    )
    expected = expected.removeprefix("Expected ")
    expected = "another value" if expected.startswith("Invalid enum value") else expected
    expected = "a number that fits a double" if expected == "Number out of range" else expected
    return InputError(where, expected, "another key" if parts["key"] else _shown(found), mend)


def _located(value: Any, shape: Any, report: str, path: str) -> tuple[list[str | int], Any]:
    """Keys and list places from the top to what the report is about, and the value there.

    msgspec writes `[...]` for a key of a dict: the key is that with which alone the same report
    comes again.
    """
    steps: list[str | int] = []
    at = value
    for match in _STEP.finditer(path):
        if match[0] == "[...]":
            if not isinstance(at, dict):
                break
            step: str | int | None = next(
                (key for key in at if _report(value, shape, steps, key) == report), None
            )
            if step is None:
                break
        else:
            step = int(match[1]) if match[1] else match[2]
        try:
            at = at[step]
        except (LookupError, TypeError):
            break
        steps.append(step)
    return steps, at


def _report(value: Any, shape: Any, steps: list[str | int], key: str) -> str:
    """Return what msgspec says of the value when the dict at `steps` holds `key` alone."""
    try:
        msgspec.convert(_pruned(value, steps, key), shape, strict=True)
    except msgspec.ValidationError as error:
        return str(error)
    return ""


def _pruned(value: Any, steps: list[str | int], key: str) -> Any:
    if not steps:
        return {key: value[key]}
    step, inner = steps[0], _pruned(value[steps[0]], steps[1:], key)
    if isinstance(value, list):
        return [*value[: int(step)], inner, *value[int(step) + 1 :]]
    return {**value, step: inner}


def _step(step: str | int) -> str:
    if isinstance(step, int):
        return f"[{step}]"
    return f".{step}" if re.fullmatch(r"\w+", step) else f"[{_shown(step)}]"


def _shown(value: Any) -> str:
    """Return a value as JSON, at most 60 characters of it.

    Of lists and objects the number of items.
    """
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= 60 else f"{text[:60]}…"
