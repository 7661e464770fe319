"""Train a linear ranker over shortlists, and measure it beside the model that gave them."""

import logging
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from xmlkernels import InputError
from xmlkernels.checksums import of_files
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.formats import write_npz
from xmlkernels.evaluation import score_matrix
from xmlkernels.files import check_file
from xmlkernels.locks import own_folder
from xmlkernels.metrics import candidates_needed, evaluate, inverse_propensity
from xmlkernels.options import check_least, flag
from xmlkernels.predict.base import NAMES
from xmlkernels.predict.model import checkpoint_identity
from xmlkernels.predict.ranked import CLUSTERS, RANKER, VECTORIZER, Source
from xmlkernels.ranker.blend import Reranker, best, best_of_all, choose_share
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.linear import Settings, fit
from xmlkernels.ranker.matcher import ClusterMatcher
from xmlkernels.training.clock import Seconds
from xmlkernels.training.folder import write_json, write_text
from xmlkernels.training.owned import refuse_others
from xmlkernels.training.ranker_inputs import (
    Documents,
    model_inputs,
    read_features,
    vectorize,
    without_pairs,
)
from xmlkernels.tree.label_tree import LabelTree

log = logging.getLogger(__name__)

INPUTS, WRITTEN = "inputs", ("metrics.json", "predictions.npz")
SHOWN = {"val": "validation", "test": "test"}


@dataclass(frozen=True)
class RankerConfig:
    dataset: str
    """A dataset folder."""
    output: str
    """Folder for the ranker and its figures; made when it is not there, files of an earlier ranker
    are replaced.
    """
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


def check(options: RankerConfig) -> None:
    """Refuses options that cannot be used or would do nothing, before any work."""
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
    check_least(options, 1, "longest", "min_df", "shortlist", "beam", "top_k")
    check_least(options, 0, "max_features", "threads")
    if options.share is not None and not (math.isfinite(options.share) and 0 <= options.share <= 1):
        raise InputError(
            "--share",
            "a number from 0 to 1",
            str(options.share),
            "leave it out to choose it on validation",
        )
    refuse_idle(options)
    for path in filter(None, texts):
        check_file(path)
    refuse_others(options.output)


def refuse_idle(options: RankerConfig) -> None:
    """InputError where a flag beside others would do nothing."""
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


def train_ranker(options: RankerConfig) -> dict[str, Any]:
    """Trains and measures the ranker; returns what metrics.json holds."""
    check(options)
    with own_folder(options.output, writes=(*WRITTEN, RANKER, NAMES)) as folder:
        clear_inner(folder)
        return _train(options, folder)


def _train(options: RankerConfig, folder: Path) -> dict[str, Any]:
    dataset = opened(options)
    if options.checkpoint:
        checkpoint_identity(options.checkpoint)  # for a mistake in its name
    tree = opened_tree(options.tree, dataset) if options.tree else None
    begin(folder, dataset)
    clock = Seconds()
    documents = {name: Documents(split) for name, split in dataset.splits.items()}
    checkpoint = vocabulary = ""
    if options.tfidf:
        with clock.on("TF-IDF"):
            vocabulary = load_tfidf(options, dataset, documents, folder)
    if options.checkpoint:  # after TF-IDF: a mistake in the texts is told before the long pass
        with clock.on("embeddings and shortlists"):
            checkpoint = model_inputs(
                options.checkpoint,
                dataset,
                documents,
                options.shortlist,
                folder / INPUTS,
                options.device,
                embedding=options.embedding,
                vocabulary=vocabulary,
            )
    source = source_of(options, checkpoint, vocabulary)
    weights = {name: getattr(options, name) for name in ("embedding_weight", "tfidf_weight")}
    for part in documents.values():
        part.features = Features.join(part.embedding, part.tfidf, **weights)
    if tree is not None:
        with clock.on("clusters"):
            match(options, tree, documents, folder / CLUSTERS)
    first = documents["train"]
    listed = (
        None
        if first.shortlist is None
        else without_pairs(first.shortlist, first.split.filter_pairs)
    )
    with clock.on("ranker"):
        facts = {
            "dataset": dataset.content_hash,
            "options": asdict(options),
            "source": asdict(source),
        }
        ranker = fit(
            first.features,
            first.split.labels,
            listed,
            options.training,
            threads=options.threads,
            facts=facts,
        )
    log.info(
        f"{ranker.sparse.nnz / dataset.num_labels:,.0f} TF-IDF weights a label are left of "
        f"{ranker.sparse.shape[1]:,}"
    )
    share = 1.0 if options.one_vs_all or options.share is None else options.share
    reranker = Reranker(ranker, share, options.blend, **weights)
    with clock.on("evaluation"):
        report, reranker = measure(options, dataset, documents, reranker)
    beside = [NAMES, *([VECTORIZER] if vocabulary else []), *([CLUSTERS] if options.tree else [])]
    facts = ranker.facts | {"beside": of_files(folder, beside)}
    replace(reranker, ranker=replace(ranker, facts=facts)).save(folder / RANKER)
    report |= {
        "dataset": dataset.name,
        "dataset_hash": dataset.content_hash,
        "propensity": dataset.propensity,
    }
    report |= {
        "seconds": clock.spent,
        "options": asdict(options),
        "weights_per_label": ranker.sparse.nnz / dataset.num_labels,
    }
    write_json(folder / "metrics.json", report)
    return report


