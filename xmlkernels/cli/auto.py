"""Train on your own table: `xmlkernels train auto --data my.csv --output runs/mine`.

It reads the table (CSV, TSV, JSON lines, Parquet, fastText, Annif, packed or not), measures it,
chooses a recipe and its settings from what it found, the machine and --minutes, says why, trains,
and measures the result on a tenth of the texts that it holds back. When --minutes are over, it
ends with what is trained by then, whole and measured. Columns are found by their names; --text and
--labels name others. Every flag of the recipe that is chosen may be given, and wins: `--recipe bow
--epochs 3`. With --plan it stops before the training.

Then ask it, or serve it: `xmlkernels serve runs/mine`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from xmlkernels import InputError
from xmlkernels.cli.arguments import parse, refuse_unknown
from xmlkernels.cli.console import print_rows, say, typed
from xmlkernels.cli.flags import Flag, flags_of
from xmlkernels.cli.rank import print_ranker
from xmlkernels.data.profile import load_profile
from xmlkernels.data.profiling import lines_of
from xmlkernels.locks import own_folder
from xmlkernels.report.page import write_report
from xmlkernels.report.run import CHOICES, open_run
from xmlkernels.training.auto import AutoConfig, chosen_before, prepared
from xmlkernels.training.choosing import Choice, Machine, choose, recorded_choices
from xmlkernels.training.clock import Deadline
from xmlkernels.training.folder import write_json
from xmlkernels.training.linear import train_linear
from xmlkernels.training.ranker_folder import refuse_held
from xmlkernels.training.recipe import Recipe
from xmlkernels.training.recipes import RECIPES
from xmlkernels.training.stops import done
from xmlkernels.training.timing import has_names, time_linear
from xmlkernels.training.trying import Chosen, choose_kind, finish

NAMES = ("linear", "bow", "minilm", "cascade")
# Decided by this command for every recipe.
_OURS = ("dataset", "documents", "max_length")
_PLACES = ("output", "cache", "resume", "overwrite")
_TOO_FEW = 100  # test documents: P@1 has a 95% interval of 20 points then
Train = Callable[[Any, Recipe[Any], Collection[str], Deadline], None]


def main(words: Sequence[str], prog: str, train: Train) -> None:
    """Choose, tell, and train.

    Args:
        words: behind `auto`.
        prog: the command as it is typed, without `auto`.
        train: runs a recipe with settings, of which some were given by name.
    """
    own = flags_of(AutoConfig)
    only_plan = "--plan" in words
    mine, rest = divided([word for word in words if word != "--plan"], own)
    config = parse(AutoConfig, f"{prog} auto", __doc__ or "", words=mine)
    deadline = Deadline(config.minutes * 60)
    if "resume" in names_in(rest):
        config, rest = _as_before(config, rest)
    given = names_in(rest)
    _check_known(given, prog)
    if not only_plan:
        if not {"resume", "overwrite"} & given.keys():
            refuse_held(config.output)
        with own_folder(config.output):
            pass  # what cannot be written is told before the data are read
    machine = Machine.here()
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        if not line.startswith("no --tokenizer"):
            say(line)

    chosen_by_name = names_in(mine)
    dataset = prepared(config, chosen_by_name, None, 128, tell)
    profile = load_profile(dataset.folder)
    if not any(line.startswith("documents: ") for line in told):
        for line in lines_of(profile):
            say(line)
    costs = time_linear(dataset, machine.workers(int(given.get("threads") or 0)))
    chosen = choose(
        config, profile, machine, given, costs, left=deadline.left(), named=has_names(dataset)
    )
    name = chosen.recipe.name
    _check_of(name, given)
    if chosen.tokenizer is not None:
        dataset = prepared(config, chosen_by_name, chosen.tokenizer, chosen.max_length, tell)
    recipe = replace(
        chosen.recipe, config=replace(chosen.recipe.config, dataset=str(dataset.folder))
    )
    options = parse(
        type(recipe.config), f"{prog} auto", recipe.help, default=recipe.config, words=rest
    )
    choices = [_won(choice, given) for choice in chosen.choices]
    rows = [(c.what, c.value, c.why, c.flag) for c in choices]
    print_rows(f"chosen for {machine.told}", ("what", "choice", "why", "flag"), rows)
    if only_plan:
        return
    tried: Chosen | None = None
    if len(chosen.kinds) > 1 and "resume" not in given:
        say(f"trying {chosen.kinds[0].what}")
        tried = choose_kind(options, chosen.kinds, deadline, say)
        options = replace(tried.options, resume=True, overwrite=False)
        choices = [_found(choice, options, tried) for choice in choices]
    record = recorded_choices(config, machine, choices, dataset)
    decided = {choice.flag for choice in choices}
    flags = _flags_of(options, recipe.config, RECIPES[name].config, decided=decided)
    record |= {"recipe": name, "flags": flags}
    try:
        if tried is None:
            train(options, recipe, set(given), deadline)
        else:
            report = (
                finish(options)
                if options.trees == 1
                else train_linear(options, deadline, tried.words)
            )
            done()
            print_ranker(report)
    except KeyboardInterrupt:  # stopped in order: --resume goes on with what was chosen
        if Path(options.output).is_dir():
            write_json(Path(options.output) / CHOICES, record)
        raise
    write_json(Path(options.output) / CHOICES, record)
    if options.report:  # again, with the choices
        write_report(open_run(options.output, dataset), told=False)
    test = profile.splits.get("test")
    if test is not None and test.documents < _TOO_FEW:
        say(
            f"note: {test.documents} test documents are too few for their metrics to mean "
            "anything; report.html has their intervals"
        )
    say(f"serve it: {typed('serve')} {options.output}")


def _as_before(config: AutoConfig, rest: list[str]) -> tuple[AutoConfig, list[str]]:
    """Return what an earlier run in the output folder has chosen, as if it had been typed."""
    before = chosen_before(config.output)
    if before is None:
        return config, rest
    typed_again = names_in(rest)
    kept = [word for flag in before["flags"] if not names_in(flag).keys() & typed_again.keys()
            for word in flag]  # fmt: skip
    return replace(config, recipe=before["recipe"]), [*kept, *rest]  # type: ignore[arg-type]


def _flags_of(options: Any, *others: Any, decided: Collection[str]) -> list[list[str]]:
    """Return the flags, each with its words, that were decided or differ from other options."""
    flags: list[list[str]] = []
    for field in fields(options):
        now, *before = (getattr(one, field.name) for one in (options, *others))
        flag = f"--{field.name.replace('_', '-')}"
        if is_dataclass(now):
            flags += _flags_of(now, *before, decided=decided)
            continue
        same = flag not in decided and all(now == one for one in before)
        if same or field.name in (*_OURS, *_PLACES):
            continue
        if isinstance(now, bool):
            flags.append([flag if now else flag.replace("--", "--no-", 1)])
        else:
            flags.append([flag, *map(str, now if isinstance(now, tuple) else [now])])
    return flags


def _found(choice: Choice, options: Any, tried: Chosen) -> Choice:
    """Return what validation has chosen in place of what there was to try."""
    if choice.flag != "--longest":
        return choice
    value = "1 word" if options.longest == 1 else f"1 to {options.longest} words"
    value += ", and the labels' names" if options.label_text else ""
    why = f"P@1 on validation: {'; '.join(tried.told)}"
    say(f"{choice.what}: {value} ({why})")
    return replace(choice, value=value, why=why)


def _won(choice: Choice, given: dict[str, str]) -> Choice:
    """Return a choice, or what was given in its place."""
    name = choice.flag.removeprefix("--").replace("-", "_")
    if name not in given:
        return choice
    return replace(choice, value=given[name] or "on", why=f"as {choice.flag} says")


def divided(words: Sequence[str], own: Sequence[Flag]) -> tuple[list[str], list[str]]:
    """Divide words into the flags of `auto` with their values, and those of a recipe."""
    known = {spelling for flag in own for spelling in flag.spellings}
    mine: list[str] = []
    rest: list[str] = []
    target = mine
    for word in words:
        if word in ("-h", "--help"):
            mine.append(word)
            continue
        if word.startswith("--") and len(word) > 2:
            name = word[2:].partition("=")[0].replace("-", "_")
            target = mine if name in known else rest
        target.append(word)
    return mine, rest


def names_in(words: Sequence[str]) -> dict[str, str]:
    """Return the fields that words name, each with its values as they were typed."""
    found: dict[str, str] = {}
    last = ""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, _, value = word[2:].partition("=")
            last = name.replace("-", "_").removeprefix("no_")
            found[last] = value
        elif last:
            found[last] = f"{found[last]} {word}".strip()
    return found


def _check_known(given: Collection[str], prog: str) -> None:
    """Refuse a flag that no recipe has, before any file is read."""
    every = {name for recipe in NAMES for name in _flags(recipe)}
    unknown = [name for name in given if name not in every or name in _OURS]
    if unknown:
        # In the words of any command: the nearest flag among those of `auto` and of its recipes.
        flags = [flag for flag in _every() if flag.name not in _OURS]
        refuse_unknown([f"--{unknown[0].replace('_', '-')}"], flags, f"{prog} auto")


def _every() -> list[Flag]:
    defaults = [RECIPES[name].config for name in ("linear", "bow")]
    own = flags_of(AutoConfig)
    return own + [flag for one in defaults for flag in flags_of(type(one), default=one)]


def _check_of(name: str, given: Collection[str]) -> None:
    known = _flags(name)
    for one in given:
        if one not in known:
            others = [other for other in NAMES if one in _flags(other)]
            shown = f"--{one.replace('_', '-')}"
            mend = f"leave it out, or choose --recipe {others[0]}"
            got = f"one of {' and '.join(others)}"
            raise InputError(shown, f"a flag of {name}, which was chosen", got, mend)


def _flags(recipe: str) -> set[str]:
    default = RECIPES[recipe].config
    return {flag.name for flag in flags_of(type(default), default=default)}
