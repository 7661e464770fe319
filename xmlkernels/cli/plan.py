"""Say what a run will take before it starts: `xmlkernels plan RECIPE [--key value …]`.

Memory by part, of each process and each device, at its peak; bytes on the wire; seconds of a step,
hours of the run and, with --price, money; whether it fits, and if not the nearest change that makes
it fit. Nothing is trained, and no memory of the run's own is taken. All flags of `xmlkernels train
RECIPE` may be given. Sizes are the dataset's, those that the recipe's data set is known to have, or
the flags':
`xmlkernels plan bow --labels 100000000 --documents 1000000 --vocabulary 500000 --dim 64`.

--device takes cpu (this machine, measured now) or a card by name: h200, h100, a100, rtx4090, l4.
`xmlkernels train RECIPE --plan` is the same command.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from xmlkernels import InputError
from xmlkernels.cli.arguments import parse_named
from xmlkernels.cli.console import print_rows, say
from xmlkernels.memory import readable
from xmlkernels.planner import Budget
from xmlkernels.planner.speed import Timed, seconds
from xmlkernels.ticks import duration
from xmlkernels.training.config import Config
from xmlkernels.training.planned_mends import nearest
from xmlkernels.training.planned_sizes import PlanConfig
from xmlkernels.training.planning import Forecast, forecast_of
from xmlkernels.training.recipe import Recipe
from xmlkernels.training.recipes import RECIPES


def main(words: Sequence[str], prog: str = "xmlkernels plan") -> None:
    """Print the plan of the recipe that the first word names."""
    if words and words[0] == "linear":
        mend = "plan bow, minilm or cascade"
        raise InputError(prog, "a recipe with a label table", "'linear'", mend)
    # found once, so that an old name is told once
    known = {words[0]: RECIPES[words[0]]} if words and words[0] in RECIPES else RECIPES
    named: dict[str, Recipe[Any]] = {
        name: replace(recipe, config=PlanConfig(run=recipe.config))
        for name, recipe in known.items()
        if isinstance(recipe.config, Config)
    }
    options: PlanConfig = parse_named(named, "recipe", prog, __doc__ or "", words)
    given = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    fitted = known[words[0]].fit(options.run, given | {g.removeprefix("no_") for g in given})
    tell(words[0], forecast_of(replace(options, run=fitted), named[words[0]]))


def tell(name: str, found: Forecast) -> None:
    """Print a forecast."""
    subject, plan = found.subject, found.plan
    facts, card, options = subject.facts, subject.card, subject.options
    limit = "" if card.memory is None else f", {readable(card.memory)} each"
    say(f"{name} on {options.gpus} x {card.name}{limit}: {card.source}")
    say(
        f"{facts.labels:,} labels, {facts.documents:,} documents ({subject.told}); table "
        f"{plan.table}, {plan.optimizer}{f', states {plan.state}' if plan.state else ''}; "
        f"{plan.update:,} documents per update, {plan.steps:,} updates"
    )
    for device, budget in found.memory.budgets().items():
        _tell_memory(device, budget)
    if found.wire:
        rows = [(name, readable(count)) for name, count in found.wire.items()]
        rows.append(("together", readable(sum(found.wire.values()))))
        title = "bytes that a process receives in a step, however many labels there are"
        print_rows(title, ("what", "bytes"), rows)
    _tell_time("a step", found.step)
    if found.evaluation:
        _tell_time("an evaluation of the validation split", found.evaluation)
    say(
        f"the run: {duration(found.hours * 3600)} of steps and evaluations, without waiting for "
        "data and writing checkpoints"
        + (f"; {found.money:,.2f} at {options.price:g} per device and hour" * (options.price > 0))
    )
    _tell_fit(found)


def _tell_memory(device: str, budget: Budget) -> None:
    rows = [(name, readable(count), "always") for name, count in budget.held.items() if count]
    for phase, parts in budget.phases.items():
        rows += [(name, readable(count), phase) for name, count in parts.items() if count]
    rows.append(("at most", readable(budget.peak), budget.phase))
    print_rows(f"memory of one process on {device}", ("part", "bytes", "when"), rows)


def _tell_time(what: str, parts: Sequence[Timed]) -> None:
    rows = [(p.what, _time(p.floor), _time(p.seconds), p.how) for p in parts]
    rows.append(("together", _time(sum(p.floor for p in parts)), _time(seconds(parts)), ""))
    print_rows(f"seconds of {what}", ("part", "floor", "expected", "by"), rows)


def _time(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:,.3g} {unit}"
    return f"{value / 1e-6:,.3g} us"


def _tell_fit(found: Forecast) -> None:
    lacks = found.lacks()
    if not lacks:
        say("it fits")
        return
    for device, (peak, limit) in lacks.items():
        say(f"it does not fit {device}: {readable(peak)} of {readable(limit)}")
    chosen, failed = nearest(found)
    for tried in failed:
        peaks = (budget.peak for budget in tried.forecast.memory.budgets().values())
        say(f"  {tried.flags}: does not suffice ({readable(max(peaks))})")
    if chosen is None:
        say("no three changes of precision, states, micro-batch, place and devices make it fit")
        return
    peaks = (budget.peak for budget in chosen.forecast.memory.budgets().values())
    say(f"nearest change that fits: {chosen.flags} ({readable(max(peaks))}); {chosen.costs}")