def begin(folder: Path, dataset: Dataset) -> None:
    """Removes the ranker that the folder may hold: where a ranker stands, the files beside it
    belong to it.
    """
    for name in ("metrics.json", RANKER, NAMES):
        (folder / name).unlink(missing_ok=True)
    if dataset.label_names is not None:
        write_text(folder / NAMES, "".join(f"{name}\n" for name in dataset.label_names))


def clear_inner(folder: Path) -> None:
    """Removes what a killed process left in the folders of vocabulary, clusters and inputs, where
    this command alone writes.
    """
    for inner in (folder / VECTORIZER, folder / CLUSTERS, folder / INPUTS):
        for left in inner.glob(".*.part"):
            left.unlink(missing_ok=True)


def source_of(options: RankerConfig, checkpoint: str, vocabulary: str) -> Source:
    """What xmlkernels predict must know to make shortlists and features of new texts."""
    shortlist: Literal["model", "tree", "all"]
    shortlist = "model" if options.checkpoint else "tree" if options.tree else "all"
    words: Literal["same", "own", "features", "none"] = "same"
    if not options.tfidf:
        words = "none"
    elif options.features:
        words = "features"
    elif options.train_text:
        words = "own"
    return Source(
        shortlist, words, checkpoint, options.shortlist if options.checkpoint else 0, vocabulary
    )


def opened(options: RankerConfig) -> Dataset:
    """The dataset, if it has what the options need."""
    dataset = Dataset.open(options.dataset)
    if "train" not in dataset.splits:
        raise InputError(
            options.dataset, "training documents", "none", "prepare it from a file that holds some"
        )
    if options.share is None and not options.one_vs_all and "val" not in dataset.splits:
        mend = "give --share, or prepare the data with --validation-share"
        raise InputError(
            options.dataset, "a validation split, to choose the ranker's share on", "none", mend
        )
    return dataset


def load_tfidf(
    options: RankerConfig, dataset: Dataset, documents: dict[str, Documents], folder: Path
) -> str:
    """TF-IDF of every split, from ready features, from text files, or from the texts that the
    dataset keeps.

    Returns:
        The content hash of the vocabulary; "" where the features were ready.
    """
    vocabulary = ""
    files = {"train": options.train_text, "val": options.validation_text, "test": options.test_text}
    if options.features:
        found = read_features(options.features, dataset)
    else:
        texts = {name: path for name, path in files.items() if path}
        for name in documents:
            if texts and name not in texts:
                flag = {"val": "--validation-text", "test": "--test-text"}[name]
                raise InputError(
                    flag, f"a file, for the dataset has a split {name}", "none", "name its texts"
                )
        words = {
            "longest": options.longest,
            "min_df": options.min_df,
            "max_features": options.max_features or None,
        }
        found, vocabulary = vectorize(texts, dataset, words, folder / VECTORIZER)
    for name, part in documents.items():
        part.tfidf = found[name]
    return vocabulary


def opened_tree(path: str, dataset: Dataset) -> LabelTree:
    """A label tree of this dataset; InputError where it is another's."""
    tree = LabelTree.load(path)
    tree.check_dataset(dataset.content_hash, dataset.num_labels)
    return tree


def match(
    options: RankerConfig, tree: LabelTree, documents: dict[str, Documents], folder: Path
) -> None:
    """Shortlists of every split from linear classifiers of the tree's clusters."""
    clusters = [tree.ancestors(level)[tree.place] for level in range(tree.levels - 1)]
    settings = replace(options.training, negatives=0)
    first = documents["train"]
    matcher = ClusterMatcher.fit(
        first.features,
        first.split.labels,
        clusters,
        beam=options.beam,
        settings=settings,
        threads=options.threads,
    )
    matcher.save(folder)
    for part in documents.values():
        part.shortlist = matcher.shortlist(part.features, threads=options.threads)


def measure(
    options: RankerConfig, dataset: Dataset, documents: dict[str, Documents], reranker: Reranker
) -> tuple[dict[str, Any], Reranker]:
    """Metrics of validation and test: plain model, ranker, both; the share is chosen on validation
    where it is not given.
    """
    weight = inverse_propensity(dataset.splits["train"].labels, *dataset.propensity)
    report: dict[str, Any] = {}
    for name in ("val", "test"):
        if name not in documents:
            continue
        part = documents[name]
        pairs, labels = part.split.filter_pairs, part.split.labels
        depth = candidates_needed(options.top_k, pairs, dataset.num_labels)
        if part.shortlist is None:
            scores = {
                "ranker": best_of_all(
                    reranker.ranker, part.features, depth, threads=options.threads
                )
            }
        else:
            margins = reranker.ranker.score(part.features, part.shortlist, threads=options.threads)
            if name == "val" and options.share is None:
                reranker, _ = choose_share(reranker, part.shortlist, margins, labels, pairs)
                log.info(
                    f"best mean of P@1, P@3 and P@5 on validation: --share {reranker.share:g} "
                    f"--blend {reranker.how}"
                )
            plain = "clusters alone" if options.tree else "plain model"
            scores = {
                plain: part.shortlist,
                "ranker": margins,
                "both": reranker.mix(part.shortlist, margins),
            }
        report[SHOWN[name]] = {}
        for what, matrix in scores.items():
            values, rows = best(matrix, pairs, options.top_k)
            report[SHOWN[name]][what] = evaluate(rows, labels, weight)
        if name == "test":  # the last of the scores is the result
            result = score_matrix(values, rows, dataset.num_labels)
            write_npz(Path(options.output) / "predictions.npz", result, keep_zeros=True)
    return report | {"share": reranker.share, "blend": reranker.how}, reranker
