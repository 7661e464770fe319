"""Options as fields of a dataclass: the group, the rule and the reach of each are its metadata."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from numbers import Integral, Real
from os import PathLike
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from xmlkernels.errors import InputError

T = TypeVar("T")
_KINDS: dict[Any, tuple[str, Any]] = {
    int: ("a whole number", Integral),
    float: ("a number", Real),
    str: ("a text", str | PathLike),
}


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
        expected: in words.
        mend: what to do about one that is not.
        holds: whether it is.
    """

    expected: str
    mend: str
    holds: Callable[[Any], bool]


COUNT = Rule("1 or more", "choose a larger one", lambda value: value >= 1)
OFF_AT_0 = Rule("0 or more", "choose 0 to switch it off", lambda value: value >= 0)
POSITIVE = Rule("more than 0", "correct it", lambda value: value > 0)
SHARE = Rule("from 0 to below 1", "correct it", lambda value: 0 <= value < 1)
NAME = Rule("a name", "give one, or leave the flag out", bool)


def of(group: str, default: Any, rule: Rule | None = None, *, only: str = "") -> Any:
    """Declare an option.

    Args:
        group: its heading in the help.
        default: its value where it is not given.
        rule: what its value must be, besides what its type says.
        only: the choices that it has an effect with, as words; none: with all.
    """
    metadata = {"group": group, "rule": rule, "only": tuple(only.split())}
    return field(default=default, metadata=metadata)


def group_of(option: Field[Any]) -> str:
    """Return the group of an option; "" for one without."""
    return str(option.metadata.get("group", ""))


def names_in(kind: Any, group: str) -> tuple[str, ...]:
    """Name the options of a group."""
    return tuple(option.name for option in fields(kind) if group_of(option) == group)


def names_only(kind: Any, choice: str) -> tuple[str, ...]:
    """Name the options that have an effect with a choice alone."""
    return tuple(o.name for o in fields(kind) if choice in o.metadata.get("only", ()))


def flag(name: str) -> str:
    """Write the flag of a field."""
    return f"--{name.replace('_', '-')}"


def check_least(options: object, least: int, *names: str) -> None:
    """Refuse flags of a command that are below the least that they take.

    Raises:
        InputError: the first of them.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            mend = "choose a larger one, or leave it out"
            raise InputError(flag(name), f"{least} or more", str(value), mend)


def check_values(options: Any) -> None:
    """Refuse values that their type, their choices or their rule does not allow.

    Raises:
        InputError: the first of them.
    """
    for option in fields(options):
        name, value = option.name, getattr(options, option.name)
        if get_origin(option.type) is Literal and value not in get_args(option.type):
            expected = f"one of {', '.join(get_args(option.type))}"
            raise InputError(flag(name), expected, repr(value), "choose one of them")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise InputError(flag(name), "a finite number", repr(number), "correct it")
        rule: Rule | None = option.metadata.get("rule")
        if rule is not None and not rule.holds(value):
            raise InputError(flag(name), rule.expected, repr(value), rule.mend)


def replaced(options: T, changes: Mapping[str, Any]) -> T:
    """Return a copy of a dataclass with other values.

    Raises:
        InputError: a field that there is not, or a value of another kind than it has.
    """
    known, kind = [field.name for field in fields(options)], type(options).__name__  # type: ignore[arg-type]
    if wrong := [name for name in changes if name not in known]:
        near = difflib.get_close_matches(wrong[0], known, 1)
        mend = f"did you mean {near[0]}?" if near else f"see the fields of {kind}"
        raise InputError(wrong[0], f"a setting of {kind}", "none of that name", mend)
    types = get_type_hints(type(options))
    for name, value in changes.items():
        expected, like = _KINDS.get(types[name], ("anything", object))
        if not isinstance(value, like) or (like is Integral and isinstance(value, bool)):
            mend = f"correct it; it was {getattr(options, name)!r}"
            raise InputError(name, expected, repr(value), mend)
    return replace(options, **changes)  # type: ignore[type-var]
