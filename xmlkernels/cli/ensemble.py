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
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.formats import read_npz, read_sparse, write_npz, write_sparse
from xmlkernels.evaluation import score_matrix
from xmlkernels.files import check_file
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
from xmlkernels.predict.calibration import CALIBRATION, Calibration, sigmoid
from xmlkernels.ranker.blend import best, combine, towards_rare
from xmlkernels.training.folder import write_json
from xmlkernels.training.stops import done

MEASURED = 5  # metrics at 1 to 5
TEXT = (".txt", ".txt.gz")
KINDS = ("logit", "probability")


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
    threshold: str = ""
    """Measure, too, the labels of the sum, or of the one file, that have this probability or more;
    "f1": the one with the highest micro-F1, which is printed. --output keeps all labels."""
    output: str = ""
    """.npz or .txt(.gz) for the summed scores, as logits: the log-odds of the weighted mean of the
    probabilities, or the weighted mean of the log-odds."""
    top_k: int = 100
    """Labels per document in the output."""
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


def read_scores(path: str, documents: int, labels: int, *, keep_zeros: bool = True) -> csr_matrix:
    """Read a score file as CSR float32 [documents, labels].

    With `keep_zeros`, zeros stored in an .npz file stay: they are scores.
    CascadeXML's .npz files have a last column for padding: it is dropped where it is empty.

    Raises:
        InputError: a file that cannot be read, or one of another shape.
    """
    check_file(path)
    if not path.endswith((".npz", *TEXT)):
        raise InputError(
            path,
            "a score file that ends in .npz, .txt or .txt.gz",
            "another",
            "rename or convert it",
        )
    if path.endswith(".npz"):
        matrix = read_npz(path, rows=documents, keep_zeros=keep_zeros)
    else:
        matrix = read_sparse(path, rows=documents)
    if matrix.shape[1] == labels + 1 and not matrix.data[matrix.indices == labels].any():
        matrix = matrix[:, :labels]
    if matrix.shape[1] != labels:
        mend = "name the scores of this dataset"
        raise InputError(
            path, f"{labels} columns, the labels of the dataset", str(matrix.shape[1]), mend
        )
    return matrix


def log_odds(matrix: csr_matrix, kind: str, path: str) -> np.ndarray:
    """Return the stored scores as finite log-odds, float64 [nnz].

    Raises:
        InputError: a probability outside 0 to 1.
    """
    values: np.ndarray = matrix.data.astype(np.float64)
    if kind == "logit":
        return values
    bad = np.flatnonzero((values < 0) | (values > 1))
    if bad.size:
        row = int(np.searchsorted(matrix.indptr, bad[0], "right")) - 1
        where = f"{path}, row {row}, label {matrix.indices[bad[0]]}"
        raise InputError(
            where,
            "a probability from 0 to 1",
            f"{values[bad[0]]:g}",
            "say --scores logit if they are logits",
        )
    return to_log_odds(values)


def to_log_odds(probability: np.ndarray) -> np.ndarray:
    """Return ln p/(1-p), finite also at 0 and 1."""
    p = np.clip(probability, np.finfo(np.float64).tiny, 1 - np.finfo(np.float64).epsneg)
    return np.asarray(np.log(p) - np.log1p(-p))


def calibrated(path: str, matrix: csr_matrix, odds: np.ndarray) -> np.ndarray:
    """Return calibrated log-odds of the scores of a file.

    Raises:
        InputError: no calibration in the file's folder, or one of other labels.
    """
    folder = Path(path).parent
    inner = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
    if not (inner / CALIBRATION).is_file():
        mend = f"run xmlkernels calibrate {folder}"
        raise InputError(str(inner), f"a {CALIBRATION}", "no such file", mend)
    found = Calibration.load(inner, matrix.shape[1])
    return found.log_odds(odds, matrix.indices.astype(np.int64))


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
    if options.split not in dataset.splits:
        raise InputError(
            "--split",
            f"one of {', '.join(dataset.splits)}",
            options.split,
            f"{dataset.folder} has no other",
        )
    split = dataset.splits[options.split]
    weight = inverse_propensity(dataset.splits["train"].labels, *dataset.propensity)
    kinds = options.scores * (len(options.files) if len(options.scores) == 1 else 1)
    # A logit of 0 is a score; a probability of 0 says what an absent one does.
    files = [
        read_scores(path, len(split), dataset.num_labels, keep_zeros=kind == "logit")
        for path, kind in zip(options.files, kinds, strict=True)
    ]
    odds = [
        log_odds(m, kind, path) for m, kind, path in zip(files, kinds, options.files, strict=True)
    ]
    if options.calibrated:
        odds = [
            calibrated(path, matrix, z)
            for path, matrix, z in zip(options.files, files, odds, strict=True)
        ]
    deepest = LIMIT if options.show == "all" else MEASURED

    def measure(rows: np.ndarray) -> dict[str, float]:
        found = evaluate(rows, split.labels, weight)
        if options.show == "all":
            found |= macro_metrics(rows, split.labels) | annif_metrics(rows, split.labels)
        return found

    measured = {}
    for number, (matrix, z) in enumerate(zip(files, odds, strict=True)):
        alone = csr_matrix((z, matrix.indices, matrix.indptr), matrix.shape)
        path = options.files[number]
        name = path if path not in measured else f"{path} ({number + 1})"
        measured[name] = measure(best(alone, split.filter_pairs, deepest)[1])
    several = len(files) > 1 or options.propensity > 0
    if several or options.output or options.threshold:
        total = combine(files, odds, options.weights or [1.0] * len(files), options.sum)
        if options.propensity:
            total = towards_rare(total, weight, options.propensity)
        values, rows = best(total, split.filter_pairs, options.top_k)
        if several:
            name, measured["sum"] = "sum", measure(rows)
        if options.threshold:
            measured[name] |= measure_cut(options.threshold, values, rows, split.labels)
        if options.output:
            kept = score_matrix(values.astype(np.float32), rows, dataset.num_labels)
            if options.output.endswith(".npz"):
                write_npz(options.output, kept, keep_zeros=True)
            else:
                kept.data[kept.data == 0] = np.finfo(np.float32).tiny
                write_sparse(options.output, kept)
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
