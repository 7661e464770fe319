"""Add labels to a run, or drop some, without training it again: `xmlkernels labels RUN …`.

`--add new.jsonl` has a line {"name": …, "text": …} per new label, `--documents few.jsonl` lines
{"text": …, "labels": [names]}. A new label's row is trained on its text and its documents, against
a sample of the run's training documents; on a label tree the label joins the cluster that they
point to. Encoder, clusters and all other rows stay as they are. `--drop names.txt` takes labels
out. `--epochs 2` trains the rows of the label table further, but for those of `--freeze names.txt`.

For end-to-end and cascade runs and for linear rankers, `linear --trees N` too (without --epochs).
The folder is for predictions: it is loaded and served as any run, and cannot be resumed.
"""

from collections.abc import Sequence
from pathlib import Path

from xmlkernels.cli.arguments import parse
from xmlkernels.cli.console import say, typed
from xmlkernels.predict.base import FOREST, RANKER
from xmlkernels.training.relabel import LabelsConfig, relabel


def main(words: Sequence[str]) -> None:
    """Change the labels of the run that the arguments name."""
    what = __doc__ or ""
    options = parse(LabelsConfig, "xmlkernels labels", what, positional=True, words=words)
    relabel(options)
    ranker = any((Path(options.output) / name).is_file() for name in (RANKER, FOREST))
    flag = "--ranker" if ranker else "--checkpoint"
    say(f'ask it: {typed("predict")} {flag} {options.output} --text "…"')
