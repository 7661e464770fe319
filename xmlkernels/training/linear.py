"""The recipe `linear`: a label tree and a linear classifier per label on it, in one command."""

import logging
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xmlkernels import InputError
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.formats import read_npz, write_npz
from xmlkernels.evaluation import score_matrix
from xmlkernels.locks import own_folder
from xmlkernels.metrics import evaluate, inverse_propensity
from xmlkernels.options import check_least
from xmlkernels.ranker.blend import best, combine
from xmlkernels.ranker.linear import Settings
from xmlkernels.report.page import write_report
from xmlkernels.report.run import open_run
from xmlkernels.training.calibrating import CalibrateConfig, calibrate_held
from xmlkernels.training.clock import Deadline
from xmlkernels.training.config import Config
from xmlkernels.training.folder import copy_profile, write_json
from xmlkernels.training.forest import finished, train_rankers
from xmlkernels.training.inputs import cached_tree, cached_tree_folder, open_dataset
from xmlkernels.training.label_vectors import SharedFeatures
from xmlkernels.training.measured import split_report
from xmlkernels.training.owned import refuse_others
from xmlkernels.training.ranker import Answered, train_ranker
from xmlkernels.training.ranker_config import RankerConfig
from xmlkernels.training.ranker_folder import (
    OTHERS,
    WRITTEN,
    begin_forest,
    refuse_held,
    write_count,
)
from xmlkernels.training.ranker_inputs import Words

log = logging.getLogger(__name__)

# Chosen on whole source packages held out of debian-deps: what is taken where there is no
# validation split to choose it on.
SHARE = 0.7
_LABELS_PER_CLUSTER = 100
# 2^10 clusters are scored one by one; more get levels above them, where documents lose their
# clusters: docs/results/wordnet-related.md has what that costs.
_ONE_LEVEL = 10
_STEP = 4
KEPT = (
    "dataset", "dataset_hash", "dataset_folder", "propensity", "bags_of_words", "commit",
    "environment",
)  # fmt: skip


@dataclass(frozen=True)
class LinearConfig:
    """Options of the recipe `linear`: those of `xmlkernels tree` and `xmlkernels rank` it needs."""

    # ---- data ----
    dataset: str = "docstrings"
    """A folder made by xmlkernels prepare with --keep-texts, or "docstrings": the built-in corpus,
    made on first use."""
    documents: int = 0
    """Built-in corpus only: take a deterministic part of about this many documents; 0 takes all."""
    output: str = "runs/linear"
    """Folder for the ranker and its figures."""
    cache: str = "cache"
    """Where the built-in corpus and label trees are kept, by content: a second run takes its tree
    from there."""

    # ---- label tree ----
    depths: tuple[int, ...] = ()
    """2^depth clusters per level, coarse to fine; by default about 100 labels per cluster. Up to
    200 labels have no tree: each is trained and scored on every document."""
    graph: bool = False
    """Mix each label's features with those of the labels it occurs with, as `xmlkernels tree` does:
    most of a tree's time and memory, and no better rankers on any measured dataset."""
    beam: int = 10
    """Clusters kept per level, whose labels make the shortlist of a document."""
    trees: int = 1
    """Trees, from one seed after another, each with a ranker of its own in OUTPUT/tree0, tree1, …;
    the mean of their probabilities is the result. Features of texts and labels are computed
    once."""

    # ---- features ----
    longest: int = 1
    """Words of the longest phrase in TF-IDF."""
    min_df: int = 2
    """Training texts that a word or phrase must occur in."""
    max_features: int = 0
    """TF-IDF columns, the most frequent ones; 0 takes all."""

    # ---- training ----
    label_text: bool = False
    """Each label's text is one more document of that label."""
    training: Settings = field(default_factory=lambda: Settings(epochs=6))
    """How each classifier is trained."""
    threads: int = 0
    """CPU threads; 0 takes all."""

    # ---- result ----
    share: float | None = None
    """The classifiers' share in the final score, the rest is the clusters'; by default chosen on
    validation (mean of P@1, P@3 and P@5), with `blend`. 0.7 of a product where there is none."""
    blend: Literal["log_odds", "product"] = "log_odds"
    """With --share: of log-odds and margins, or of probabilities."""
    top_k: int = 100
    """Labels kept per document in predictions.npz."""
    resume: bool = False
    """Go on with the trees that `output` holds: those that are trained stay."""
    overwrite: bool = False
    """Replace the ranker that `output` holds."""
    report: bool = True
    """Write report.html into the folder: metrics with intervals, rare labels, calibration,
    documents that went best and worst. `xmlkernels report RUN` writes it later, too."""
    show: Literal["short", "all"] = "short"
    """Metrics printed at the end: short: in tables; all: every one with a sentence that says what
    it is, those of `annif eval` among them. metrics.json has all."""


