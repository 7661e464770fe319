"""Read a command line: tyro parses the values, help and mistakes are worded here."""

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

from xmlkernels import InputError
from xmlkernels.cli.flags import Flag, entry, flags_of, help_of

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# Flags of other tools, and those that mean the same here, where the command has them.
_ELSEWHERE = {
    "learning_rate": ("encoder_lr", "table_lr"),
    "lr": ("encoder_lr", "table_lr"),
    "weight_decay": ("encoder_decay", "table_decay"),
    "batch_size": ("batch",),
    "num_epochs": ("epochs",),
    "num_train_epochs": ("epochs",),
    "max_seq_length": ("max_length",),
    "max_seq_len": ("max_length",),
    "max_len": ("max_length",),
    "model_name": ("encoder",),
    "model_name_or_path": ("encoder",),
    "output_dir": ("output",),
    "save_dir": ("output",),
    "data": ("dataset", "input"),
    "data_dir": ("dataset",),
    "gpu": ("device",),
    "num_workers": ("threads",),
    "num_threads": ("threads",),
    "workers": ("threads",),
    "n_jobs": ("threads",),
    "k": ("top_k",),
    "gradient_accumulation_steps": ("accumulate",),
    "max_grad_norm": ("clip",),
    "fp16": ("precision",),
    "bf16": ("precision",),
    "embedding_dim": ("bow_width",),
    "texts": ("input", "train_text"),
    "labels": ("train_labels",),
}


def parse(
    kind: type[T],
    prog: str,
    told: str,
    *,
    positional: bool = False,
    default: T | None = None,
    words: Sequence[str] | None = None,
) -> T:
    """Read the options of a command.

    Args:
        kind: a dataclass; its fields are the flags, with those of a dataclass among them.
        prog: the command as it is typed.
        told: what it does, for --help.
        positional: fields without a default are given by place instead of by name.
        default: what the flags start from; by default the fields' own defaults.
        words: the arguments of the command; by default those of this process.

    Raises:
        InputError: an unknown flag, a value that it does not take, or one that is missing.
        SystemExit: 0, after --help.
    """
    flags = flags_of(kind, positional=positional, default=default)
    words = texts_joined(sys.argv[1:] if words is None else words, flags)
    if "-h" in words or "--help" in words:
        only = [word[2:].replace("-", "_") for word in words if word not in ("-h", "--help")]
        print(help_of(flags, prog, told, only=only))
        raise SystemExit(0)
    refuse_unknown(words, flags, prog)
    return _by_tyro(kind, prog, words, flags, positional, default)


class Named(Protocol[T_co]):
    """A complete set of options with a name, as `parse_named` takes it."""

    @property
    def config(self) -> T_co:
        """The options."""

    @property
    def group(self) -> str:
        """The heading that it is listed under."""

    @property
    def line(self) -> str:
        """What it is, for the list."""

    @property
    def help(self) -> str:
        """All about it, for its own --help."""


def parse_named(
    named: Mapping[str, Named[T]],
    what: str,
    prog: str,
    told: str,
    words: Sequence[str] | None = None,
) -> T:
    """Read a command whose first word names a complete set of options, which flags then change.

    Args:
        named: name → a set.
        what: what such a set is called.
        prog: the command as one types it.
        told: what it does, for --help.
        words: the command line behind the command; by default the one of this process.

    Raises:
        InputError: a name that is none, or what `parse` refuses.
        SystemExit: 0, after --help; 2, after the list of sets, where no word is given.
    """
    words = sys.argv[1:] if words is None else list(words)
    if not words or words[0] in ("-h", "--help"):
        print(listing(named, what, prog, told), file=sys.stdout if words else sys.stderr)
        raise SystemExit(0 if words else 2)
    if words[0] not in named:
        raise InputError(prog, f"a {what}", repr(words[0]), _nearest(words[:1], list(named), prog))
    chosen = named[words[0]]
    default = chosen.config
    prog = f"{prog} {words[0]}"
    return parse(type(default), prog, chosen.help, default=default, words=words[1:])


def listing(named: Mapping[str, Named[T]], what: str, prog: str, told: str) -> str:
    """Return the help of such a command: what it does, and every set under its heading."""
    name = what.upper()
    lines = [
        f"usage: {prog} {name} [--flag value …]      ({prog} {name} --help: all about one)",
        "",
        told.strip(),
    ]
    for group in dict.fromkeys(one.group for one in named.values()):
        lines += ["", f"{group}:"]
        for name, one in named.items():
            if one.group == group:
                lines += entry(name, one.line, 30)
    return "\n".join(lines)


def _nearest(word: Sequence[str], names: Sequence[str], prog: str) -> str:
    """Name those like this one, and the rest in short: names of one beginning count together."""
    first = [name.partition("-")[0] for name in names]
    families = {head: [name for name in names if name.partition("-")[0] == head] for head in first}
    short = ", ".join(
        f"{head}-… ({len(own)})" if len(own) > 3 else ", ".join(own)
        for head, own in families.items()
    )
    near = [name for name in names if word and word[0] and word[0] in name][:4]
    near = near or (difflib.get_close_matches(word[0], names, 2, 0.5) if word else [])
    return (
        f"{f'did you mean {either(near)}? there are' if near else 'choose one of'} {short}; {prog} "
        "--help tells of each"
    )


