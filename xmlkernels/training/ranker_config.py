"""The options of a linear ranker over shortlists, and what they refuse before any work."""

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from xmlkernels import InputError
from xmlkernels.files import check_file
from xmlkernels.options import check_least, flag
from xmlkernels.ranker.linear import Settings
from xmlkernels.training.owned import refuse_others


@dataclass(frozen=True)
class RankerConfig:
    """Options of a ranker: what it ranks, features, training and result."""

    dataset: str
    """A dataset folder."""
    output: str
    """Folder for the ranker and its metrics; files of an earlier ranker in it are replaced."""
    checkpoint: str = ""
    """A run's output folder, or the checkpoint folder in it; none: TF-IDF alone."""
    tree: str = ""
    """Without a checkpoint: a label tree of xmlkernels tree, whose clusters give the shortlists."""
    one_vs_all: bool = False
    """Without a checkpoint: every label is trained and scored on every document; for few labels."""

    # ---- features ----
    tfidf: bool = True
    """TF-IDF beside the embedding."""
    embedding: bool = True
    """The checkpoint's embedding beside TF-IDF; without it the checkpoint gives shortlists and
    scores alone.
    """
    train_text: str = ""
    """Text files, one document a line, to take TF-IDF from; one for each split of the dataset."""
    validation_text: str = ""
    """The same of the validation split."""
    test_text: str = ""
    """The same of the test split."""
    features: str = ""
    """A folder of ready features in place of texts: train.npz, val.npz, test.npz."""
    longest: int = 2
    """Words of the longest phrase in TF-IDF."""
    min_df: int = 2
    """Training texts that a word or phrase must occur in."""
    max_features: int = 0
    """TF-IDF columns, the most frequent ones; 0 takes all."""
    embedding_weight: float = 1.0
    """Length of the embedding's rows, against `tfidf_weight`: a longer block costs the regulariser
    less.
    """
    tfidf_weight: float = 1.0
    """Length of the rows of TF-IDF."""

    # ---- training ----
    label_text: bool = False
    """Each label's text is one more document of that label; with --checkpoint, words alone
    (--no-embedding) are trained on it.
    """
    shortlist: int = 50
    """Labels per document that the checkpoint lists."""
    beam: int = 10
    """Clusters kept at every level of --tree."""
    training: Settings = field(default_factory=Settings)
    """How each label's classifier is trained."""
    threads: int = 0
    """CPU threads of the ranker; 0 leaves numba's choice."""
    device: str = "cpu"
    """Where the checkpoint's model runs: cpu, cuda, cuda:1, or auto."""

    # ---- result ----
    share: float | None = None
    """The ranker's share in the final score; chosen on validation (mean of P@1, P@3 and P@5) when
    not given, with `blend`.
    """
    blend: Literal["log_odds", "product"] = "log_odds"
    """With --share: of log-odds and margins, or of probabilities."""
    top_k: int = 100
    """Labels kept per document in predictions.npz."""
    report: bool = True
    """Write report.html into the folder: metrics with intervals, rare labels, calibration,
    documents that went best and worst. `xmlkernels report RUN` writes it later, too."""
    show: Literal["short", "all"] = "short"
    """Metrics printed at the end: short: in tables; all: every one with a sentence that says what
    it is, those of `annif eval` among them. metrics.json has all."""


def check(options: RankerConfig) -> None:
    """Refuse options that cannot be used or would do nothing, before any work.

    Raises:
        InputError: the first of them.
    """
    sources = [
        name
        for name, given in (
            ("--checkpoint", options.checkpoint),
            ("--tree", options.tree),
            ("--one-vs-all", options.one_vs_all),
        )
        if given
    ]
    if len(sources) != 1:
        expected = "one of --checkpoint, --tree and --one-vs-all, for the shortlists"
        raise InputError("arguments", expected, ", ".join(sources) or "none", "choose one")
    if not options.tfidf and not (options.checkpoint and options.embedding):
        raise InputError(
            "--no-tfidf",
            "--checkpoint with its embedding",
            "nothing else to rank by",
            "leave --no-tfidf out",
        )
    texts = [options.train_text, options.validation_text, options.test_text]
    if options.features and any(texts):
        raise InputError("--features", "no text files beside it", "both", "choose one")
    if any(texts) and not options.train_text:
        raise InputError(
            "--train-text",
            "a file, as there are others",
            "none",
            "name the texts of every split, or of none",
        )
    if not options.tfidf and (options.features or any(texts)):
        raise InputError(
            "--no-tfidf",
            "no texts and no --features",
            "some",
            "leave them out: they would do nothing",
        )
    if options.label_text:
        _check_label_text(options)
    check_least(options, 1, "longest", "min_df", "shortlist", "beam", "top_k")
    check_least(options, 0, "max_features", "threads")
    if options.share is not None and not (math.isfinite(options.share) and 0 <= options.share <= 1):
        raise InputError(
            "--share",
            "a number from 0 to 1",
            str(options.share),
            "leave it out to choose it on validation",
        )
    _refuse_idle(options)
    for path in filter(None, texts):
        check_file(path)
    refuse_others(options.output)


def _check_label_text(options: RankerConfig) -> None:
    for there, got, mend in (
        (options.features, "ready features, whose words are not known", "leave --features out"),
        (not options.tfidf, "--no-tfidf", "leave it out"),
        (
            options.checkpoint and options.embedding,
            "a checkpoint's embedding, which label texts have not",
            "say --no-embedding too",
        ),
    ):
        if there:
            raise InputError("--label-text", "a ranker of words alone", got, mend)


def _refuse_idle(options: RankerConfig) -> None:
    """Refuse a flag that would do nothing beside the others."""
    words = ("longest", "min_df", "max_features")
    values = vars(options) | vars(options.training)
    usual = {
        field.name: field.default for kind in (RankerConfig, Settings) for field in fields(kind)
    }
    for beside, given, names in (
        ("with --one-vs-all", options.one_vs_all, ("share", "negatives")),
        ("without --share", options.share is None, ("blend",)),
        ("without --tree", not options.tree, ("beam",)),
        ("without --checkpoint", not options.checkpoint, ("shortlist", "device", "embedding")),
        ("with --features", options.features, words),
        ("with --no-tfidf", not options.tfidf, words),
    ):
        for name in names:
            if given and values[name] != usual[name]:
                told = "--no-embedding" if name == "embedding" else flag(name)
                raise InputError(
                    told, f"no such flag {beside}", "one", "leave it out: it would do nothing"
                )
