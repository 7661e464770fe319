"""Train a linear ranker over shortlists, and compare it with the model that gave them."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_matrix, vstack

from xmlkernels import InputError
from xmlkernels.checksums import of_files
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.formats import write_npz
from xmlkernels.data.inputs import kept_parts
from xmlkernels.data.manifest import IDS
from xmlkernels.data.text_parts import TextParts
from xmlkernels.evaluation import score_matrix
from xmlkernels.locks import own_folder
from xmlkernels.metrics import candidates_needed, evaluate, inverse_propensity
from xmlkernels.predict.base import NAMES, RANKER
from xmlkernels.predict.calibrate import DEPTH
from xmlkernels.predict.model import checkpoint_identity
from xmlkernels.predict.source import CLUSTERS, VECTORIZER, Source, ranker_identity
from xmlkernels.ranker.blend import Reranker, best, best_of_all, choose_share, contenders
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.grouped import fit_groups
from xmlkernels.ranker.linear import LinearRanker, fit
from xmlkernels.ranker.matcher import ClusterMatcher
from xmlkernels.report.page import write_report
from xmlkernels.report.run import open_run
from xmlkernels.ticks import Ticks
from xmlkernels.training.calibrating import Found, calibrated_at_end
from xmlkernels.training.clock import Seconds
from xmlkernels.training.environment import around_a_ranker
from xmlkernels.training.folder import write_json
from xmlkernels.training.measured import split_report
from xmlkernels.training.ranker_config import RankerConfig, check
from xmlkernels.training.ranker_folder import INPUTS, OTHERS, WRITTEN, begin, clear_inner
from xmlkernels.training.ranker_inputs import (
    Documents,
    TrainingPart,
    Words,
    model_inputs,
    read_features,
    training_part,
    vectorize,
    without_pairs,
)
from xmlkernels.training.shortlists import Kept
from xmlkernels.tree.label_tree import LabelTree

log = logging.getLogger(__name__)

# First document, logits and margins of some from it on, CSR [n, L] of one pattern.
Scored = list[tuple[int, csr_matrix, csr_matrix]]
Answered = dict[str, tuple[np.ndarray, np.ndarray]]
_PAIRS = 1 << 22  # pairs (document, label) scored at one time
_CHOSEN_AT = 5  # the deepest cut of the metrics that choose a share
SHOWN = {"val": "validation", "test": "test"}


def train_ranker(
    options: RankerConfig, words: Words | None = None, answers: Answered | None = None
) -> dict[str, Any]:
    """Train and measure the ranker.

    Args:
        options: its settings.
        words: TF-IDF that it shares with rankers of the same texts and settings: the first
            computes it.
        answers: receives scores and labels [N, k] of the best labels, by split.

    Returns:
        What metrics.json holds.

    Raises:
        InputError: an option, a file or a folder that cannot be used.
    """
    check(options)
    with own_folder(options.output, writes=(*WRITTEN, *OTHERS)) as folder:
        clear_inner(folder)
        report, found = _train(options, folder, words or Words())
    ({} if answers is None else answers).update(found)
    return report


def _train(options: RankerConfig, folder: Path, words: Words) -> tuple[dict[str, Any], Found]:
    dataset = open_dataset(options)
    if options.checkpoint:
        checkpoint_identity(options.checkpoint)  # for a mistake in its name
    tree = open_tree(options.tree, dataset) if options.tree else None
    begin(folder, dataset)
    clock = Seconds()
    documents = {name: Documents(split) for name, split in dataset.splits.items()}
    checkpoint = vocabulary = ""
    if options.tfidf:
        with clock.on("TF-IDF"):
            vocabulary = load_tfidf(options, dataset, documents, folder, words)
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
    source = source_of(options, checkpoint, vocabulary, dataset.vocabulary is not None)
    weights = {name: getattr(options, name) for name in ("embedding_weight", "tfidf_weight")}
    for part in documents.values():
        part.features = Features.join(part.embedding, part.tfidf, **weights)
    training = training_part(options, dataset, documents["train"], folder, words)
    matcher = kept = None
    if tree is not None:
        with clock.on("clusters"):
            matcher = match(options, tree, training, folder / CLUSTERS)
            kept = matcher.kept(documents["train"].features, threads=options.threads)
    with clock.on("ranker"):
        facts = {"dataset": dataset.content_hash, "options": asdict(options)}
        facts |= {"source": asdict(source)} | kept_parts(TextParts.of(dataset))
        ranker = fit_ranker(options, documents["train"], training, matcher, kept, facts)
    left, columns = ranker.sparse.nnz / dataset.num_labels, ranker.sparse.shape[1]
    log.info(f"{left:,.0f} TF-IDF weights a label are left of {columns:,}")
    share = 1.0 if options.one_vs_all or options.share is None else options.share
    reranker = Reranker(ranker, share, options.blend, **weights)
    with clock.on("evaluation"):
        report, reranker, answers = measure(options, dataset, documents, reranker, matcher)
    beside = [NAMES, IDS]
    beside += [VECTORIZER] if vocabulary else []
    beside += [CLUSTERS] if options.tree else []
    facts = ranker.facts | {"beside": of_files(folder, beside)}
    whole = replace(reranker, ranker=replace(ranker, facts=facts))
    whole.save(folder / RANKER)
    if "val" in answers:
        report |= calibrated_at_end(folder, ranker_identity(whole), answers, dataset)
    report |= {
        "dataset": dataset.name,
        "dataset_hash": dataset.content_hash,
        "dataset_folder": str(dataset.folder.resolve()),
        "propensity": dataset.propensity,
        "bags_of_words": dataset.vocabulary is not None,
        "seconds": clock.spent,
        "options": asdict(options),
        "weights_per_label": left,
    } | around_a_ranker()
    write_json(folder / "metrics.json", report)
    if options.report:
        write_report(open_run(folder, dataset))
    return report, answers


def source_of(options: RankerConfig, checkpoint: str, vocabulary: str, bags: bool) -> Source:
    """Describe how xmlkernels predict makes shortlists and features; `bags` have no texts."""
    shortlist: Literal["model", "tree", "all"]
    shortlist = "model" if options.checkpoint else "tree" if options.tree else "all"
    words: Literal["same", "own", "features", "none"] = "same"
    if not options.tfidf:
        words = "none"
    elif options.features or bags:
        words = "features"
    elif options.train_text:
        words = "own"
    return Source(
        shortlist, words, checkpoint, options.shortlist if options.checkpoint else 0, vocabulary
    )


def open_dataset(options: RankerConfig) -> Dataset:
    """Open the dataset.

    Raises:
        InputError: it lacks a split that the options need.
    """
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
    options: RankerConfig,
    dataset: Dataset,
    documents: dict[str, Documents],
    folder: Path,
    words: Words,
) -> str:
    """Load or compute TF-IDF of every split into `documents`.

    It comes from ready features, from text files, or from the texts that the dataset keeps.

    Returns:
        The content hash of the vocabulary; "" where the features were ready.
    """
    vocabulary = ""
    files = {"train": options.train_text, "val": options.validation_text, "test": options.test_text}
    if options.features or dataset.vocabulary is not None:
        found = read_features(options.features, dataset)
    else:
        texts = {name: path for name, path in files.items() if path}
        for name in documents:
            if texts and name not in texts:
                flag = {"val": "--validation-text", "test": "--test-text"}[name]
                raise InputError(
                    flag, f"a file, for the dataset has a split {name}", "none", "name its texts"
                )
        settings = {
            "longest": options.longest,
            "min_df": options.min_df,
            "max_features": options.max_features or None,
        }
        found, vocabulary = vectorize(texts, dataset, settings, folder / VECTORIZER, words)
    for name, part in documents.items():
        part.tfidf = found[name]
    return vocabulary


def open_tree(path: str, dataset: Dataset) -> LabelTree:
    """Load a label tree.

    Raises:
        InputError: there is none, or it is another dataset's.
    """
    tree = LabelTree.load(path)
    tree.check_dataset(dataset.content_hash, dataset.num_labels)
    return tree


def match(
    options: RankerConfig, tree: LabelTree, training: TrainingPart, folder: Path
) -> ClusterMatcher:
    """Train linear classifiers of the tree's clusters, and write them."""
    clusters = [tree.ancestors(level)[tree.place] for level in range(tree.levels - 1)]
    matcher = ClusterMatcher.fit(
        training.features,
        training.labels,
        clusters,
        beam=options.beam,
        settings=replace(options.training, negatives=0),
        threads=options.threads,
    )
    matcher.save(folder)
    return matcher