def train_linear(
    options: LinearConfig,
    deadline: Deadline | None = None,
    words: Words | None = None,
    answers: Answered | None = None,
) -> dict[str, Any]:
    """Build the trees, train the classifiers and measure them; return what metrics.json holds.

    Args:
        options: the settings.
        deadline: when the command is to have ended: a forest then has as many trees as there was
            time for, one at least; None: never.
        words: TF-IDF of these texts and settings, where somebody has computed it, or an empty one
            that is filled.
        answers: of one tree: receives scores and labels [N, k] of the best labels, by split.

    Raises:
        InputError: options or data that cannot be used.
    """
    if options.documents and options.dataset != Config.dataset:
        raise InputError(
            "--documents",
            "the built-in corpus",
            f"the dataset folder {options.dataset}",
            "leave it out: it would do nothing",
        )
    check_least(options, 1, "trees")
    if options.resume and options.overwrite:
        mend = "choose one of them"
        raise InputError("--resume", "no --overwrite beside it", "both", mend)
    refuse_others(options.output)  # before a corpus or a tree is made for it
    if not (options.resume or options.overwrite):
        refuse_held(options.output)
    dataset = open_dataset(
        Config(
            dataset=options.dataset,
            documents=options.documents,
            cache=options.cache,
            encoder="bow",
        )
    )
    depths = options.depths or tree_depths(dataset.num_labels)
    if options.trees == 1:
        return _one(options, dataset, depths, words, answers)
    if not depths:
        expected = f"1: {dataset.num_labels:,} labels have no tree"
        raise InputError("--trees", expected, str(options.trees), "leave it out")
    with own_folder(options.output, writes=(*WRITTEN, *OTHERS)) as folder:
        return _forest(options, dataset, depths, folder, deadline, words)


def _one(
    options: LinearConfig,
    dataset: Dataset,
    depths: tuple[int, ...],
    words: Words | None,
    answers: Answered | None,
) -> dict[str, Any]:
    """Build a tree and train a ranker on it."""
    tree = ""
    if depths:
        tree = _tree(options, dataset, depths)
    else:
        log.info(f"{dataset.num_labels:,} labels: no tree, each is trained on every document")
    ranker = _ranker(options, dataset, tree)
    if options.resume and (report := finished(ranker)) is not None:
        log.info(f"--resume: the ranker in {options.output}/ is trained already")
        return report
    return train_ranker(ranker, words, answers)


def _tree(
    options: LinearConfig,
    dataset: Dataset,
    depths: tuple[int, ...],
    shared: SharedFeatures | None = None,
) -> str:
    """Make a tree where the cache has none, and return its folder."""
    where: dict[str, Any] = {
        "cache": options.cache,
        "seed": options.training.seed,
        "graph": options.graph,
    }
    cached_tree(dataset, depths, threads=options.threads, shared=shared, **where)
    return str(cached_tree_folder(dataset, depths, **where))


