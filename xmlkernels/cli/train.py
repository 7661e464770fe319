"""Train a classifier over all labels: `xmlkernels train RECIPE [--key value …]`.

On N GPUs of a machine: `torchrun --nproc-per-node N -m xmlkernels train RECIPE …`; each encodes its
part of every batch. `python train/run.py RECIPE` is the same command in a clone. Writes into its
output folder: config.json, log.jsonl, metrics.json, predictions.npz and checkpoint/.

SIGINT, SIGTERM and SIGHUP end a run after the step, with a checkpoint to go on from by --resume; a
second one ends it at once.
"""

from collections.abc import Sequence
from pathlib import Path

from xmlkernels import dist
from xmlkernels.cli.arguments import parse_named
from xmlkernels.cli.console import print_metrics, say, typed
from xmlkernels.training.checks import check
from xmlkernels.training.config import resolved_device
from xmlkernels.training.loop import train
from xmlkernels.training.recipes import RECIPES


def main(words: Sequence[str], prog: str = "xmlkernels train") -> None:
    config = parse_named(RECIPES, "recipe", prog, __doc__ or "", words)
    given = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    check(config, given=given)
    dist.start(resolved_device(config.device), config.timeout)
    print_metrics(train(config), Path(config.output))
    say(
        f'ask it: {typed("predict")} --checkpoint {config.output} --text "…"   (--input FILE for '
        "many texts)"
    )
    # the first process may still be writing, and torchrun takes a lost one for a failure
    dist.wait()