def fit_ranker(
    options: RankerConfig,
    first: Documents,
    training: TrainingPart,
    matcher: ClusterMatcher | None,
    kept: csr_matrix | None,
    facts: dict[str, Any],
) -> LinearRanker:
    """Train the labels' classifiers on the shortlists of a model, of clusters, or on everything."""
    how: dict[str, Any] = {"threads": options.threads, "facts": facts}
    if matcher is not None:
        return fit_groups(
            training.features,
            training.labels,
            matcher.clusters[-1],
            None if kept is None else training.listed(kept),
            options.training,
            excluded=first.split.filter_pairs,
            **how,
        )
    listed = first.shortlist
    if listed is not None:
        listed = training.listed(without_pairs(listed, first.split.filter_pairs))
    return fit(training.features, training.labels, listed, options.training, **how)


def scored(
    part: Documents, ranker: LinearRanker, matcher: ClusterMatcher | None, threads: int
) -> Iterator[tuple[int, csr_matrix, csr_matrix]]:
    """Score the shortlists of a split, some documents at a time.

    Yields:
        Number of the first document, and logits and margins of some, CSR [n, L] with one pattern.
    """
    count = len(part.split)
    if matcher is None:
        assert part.shortlist is not None
        each = part.shortlist.nnz / max(1, count)
    else:
        each = matcher.beam * float(np.bincount(matcher.clusters[-1]).max(initial=1))
    step = max(1, int(_PAIRS / max(1.0, each)))
    ticks = Ticks(log, SHOWN.get(part.split.name, part.split.name), count, "documents")
    for first in range(0, max(1, count), step):
        some = part.features.rows(first, first + step)
        if matcher is None:
            assert part.shortlist is not None
            logits = part.shortlist[first : first + step]
        else:
            logits = matcher.shortlist(some, threads=threads)
        yield first, logits, ranker.score(some, logits, threads=threads)
        ticks.add(step)