def texts_joined(words: Sequence[str], flags: Sequence[Flag]) -> list[str]:
    """Return the words with `--text=-a` for `--text -a`.

    A text may begin with a dash, but not be a flag of the command.
    """
    known = {name: flag for flag in flags for name in flag.spellings}
    joined: list[str] = []
    for word in words:
        last = joined[-1] if joined else ""
        before = known.get(last[2:].replace("-", "_")) if last.startswith("--") else None
        flag = word.startswith("--") and word[2:].partition("=")[0].replace("-", "_") in known
        if before is not None and before.verbatim and word.startswith("-") and not flag:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def refuse_unknown(words: Sequence[str], flags: Sequence[Flag], prog: str) -> None:
    """Refuse the first word that looks like a flag and is none; name the nearest flag."""
    known = {name: flag for flag in flags for name in flag.spellings}
    value_of: Flag | None = None
    for word in words:
        name = word[2:].partition("=")[0].replace("-", "_")
        if value_of is not None and value_of.verbatim:
            value_of = None  # a text may begin with anything
        elif not re.match(r"--[A-Za-z]", word):
            value_of = None
        elif name in known:
            value_of = None if "=" in word else known[name]
        else:
            raise InputError(
                word.partition("=")[0],
                "a flag of this command",
                "none of that name",
                _mend(name, known, prog),
            )


def _mend(name: str, known: dict[str, Flag], prog: str) -> str:
    listed = f"{prog} --help lists them"
    meant = [f"--{other.replace('_', '-')}" for other in _ELSEWHERE.get(name, ()) if other in known]
    if not meant:
        near = difflib.get_close_matches(name, known, 1, 0.65)
        parts = [
            other
            for other in known
            if (len(other) > 3 and other in name) or (len(name) > 3 and name in other)
        ]
        meant = [f"--{other.replace('_', '-')}" for other in (near or sorted(parts, key=len)[:3])]
    return f"did you mean {either(meant)}? ({listed})" if meant else listed


def read_threshold(given: str, *words: str) -> Any:
    """Return the value of --threshold: None where it is empty, one of the words, or a probability.

    Raises:
        InputError: anything else.
    """
    if given in ("", *words):
        return given or None
    try:
        value = float(given)
        if 0 <= value <= 1:
            return value
    except ValueError:
        pass
    expected = f"a probability from 0 to 1, or {either(words)}"
    raise InputError("--threshold", expected, repr(given), "correct it")


def either(names: Sequence[str]) -> str:
    """Join names as in `a`, `a or b`, `a, b or c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _by_tyro(
    kind: type[T],
    prog: str,
    words: Sequence[str],
    flags: Sequence[Flag],
    positional: bool,
    default: T | None,
) -> T:
    import tyro

    config: tuple[Any, ...] = (tyro.conf.OmitArgPrefixes,)
    config += (tyro.conf.PositionalRequiredArgs,) if positional else ()
    start: dict[str, Any] = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found: T = tyro.cli(kind, prog=prog, args=list(words), config=config, **start)
            return found
    except SystemExit as error:
        if not error.code:
            raise
    _refuse(said.getvalue(), prog, words, flags)


def _refuse(box: str, prog: str, words: Sequence[str], flags: Sequence[Flag]) -> NoReturn:
    """Raise tyro's first complaint, which it draws in a box, as an InputError."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    rules = (number for number, line in enumerate(lines) if line and not line.strip("─"))
    text = " ".join(filter(None, lines[: next(rules, len(lines))]))
    by_name = {name: flag for flag in flags for name in flag.spellings}
    if missing := [flag for flag in flags if flag.required and not _given(flag, words)]:
        first, what = missing[0], missing[0].sentence.rstrip(".")
        raise InputError(
            first.shown, what[:1].lower() + what[1:], "none", f"name it ({prog} --help)"
        )
    if found := re.search(r"(--[a-z][\w-]*)", text):
        flag = by_name.get(found[1][2:].replace("-", "_"))
        if flag is not None:
            values = _values(words, flag)
            raise InputError(
                found[1], flag.expected, " ".join(map(repr, values)) or "nothing", "correct it"
            )
    # What a dataclass itself refuses:
    if found := re.search(r"Error parsing \w+: (\w+): expected (.*), got (.*?); (.*)", text):
        flag = by_name.get(found[1])
        if flag is not None:
            raise InputError(flag.shown, found[2], found[3], found[4])
    rest = text.removeprefix("Unrecognized options: ")
    if rest != text:
        raise InputError(
            "arguments",
            "flags and their values",
            repr(rest),
            f"put its flag before it ({prog} --help)",
        )
    raise InputError("arguments", "what --help says", text, f"see {prog} --help")


def _given(flag: Flag, words: Sequence[str]) -> bool:
    if flag.positional:
        return any(not word.startswith("-") for word in words[:1])
    return any(
        word[2:].partition("=")[0].replace("-", "_") in flag.spellings
        for word in words
        if word.startswith("--")
    )


def _values(words: Sequence[str], flag: Flag) -> list[str]:
    """Return the words that follow a flag."""
    found: list[str] | None = None
    for word in words:
        name, equals, value = word[2:].partition("=")
        if word.startswith("--") and name.replace("-", "_") in flag.spellings:
            found = [value] if equals else []
        elif found is not None:
            if word.startswith("--"):
                break
            found.append(word)
    return found or []
