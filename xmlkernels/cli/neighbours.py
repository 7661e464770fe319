"""Score a split by its nearest training texts: `xmlkernels neighbours --dataset DIR`.

A text's neighbours are the training texts with the most similar words (cosine of TF-IDF). A label's
probability is its share of their votes, each the similarity to a power. No training, and another
kind of mistake than a model makes: in a sum of score files it lifts the others, most of all for
labels of few documents. `xmlkernels ensemble runs/model/predictions.npz near.npz --dataset DIR`.

Prepare the dataset with --keep-texts. With --label-text each label's text is one more training text
of that label. A pair that the dataset filters out is no vote: a text is not its own neighbour.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import csr_matrix, identity, vstack

from xmlkernels import InputError
from xmlkernels.cli.arguments import parse
from xmlkernels.cli.console import print_comparison
from xmlkernels.cli.score_files import to_log_odds
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.formats import write_npz
from xmlkernels.evaluation import score_matrix
from xmlkernels.locks import own_place
from xmlkernels.metrics import candidates_needed, drop_filtered, evaluate, inverse_propensity
from xmlkernels.options import check_least
from xmlkernels.ranker.knn import KNNBaseline
from xmlkernels.training.ranker_inputs import label_texts
from xmlkernels.training.stops import done


@dataclass(frozen=True)
class Options:
    """Whose neighbours vote, how many, and how."""

    dataset: str
    """A dataset folder with kept texts."""
    output: str = ""
    """.npz for the scores, as logits."""
    split: Literal["val", "test"] = "test"
    """The split to score."""
    neighbours: int = 200
    """Training texts that vote for each text."""
    power: float = 3.0
    """Of the similarity that a neighbour votes with: larger ones leave the word to the nearest."""
    label_text: bool = False
    """Each label's text is a training text of that label."""
    top_k: int = 100
    """Labels kept per document in the output."""


def check(options: Options) -> None:
    """Refuse options that cannot be used, before a file is read."""
    check_least(options, 1, "neighbours", "top_k")
    if not 0 < options.power < np.inf:
        raise InputError("--power", "a finite number above 0", str(options.power), "correct it")
    if options.output and not options.output.endswith(".npz"):
        raise InputError("--output", "a name that ends in .npz", options.output, "rename it")


def run(options: Options) -> dict[str, float]:
    """Score the split, write the scores where asked for, and return its metrics in percent.

    Raises:
        InputError: an option or a dataset that cannot be used.
    """
    check(options)
    with ExitStack() as held:  # before the work: a place that cannot be written, or is in use
        if options.output:
            held.enter_context(own_place(options.output, "--output"))
        return _run(options)


def _run(options: Options) -> dict[str, float]:
    dataset = Dataset.open(options.dataset)
    for name in ("train", options.split):
        if name not in dataset.splits:
            raise InputError(options.dataset, f"a split {name}", "none", "prepare it with one")
    train, split = dataset.splits["train"], dataset.splits[options.split]
    texts, labels, apart = list(train.texts), csr_matrix(train.labels), None
    if options.label_text:
        texts += label_texts(dataset)
        own = identity(dataset.num_labels, labels.dtype, format="csr")
        labels = csr_matrix(vstack([labels, own], "csr"))
        apart = split.filter_pairs + np.array([0, len(train)])
    count = candidates_needed(options.top_k, split.filter_pairs, dataset.num_labels)
    values, rows = KNNBaseline(texts, labels).predict(
        list(split.texts),
        count,
        neighbours=options.neighbours,
        power=options.power,
        apart=apart,
        share=True,
    )
    rows, values = drop_filtered(
        rows, values, split.filter_pairs, options.top_k, num_labels=dataset.num_labels
    )
    if options.output:
        odds = np.where(rows >= 0, to_log_odds(np.where(rows >= 0, values, 0.5)), -np.inf)
        scores = score_matrix(odds.astype(np.float32), rows, dataset.num_labels)
        write_npz(options.output, scores, keep_zeros=True)
    weight = inverse_propensity(train.labels, *dataset.propensity)
    return evaluate(rows, split.labels, weight)


def main(words: Sequence[str]) -> None:
    """Score and measure the split that the arguments name."""
    options = parse(Options, "xmlkernels neighbours", __doc__ or "", words=words)
    measured = {"neighbours": run(options)}
    done()
    title = f"{options.dataset}, {options.split}"
    print_comparison(title, measured, ("P", "nDCG", "R"))
    print_comparison(f"{title}, by propensity", measured, ("PSP", "PSnDCG"))
