"""Sum score files and measure them: `xmlkernels ensemble a.npz b.npz c.txt --dataset DIR`.

--output writes the sum. One file alone is measured as it is. A file is a scipy CSR .npz [documents,
labels] or a text file of the Extreme Classification Repository: `documents labels`, then a line of
`label:score` per document (plain or .gz). Rows are the documents of the split, columns the labels
of the dataset. A stored logit of exactly 0 is a score in an .npz file; readers of text files leave
zeros out, so that one is written there as the smallest number above 0.

A forest, as Parabel's three trees, is the sum of rankers, each trained on a tree of its own
(`xmlkernels tree --seed N`, `xmlkernels rank --tree TREE`): `xmlkernels ensemble
runs/tree*/predictions.npz --dataset DIR`, and for new texts `xmlkernels predict --ranker runs/tree*
--input FILE`.

Files hold logits, as this project writes them and CascadeXML reads text files, or probabilities
(`--scores probability`, as CascadeXML's .npz files do). The sum is one of probabilities, where an
absent label counts 0, or of log-odds, where it counts as much as the lowest label that the file has
for this document: it cannot have had more; a file that has none for it has no say. Pairs that the
dataset filters out are removed before the cut, in every row of the table.

--calibrated turns the logits of each file into calibrated log-odds first, by the calibration that
training or `xmlkernels calibrate` left in the file's folder: models then speak on one scale.

--learn FILES learns how to sum, from score files of documents that no model was trained on: those
of the validation split, of the same models in the same order. Boosted trees then weigh what each
model says of a label, how frequent it is and its place, and rank the 30 best of the plain sum. The
less alike the models are, the more it gains; compare it with the sum, which is printed beside it.

--threshold P measures the labels whose probability in the sum is P or more, as many as a document
has. --threshold f1 finds the P of the highest micro-F1: do so with the files of a validation split
(--split val), and name that P for the test split.

--propensity X favours rare labels: each probability of the sum is multiplied by the label's inverse
propensity to the power X before the cut. At 0.2 to 0.4 PSP@k rises while P@k hardly falls; choose X
on a validation split.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels import InputError
from xmlkernels.cli.arguments import parse, read_threshold
from xmlkernels.cli.console import print_comparison, print_every
from xmlkernels.cli.score_files import TEXT, read_log_odds, write_scores
from xmlkernels.data.dataset import Dataset, Split
from xmlkernels.locks import own_place
from xmlkernels.metrics import (
    annif_metrics,
    best_cut,
    cut_metrics,
    evaluate,
    inverse_propensity,
    macro_metrics,
)
from xmlkernels.metrics.annif import LIMIT
from xmlkernels.metrics.words import CUT
from xmlkernels.predict.calibration import sigmoid
from xmlkernels.ranker.blend import best, combine, towards_rare
from xmlkernels.ranker.stacking import Stack, candidates_of
from xmlkernels.training.folder import write_json
from xmlkernels.training.stops import done

MEASURED = 5  # metrics at 1 to 5
KINDS = ("logit", "probability")


@dataclass(frozen=True)
class Summed:
    """Score files of a split and their plain sum.

    Attributes:
        split: which documents.
        weight: inverse propensities of the labels, [L].
        counts: training documents of the labels, [L].
        files: of each file CSR [N, L] of log-odds.
        total: CSR [N, L], the sum as log-odds.
    """

    split: Split
    weight: np.ndarray
    counts: np.ndarray
    files: list[csr_matrix]
    total: csr_matrix


@dataclass(frozen=True)
class Options:
    """Which score files, of which dataset, and how they are summed."""

    files: tuple[str, ...]
    """Score files, .npz or .txt(.gz)."""
    dataset: str = ""
    """The dataset folder that the scores are of."""
    split: Literal["train", "val", "test"] = "test"
    """The split that they are of."""
    weights: tuple[float, ...] = ()
    """One for each file; only their ratios matter. Equal when not given."""
    scores: tuple[Literal["logit", "probability"], ...] = ("logit",)
    """What the files hold: one word for all, or one for each."""
    calibrated: bool = False
    """Each file lies in the folder of a run, a ranker or `linear --trees N` that is calibrated."""
    sum: Literal["probability", "log_odds"] = "probability"
    """What is summed."""
    propensity: float = 0.0
    """Power of the labels' inverse propensity that multiplies the probabilities of the sum: above 0
    rare labels rise, and PSP@k with them. 0 leaves it as it is."""
    learn: tuple[str, ...] = ()
    """Score files of documents that no model was trained on, one for each file in the same order:
    how to sum is learned from them."""
    learn_dataset: str = ""
    """The dataset folder that the files of --learn are of; --dataset when not given."""
    learn_split: Literal["train", "val", "test"] = "val"
    """The split that they are of."""
    threshold: str = ""
    """Measure, too, the labels of the sum, or of the one file, that have this probability or more;
    "f1": the one with the highest micro-F1, which is printed. --output keeps all labels."""
    output: str = ""
    """.npz or .txt(.gz) for the summed scores, as logits: the log-odds of the weighted mean of the
    probabilities, or the weighted mean of the log-odds."""
    top_k: int = 100
    """Labels per document in the output; 30 at most of a sum that is learned."""
    metrics: str = ""
    """.json for every metric at 1 to 5."""
    show: Literal["short", "all"] = "short"
    """Metrics printed: short: in tables; all: every one with a sentence that says what it is, those
    over labels and those of `annif eval` among them; --metrics gets these too."""


def check(options: Options) -> None:
    """Refuse options that cannot be used, before a file is read."""
    count = len(options.files)
    if not count:
        raise InputError("arguments", "one score file or more", "none", "name .npz or .txt files")
    if not options.dataset:
        raise InputError(
            "--dataset", "a dataset folder", "none", "name the one that the scores are of"
        )
    if options.weights and len(options.weights) != count:
        got = f"{len(options.weights)}"
        raise InputError(
            "--weights",
            f"{count} numbers, one for each file",
            got,
            "give as many or leave them out",
        )
    if any(not 0 <= weight < math.inf for weight in options.weights) or (
        options.weights and not sum(options.weights)
    ):
        got = " ".join(map(str, options.weights))
        raise InputError(
            "--weights", "finite numbers from 0, not all of them 0", got, "correct them"
        )
    if not 0 <= options.propensity < math.inf:
        raise InputError(
            "--propensity", "a finite number from 0", str(options.propensity), "correct it"
        )
    if len(options.scores) not in (1, count) or not set(options.scores) <= set(KINDS):
        got = " ".join(options.scores)
        raise InputError(
            "--scores",
            f"logit or probability, once or {count} times",
            repr(got),
            "give one for all files",
        )
    if options.calibrated and "probability" in options.scores:
        expected = "logits, which a calibration is of"
        raise InputError("--calibrated", expected, "--scores probability", "leave one of them out")
    if options.learn and len(options.learn) != count:
        mend = "name the files of the same models in the same order"
        raise InputError("--learn", f"{count} files, one for each", f"{len(options.learn)}", mend)
    if options.learn and options.calibrated:
        expected = "no --learn beside it, which learns a scale of its own"
        raise InputError("--calibrated", expected, "both", "leave one of them out")
    if options.learn_dataset and not options.learn:
        mend = "leave it out: it would do nothing"
        raise InputError("--learn-dataset", "--learn with it", "none", mend)
    same = (options.learn_dataset or options.dataset) == options.dataset
    if options.learn and same and options.learn_split == options.split:
        expected = f"another split than {options.split}, which is measured"
        raise InputError("--learn-split", expected, "that one", "learn from validation documents")
    read_threshold(options.threshold, "f1")
    if options.top_k < MEASURED:
        raise InputError(
            "--top-k", f"{MEASURED} or more", str(options.top_k), "metrics go down to that place"
        )
    if options.output and not options.output.endswith((".npz", *TEXT)):
        raise InputError(
            "--output", "a name that ends in .npz, .txt or .txt.gz", options.output, "rename it"
        )
    if options.metrics and not options.metrics.endswith(".json"):
        raise InputError("--metrics", "a name that ends in .json", options.metrics, "rename it")


def run(options: Options) -> dict[str, dict[str, float]]:
    """Return metrics in percent of every file and, of several, of their sum (named "sum")."""
    check(options)
    with ExitStack() as held:  # before the work: a place that cannot be written, or is in use
        for flag, path in (("--output", options.output), ("--metrics", options.metrics)):
            if path:
                held.enter_context(own_place(path, flag))
        return _run(options)


def _run(options: Options) -> dict[str, dict[str, float]]:
    dataset = Dataset.open(options.dataset)
    here = summed(options, options.files, dataset, options.split, "--split")
    split, weight = here.split, here.weight
    deepest = LIMIT if options.show == "all" else MEASURED

    def measure(rows: np.ndarray) -> dict[str, float]:
        found = evaluate(rows, split.labels, weight)
        if options.show == "all":
            found |= macro_metrics(rows, split.labels) | annif_metrics(rows, split.labels)
        return found

    measured: dict[str, dict[str, float]] = {}
    for path, alone in zip(options.files, here.files, strict=True):
        name = path if path not in measured else f"{path} ({len(measured) + 1})"
        measured[name] = measure(best(alone, split.filter_pairs, deepest)[1])
    values, rows = best(here.total, split.filter_pairs, options.top_k)
    if len(here.files) > 1 or options.propensity > 0 or options.learn:
        name, measured["sum"] = "sum", measure(rows)
    if options.learn:
        values, rows = learned(options, here)
        name, measured["learned"] = "learned", measure(rows)
    if options.threshold:
        measured[name] |= measure_cut(options.threshold, values, rows, split.labels)
    if options.output:
        top = values[:, : options.top_k], rows[:, : options.top_k]
        write_scores(options.output, *top, dataset.num_labels)
    if options.metrics:
        facts = {
            "dataset": dataset.name,
            "dataset_hash": dataset.content_hash,
            "split": split.name,
            "sum": options.sum,
            "propensity": options.propensity,
        }
        write_json(Path(options.metrics), {**facts, "metrics": measured})
    return measured


def summed(
    options: Options, paths: Sequence[str], dataset: Dataset, name: str, flag: str
) -> Summed:
    """Read score files of a split, and sum them.

    Args:
        options: of the command.
        paths: the files.
        dataset: that they are of.
        name: of the split.
        flag: that names the split.
    """
    if name not in dataset.splits:
        mend = f"{dataset.folder} has no other"
        raise InputError(flag, f"one of {', '.join(dataset.splits)}", name, mend)
    split, train = dataset.splits[name], dataset.splits["train"].labels
    kinds = options.scores * (len(paths) if len(options.scores) == 1 else 1)
    files = [
        read_log_odds(path, kind, len(split), dataset.num_labels, is_calibrated=options.calibrated)
        for path, kind in zip(paths, kinds, strict=True)
    ]
    weights = options.weights or [1.0] * len(files)
    total = combine(files, [file.data for file in files], weights, options.sum)
    weight = inverse_propensity(train, *dataset.propensity)
    if options.propensity:
        total = towards_rare(total, weight, options.propensity)
    counts = np.bincount(train.indices, minlength=dataset.num_labels)
    return Summed(split, weight, counts, files, total)


def learned(options: Options, here: Summed) -> tuple[np.ndarray, np.ndarray]:
    """Learn the sum on other documents, and return log-odds and labels of these."""
    dataset = Dataset.open(options.learn_dataset or options.dataset)
    if dataset.num_labels != len(here.weight):
        expected, got = f"{len(here.weight):,} labels", f"{dataset.num_labels:,}"
        mend = "name a dataset of the same labels"
        raise InputError("--learn-dataset", expected, got, mend)
    other = summed(options, options.learn, dataset, options.learn_split, "--learn-split")
    of_other, of_here = (
        candidates_of(side.files, side.total, side.split.filter_pairs, side.counts)
        for side in (other, here)
    )
    return Stack(of_other, other.split.labels).rank(of_here)


def measure_cut(
    threshold: str, values: np.ndarray, rows: np.ndarray, truth: csr_matrix
) -> dict[str, float]:
    """Measure the labels that reach --threshold.

    Returns:
        As of `cut_metrics`, and the probability as `threshold`.
    """
    probability = sigmoid(values)
    least = read_threshold(threshold, "f1")
    if least == "f1":
        least = float(sigmoid(np.array(best_cut(values, rows, truth))))
    kept = np.where(probability >= least, rows, -1)
    return {"threshold": least, **cut_metrics(kept, truth)}


def main(words: Sequence[str]) -> None:
    """Sum and measure the files that the arguments name."""
    options = parse(Options, "xmlkernels ensemble", __doc__ or "", positional=True, words=words)
    measured = run(options)
    done()
    title = f"{options.dataset}, {options.split}"
    # Score files of runs are all called predictions.npz: the folder tells them apart.
    shown = {"/".join(Path(name).parts[-2:]): metrics for name, metrics in measured.items()}
    shown = shown if len(shown) == len(measured) else measured
    print_comparison(title, shown, ("P", "nDCG", "R"))
    print_comparison(f"{title}, by propensity", shown, ("PSP", "PSnDCG"))
    if options.threshold:
        name, metrics = list(shown.items())[-1]
        what = f"labels of a probability of {metrics['threshold']:.6g} or more"
        print_every(f"{title}, {name}: {what}", {key: metrics[key] for key in CUT})
    if options.show == "all":
        for name, metrics in shown.items():
            print_every(f"{title}, {name}", metrics)