def _forest(
    options: LinearConfig,
    dataset: Dataset,
    depths: tuple[int, ...],
    folder: Path,
    deadline: Deadline | None,
    words: Words | None,
) -> dict[str, Any]:
    """Train a ranker on each of several trees, and measure the mean of their probabilities."""
    each = [
        replace(
            options,
            output=str(folder / f"tree{number}"),
            report=False,
            training=replace(options.training, seed=options.training.seed + number),
        )
        for number in range(options.trees)
    ]
    done = _finished(each, dataset, depths) if options.resume else []
    begin_forest(folder, options.trees, len(done))
    shared, trees = SharedFeatures(), {}
    if deadline is None:  # all before any ranker: what they share takes no memory from then on
        numbers = range(len(done), options.trees)
        trees = {n: _tree_of(each, n, dataset, depths, shared) for n in numbers}
        shared = SharedFeatures()

    def ranker_of(number: int) -> RankerConfig:
        tree = trees.get(number) or _tree_of(each, number, dataset, depths, shared)
        return _ranker(each[number], dataset, tree)

    trained = train_rankers(
        options.trees, ranker_of, folder, done=done, deadline=deadline, words=words
    )
    reports = trained.reports
    write_count(folder, len(reports))
    report = {key: reports[0][key] for key in KEPT}
    report["peak_rss_mb"] = max(made["peak_rss_mb"] for made in reports)
    report["shortlists"] = {
        f"tree {n}": kept
        for n, made in enumerate(reports)
        for kept in made.get("shortlists", {}).values()
    }
    report["rankers"] = [one.output for one in each[: len(reports)]]
    report["seconds"] = {f"tree{n}": made["seconds"] for n, made in enumerate(reports)}
    report["options"] = reports[0]["options"] | {"output": options.output, "trees": options.trees}
    if deadline is not None and len(reports) < options.trees:
        report["time_over"] = trained.told(deadline)
    if (split := dataset.splits.get("test")) is not None:
        parts = [
            read_npz(
                Path(output) / "predictions.npz",
                rows=len(split),
                cols=dataset.num_labels,
                keep_zeros=True,
            )
            for output in report["rankers"]
        ]
        odds = [part.data.astype(np.float64) for part in parts]
        mean = combine(parts, odds, [1.0] * len(parts), "probability")
        values, rows = best(mean, split.filter_pairs, options.top_k)
        weight = inverse_propensity(dataset.splits["train"].labels, *dataset.propensity)
        report["test"] = {
            **{f"tree {n}": made["test"]["both"] for n, made in enumerate(reports)},
            "all trees": evaluate(rows, split.labels, weight),
        }
        report |= split_report(rows, split.labels, dataset.splits["train"].labels)
        result = score_matrix(values.astype(np.float32), rows, dataset.num_labels)
        write_npz(folder / "predictions.npz", result, keep_zeros=True)
    copy_profile(folder, dataset)
    if "val" in dataset.splits:
        report |= _calibrated(options.output, dataset)
    # Last of all: who finds it finds a run with all that belongs to it.
    write_json(folder / "metrics.json", report)
    if options.report:
        write_report(open_run(folder, dataset))
    return report


def _calibrated(output: str, dataset: Dataset) -> dict[str, Any]:
    """Calibrate a forest, whose answers to validation nobody has computed yet."""
    try:
        return {"calibration": calibrate_held(CalibrateConfig(output, dataset=str(dataset.folder)))}
    except InputError as error:
        log.info(f"note: probabilities are not calibrated: {error}")
        return {}


def _tree_of(
    each: list[LinearConfig],
    number: int,
    dataset: Dataset,
    depths: tuple[int, ...],
    shared: SharedFeatures,
) -> str:
    """Make one of the trees of a forest."""
    log.info(f"tree {number + 1} of {len(each)}")
    return _tree(each[number], dataset, depths, shared)


def _finished(
    each: list[LinearConfig], dataset: Dataset, depths: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Return the reports of the first rankers of a forest that an earlier training has finished."""
    found: list[dict[str, Any]] = []
    for one in each:
        where: dict[str, Any] = {"cache": one.cache, "seed": one.training.seed, "graph": one.graph}
        tree = str(cached_tree_folder(dataset, depths, **where))
        report = finished(_ranker(one, dataset, tree))
        if report is None or report.get("dataset_hash") != dataset.content_hash:
            break
        found.append(report)
    if found:
        log.info(f"{len(found)} of {len(each)} trees are trained already")
    return found


def _ranker(options: LinearConfig, dataset: Dataset, tree: str) -> RankerConfig:
    share, blend = options.share, options.blend
    if share is None and tree and "val" not in dataset.splits:
        share, blend = SHARE, "product"
        log.info(
            f"{dataset.folder} has no validation split: --share {share:g} --blend {blend}, as "
            "chosen on another dataset"
        )
    return RankerConfig(
        str(dataset.folder),
        options.output,
        tree=tree,
        one_vs_all=not tree,
        beam=options.beam if tree else RankerConfig.beam,
        longest=options.longest,
        min_df=options.min_df,
        max_features=options.max_features,
        label_text=options.label_text,
        training=options.training,
        threads=options.threads,
        share=share,
        blend=blend,
        top_k=options.top_k,
        report=options.report,
        show=options.show,
    )


def tree_depths(labels: int) -> tuple[int, ...]:
    """Depths of a tree with about 100 labels in a finest cluster, one level up to 2^10 clusters.

    11,862 labels give (7,), 105,913 (10,), 670,000 (9, 13); up to 200 give none.
    """
    if labels <= 2 * _LABELS_PER_CLUSTER:
        return ()
    finest = max(1, round(math.log2(labels / _LABELS_PER_CLUSTER)))
    if finest <= _ONE_LEVEL:
        return (finest,)
    levels = min(1 + math.ceil((finest - _ONE_LEVEL) / _STEP), 4)
    return tuple(finest - _STEP * above for above in reversed(range(levels)))