def measure(
    options: RankerConfig,
    dataset: Dataset,
    documents: dict[str, Documents],
    reranker: Reranker,
    matcher: ClusterMatcher | None,
) -> tuple[dict[str, Any], Reranker, Found]:
    """Measure plain model, ranker and both on validation and test; write the test predictions.

    Returns:
        The metrics, the reranker with its share (chosen on validation where none is given), and
        its answers by split.
    """
    weight = inverse_propensity(dataset.splits["train"].labels, *dataset.propensity)
    report: dict[str, Any] = {}
    answers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in ("val", "test"):
        if name not in documents:
            continue
        part = documents[name]
        listed: Scored | None = None
        if name == "val" and options.share is None and not options.one_vs_all:
            reranker, listed = chosen(part, reranker, matcher, options.threads)
        report[SHOWN[name]], kept = {}, Kept(part.split.labels)
        found = ranked(options, part, reranker, matcher, listed, kept)
        for what, (_, rows) in found.items():
            report[SHOWN[name]][what] = evaluate(rows, part.split.labels, weight)
        values, rows = answers[name] = found[list(found)[-1]]
        if name == "test":
            result = score_matrix(values, rows, dataset.num_labels)
            write_npz(Path(options.output) / "predictions.npz", result, keep_zeros=True)
            report["shortlists"] = kept.report("the model" if matcher is None else "the clusters")
            report |= split_report(rows, part.split.labels, dataset.splits["train"].labels)
    return report | {"share": reranker.share, "blend": reranker.how}, reranker, answers


def chosen(
    part: Documents, reranker: Reranker, matcher: ClusterMatcher | None, threads: int
) -> tuple[Reranker, Scored]:
    """Choose share and kind of blend on a split.

    Returns:
        The reranker with them, and what of the shortlists can be among the best ten by any.
    """
    pairs, labels = part.split.filter_pairs, part.split.labels
    depth = candidates_needed(max(_CHOSEN_AT, DEPTH), pairs, labels.shape[1])
    some = [
        contenders(logits, margins, depth, threads=threads)
        for _, logits, margins in scored(part, reranker.ranker, matcher, threads)
    ]
    logits, margins = (csr_matrix(vstack(column, "csr")) for column in zip(*some, strict=True))
    best_one, _ = choose_share(reranker, logits, margins, labels, pairs)
    log.info(
        f"best mean of P@1, P@3 and P@5 on validation: --share {best_one.share:g} "
        f"--blend {best_one.how}"
    )
    return best_one, [(0, logits, margins)]


def ranked(
    options: RankerConfig,
    part: Documents,
    reranker: Reranker,
    matcher: ClusterMatcher | None,
    listed: Scored | None = None,
    kept: Kept | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return values and labels [N, k] of the k best labels by each kind of score, the last best.

    `listed` are shortlists that are scored already; `kept` counts what they keep.
    """
    pairs, (count, labels), k = part.split.filter_pairs, part.split.labels.shape, options.top_k
    if options.one_vs_all:
        depth = candidates_needed(k, pairs, labels)
        every = best_of_all(reranker.ranker, part.features, depth, threads=options.threads)
        return {"ranker": best(every, pairs, k)}
    names = ("clusters alone" if matcher is not None else "plain model", "ranker", "both")
    found = {
        name: (np.empty((count, k), np.float32), np.empty((count, k), np.int64)) for name in names
    }
    for first, logits, margins in listed or scored(part, reranker.ranker, matcher, options.threads):
        last = first + logits.shape[0]
        if kept is not None:
            kept.add(first, logits)
        own = pairs[(pairs[:, 0] >= first) & (pairs[:, 0] < last)] - [first, 0]
        for name, matrix in zip(
            names, (logits, margins, reranker.mix(logits, margins)), strict=True
        ):
            values, rows = found[name]
            values[first:last], rows[first:last] = best(matrix, own, k)
    return found
