"""Train a classifier by a recipe: `xmlkernels train RECIPE [--key value …]`.

`xmlkernels train auto --data my.csv --output runs/mine` prepares your own table, chooses the recipe
and trains it, all in one; its --help says more. Without a recipe the recipes are listed; RECIPE
--help says all about one. On N GPUs of a machine:
`torchrun --nproc-per-node N -m xmlkernels train RECIPE …`; each encodes its part of every batch.
`python train/run.py RECIPE` is the same command in a clone. RECIPE --plan says what the run will
take, and starts nothing: see `xmlkernels plan --help`. The output folder gets config.json,
log.jsonl, metrics.json, predictions.npz and checkpoint/.

SIGINT, SIGTERM and SIGHUP end a run after the step, with a checkpoint to go on from by --resume; a
second one ends it at once.
"""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from xmlkernels import InputError, dist
from xmlkernels.cli import plan
from xmlkernels.cli.arguments import parse_named
from xmlkernels.cli.console import print_metrics, say, typed
from xmlkernels.cli.rank import print_ranker
from xmlkernels.models.kinds import KINDS
from xmlkernels.training.checks import check
from xmlkernels.training.clock import Deadline
from xmlkernels.training.config import Config
from xmlkernels.training.linear import LinearConfig, train_linear
from xmlkernels.training.loop import train
from xmlkernels.training.recipe import Recipe
from xmlkernels.training.recipes import RECIPES
from xmlkernels.training.stops import done

log = logging.getLogger(__name__)


def main(words: Sequence[str], prog: str = "xmlkernels train") -> None:
    """Train by the recipe that the first word names."""
    if words and words[0] == "auto":
        from xmlkernels.cli import auto

        auto.main(words[1:], prog, run)
        return
    if "--plan" in words:
        plan.main([word for word in words if word != "--plan"], f"{prog} --plan")
        return
    # found once, so that an old name is told once
    known = {words[0]: RECIPES[words[0]]} if words and words[0] in RECIPES else RECIPES
    config = parse_named(known, "recipe", prog, __doc__ or "", words)
    given = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    run(config, known[words[0]], given)


def run(
    config: Any, recipe: Recipe[Any], given: Collection[str], deadline: Deadline | None = None
) -> None:
    """Train by a recipe, and print what came of it.

    Args:
        config: the recipe's options, changed by flags.
        recipe: where they are from.
        given: the flags, as fields are written.
        deadline: when the command is to have ended; None: never.
    """
    if isinstance(config, LinearConfig):
        if (count := dist.launched()[1]) > 1:
            mend = "start it without torchrun: it trains on all threads of one process"
            raise InputError("torchrun", "one process for this recipe", str(count), mend)
        report = train_linear(config, deadline)
        done()
        print_ranker(report)
        return
    config = recipe.fit(config, set(given) | {name.removeprefix("no_") for name in given})
    early = check(config, given=given)
    tell_of_batch(config, recipe.config, given)
    dist.start(early.device, config.timeout)
    report = train(config, deadline)
    done()
    print_metrics(report, Path(config.output), config.show)
    say(
        f'ask it: {typed("predict")} --checkpoint {config.output} --text "…"   (--input FILE for '
        "many texts)"
    )
    # the first process may still be writing, and torchrun takes a lost one for a failure
    dist.wait()


def tell_of_batch(config: Config, recipe: Config, given: Collection[str]) -> None:
    """Say that a table's rate belongs to its batch, where the batch changes alone."""
    before, now = (one.batch * one.accumulate for one in (recipe, config))
    summed = KINDS[config.model].sums_loss and config.table_optimizer in ("auto", "sgd")
    if summed and now != before and "table_lr" not in given:
        log.info(
            f"note: batch {now:,} in place of the recipe's {before:,} with its --table-lr "
            f"{config.table_lr:g}: the loss is a sum, so a step of the table is now "
            f"{now / before:.3g} times as long; where the loss grows, lower the rate to "
            f"{config.table_lr * before / now:.2g}"
        )
