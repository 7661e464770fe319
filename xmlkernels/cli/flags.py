"""Read the flags of a command from its dataclass: names, values, help, and groups from comments."""

import ast
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from xmlkernels.options import group_of

_WIDEST = 110
_NUMBERS = {int: ("N", "a whole number"), float: ("X", "a number")}


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: of its field.
        group: its heading; "" before the first.
        told: its help, whole.
        values: what follows it in the help: `N`, `a|b`, …; "" for a switch.
        expected: the same in words, for a mistake.
        default: its value where it is not given, as it is typed.
        required: whether it has no default.
        positional: whether it is given by place instead of by name.
        switch: whether it takes no value.
        verbatim: whether the next word is its value, whatever it begins with.
    """

    name: str
    group: str
    told: str
    values: str
    expected: str
    default: str
    required: bool
    positional: bool
    switch: bool
    verbatim: bool

    @property
    def spellings(self) -> tuple[str, ...]:
        """The names that it is known by, written as fields are."""
        return (self.name, f"no_{self.name}") if self.switch else (self.name,)

    @property
    def shown(self) -> str:
        """The flag as the help shows it, without values."""
        dashed = self.name.replace("_", "-")
        if self.positional:
            return self.name.upper()
        return f"--[no-]{dashed}" if self.default == "on" else f"--{dashed}"

    @property
    def sentence(self) -> str:
        """The first sentence of its help."""
        return re.split(r"(?<=\.)\s+(?=[A-Z\"`])", self.told, maxsplit=1)[0]


def flags_of(kind: type, *, positional: bool = False, default: Any = None) -> list[Flag]:
    """Return the flags of a dataclass, with those of a dataclass among its fields."""
    found: list[Flag] = []
    texts, groups, hints = *_documented(kind), get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        usual = field.default_factory() if field.default_factory is not MISSING else field.default
        value = usual if default is None else getattr(default, field.name)
        group = group_of(field) or groups.get(field.name, "")
        if is_dataclass(value) and not isinstance(value, type):
            inner = flags_of(type(value), default=value)
            found += [replace(flag, group=group or flag.group) for flag in inner]
            continue
        required, hint = value is MISSING, hints[field.name]
        values, expected = _values(hint)
        found.append(
            Flag(
                field.name,
                group,
                texts.get(field.name, ""),
                values,
                expected,
                "" if required else _typed(value),
                required,
                positional=positional and required,
                switch=hint is bool,
                verbatim=get_origin(hint) is Annotated,
            )
        )
    return found


def _documented(kind: type) -> tuple[dict[str, str], dict[str, str]]:
    """Return the help and the group of each field.

    Help is the string below a field, or its line in `Attributes:`; a comment `# ---- name ----`
    begins a group.
    """
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.splitlines()
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)).body
    texts = dict(_attributes(inspect.getdoc(kind) or ""))
    groups: dict[str, str] = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        heading = [
            found[1]
            for line in lines[: node.lineno]
            if (found := re.match(r"\s+# ---- (.*?) ----", line))
        ]
        groups[node.target.id] = heading[-1] if heading else ""
        if (
            isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            texts[node.target.id] = " ".join(after.value.value.split())
    return texts, groups


def _attributes(doc: str) -> Iterator[tuple[str, str]]:
    inside = re.search(r"^Attributes:\n((?:[ ]{4}.*\n?|\n)*)", doc, re.M)
    for found in re.finditer(r"^ {4}(\w+): (.*(?:\n {6,}.*)*)", inside[1] if inside else "", re.M):
        text = " ".join(found[2].split())
        yield found[1], text[:1].upper() + text[1:]


def _values(hint: Any) -> tuple[str, str]:
    """Return what a flag of this type takes: for the help, and in words."""
    if get_origin(hint) is Annotated:
        return _values(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return _values(next(part for part in get_args(hint) if part is not NoneType))
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint))), f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        one, told = _values(get_args(hint)[0])
        plural = f"{told.removeprefix('a ').removeprefix('an ')}s"
        return f"{one} …", f"{plural}, with spaces between them"
    if hint is bool:
        return "", "no value (it is a switch)"
    if hint is Path:
        return "PATH", "a path"
    return _NUMBERS.get(hint, ("TEXT", "a word"))


def _typed(value: Any) -> str:
    """Return a default as it is typed; empty for none."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


EXIT_STATUS = """exit status: 0 done; 1 the work began and failed (a full disk, a lost process);
2 a mistake in flags or files; 130, 143, 129 stopped by SIGINT, SIGTERM, SIGHUP;
141 the reader of the output has left"""


def help_of(
    flags: Sequence[Flag], prog: str, told: str, *, only: Sequence[str] = (), brief: int = 50
) -> str:
    """Return the help of a command, wrapped to the terminal.

    Args:
        flags: the command's.
        prog: the command as it is typed.
        told: what the command does.
        only: flags to show alone, with their whole help; none: every flag.
        brief: with more flags than this, only the first sentence of each is shown.
    """
    if chosen := [flag for flag in flags if set(flag.spellings) & set(only)]:
        return "\n".join(line for flag in chosen for line in _entry(flag, flag.told))
    places = "".join(f" {flag.shown}" for flag in flags if flag.positional)
    required = "".join(
        f" {flag.shown} {flag.values}" for flag in flags if flag.required and not flag.positional
    )
    lines = [
        f"usage: {prog}{places}{required} {'[--flag value …]' if flags else ''}".rstrip(),
        "",
        told.strip(),
    ]
    short = len(flags) > brief
    for group in dict.fromkeys(flag.group for flag in flags):
        lines += ["", f"{group or 'flags'}:"]
        for flag in (flag for flag in flags if flag.group == group):
            lines += _entry(flag, flag.sentence if short else flag.told)
    if short:
        lines += [
            "",
            f"All about one flag: {prog} --help --{flags[-1].name.replace('_', '-')}, say.",
        ]
    lines += ["", EXIT_STATUS]
    return "\n".join(lines)


def _entry(flag: Flag, text: str) -> list[str]:
    default = f" [{flag.default}]" if flag.default not in ("", "off") else ""
    return entry(
        f"{flag.shown} {flag.values}".rstrip(),
        text + (" (required)" if flag.required else default),
        28,
    )


def entry(name: str, text: str, column: int) -> list[str]:
    """Return a name and what it is, in two columns of the terminal."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    body = textwrap.wrap(
        text, max(30, width - column), break_long_words=False, break_on_hyphens=False
    ) or [""]
    head, rest = f"  {name}", [" " * column + line for line in body]
    return [head, *rest] if len(head) + 1 > column else [head.ljust(column) + body[0], *rest[1:]]
