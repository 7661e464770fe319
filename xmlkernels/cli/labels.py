"""Add labels to a run, or drop some, without training it again: `xmlkernels labels RUN …`.

`--add new.jsonl` has a line {"name": …, "text": …} per new label, `--documents few.jsonl` lines
{"text": …, "labels": [names]}. A new label's row is trained on the embeddings of its text, its
documents, and a sample of the run's training documents, which have it not; encoder and all other
rows stay as they are, so the scores of other labels do, too. `--drop names.txt` takes labels out.

For runs end to end, of a transformer or a bag of words. The folder is for predictions: it is
loaded and served as any run, and cannot be resumed.
"""

from collections.abc import Sequence

from xmlkernels.cli.arguments import parse
from xmlkernels.cli.console import say, typed
from xmlkernels.training.relabel import LabelsConfig, relabel


def main(words: Sequence[str]) -> None:
    """Change the labels of the run that the arguments name."""
    what = __doc__ or ""
    options = parse(LabelsConfig, "xmlkernels labels", what, positional=True, words=words)
    relabel(options)
    say(f'ask it: {typed("predict")} --checkpoint {options.output} --text "…"')
