"""Build the label tree of a dataset: features of the labels, their graph, balanced 2-means."""

import hashlib
import json
import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from xmlkernels import InputError
from xmlkernels.data.dataset import Dataset
from xmlkernels.files import replacing
from xmlkernels.locks import Tell, check_place, is_ours, own_folder
from xmlkernels.parallel import most_threads, use_threads
from xmlkernels.training.label_vectors import (
    Found,
    LabelEncoder,
    SharedFeatures,
    digest,
    label_vectors,
    read_features,
)
from xmlkernels.tree.cluster import Means, cluster
from xmlkernels.tree.features import (
    TextFeatures,
    TokenFeatures,
    fill_empty,
    label_centroids,
    label_features,
)
from xmlkernels.tree.graph import label_graph, prune, smooth
from xmlkernels.tree.label_tree import FILE, MOST_LEVELS, LabelTree
from xmlkernels.tree.report import lines_of, plot, report

log = logging.getLogger(__name__)

# Bump when the same inputs and settings would give another tree.
RECIPE_VERSION = 1
WRITTEN = (FILE, "report.json", "tree.png")
# Settings that decide where a tree is put or how fast it is made, not what it is.
ASIDE = (
    "dataset",
    "output",
    "depths",
    "clusters",
    "features",
    "label_text",
    "label_vectors",
    "threads",
    "plot",
    "overwrite",
)


@dataclass(frozen=True)
class TreeConfig:
    """Settings of a label tree: the labels' features, their graph, the clusters."""

    dataset: str
    """Dataset folder made by xmlkernels prepare."""
    output: str = ""
    """Folder to make; by default DATASET.tree."""
    depths: tuple[int, ...] = (10, 13, 16)
    """2^depth clusters at each level, coarse to fine."""
    clusters: tuple[int, ...] = ()
    """Clusters of each level instead, any numbers that do not fall."""
    # ---- words of the labels ----
    features: str = "auto"
    """text: TF-IDF of the texts kept in the dataset; tokens: of its token ids; bags: its bags of
    words; auto: the bags where it has them, else the texts where they are kept, else the tokens;
    none: label texts alone; or an .npz with a CSR [training documents, terms]."""
    ngrams: int = 1
    """text: longest run of words that is a term."""
    terms: int = 500_000
    """text: only these many terms, the most frequent ones."""
    common: float = 1.0
    """text: terms in a larger share of the documents are left out."""
    keep: int = 1000
    """Terms kept of each label."""
    # ---- graph of labels ----
    graph: bool = True
    """Mix each label's features with those of the labels it occurs with."""
    visits: int = 400
    """Visits of the random walk of each label."""
    restart: float = 0.8
    """Probability that the next visit starts again from the label."""
    top: int = 10
    """Neighbours kept of each label."""
    most_documents: int = 0
    """Labels of more documents stay out of the graph; 0: none."""
    prune: float = -1.0
    """Edges between labels whose label vectors have a smaller cosine go; needs label-text or
    label-vectors.
    """
    # ---- texts of the labels ----
    label_text: str = ""
    """Encoder (hub name, folder or "minilm") whose embeddings of the label texts are used with
    the centroids.
    """
    label_vectors: str = ""
    """Such embeddings made elsewhere: an .npy of floats [labels, width]."""
    # ---- clusters, output ----
    starts: int = 8
    """First centres tried for each node."""
    tolerance: float = 1e-4
    """2-means stops when a label's mean similarity to its centre rises by less."""
    seed: int = 0
    """Decides walks and first centres."""
    threads: int = 0
    """0: all. They do not change the tree."""
    plot: bool = True
    """Write tree.png."""
    overwrite: bool = False
    """Replace a tree made from other inputs or settings."""

    @property
    def folder(self) -> Path:
        """The output, DATASET.tree where none is given."""
        return Path(self.output) if self.output else Path(self.dataset.rstrip("/") + ".tree")

    @property
    def counts(self) -> list[int]:
        """Clusters of each level."""
        return list(self.clusters) or [2**depth for depth in self.depths]


def build_tree(
    options: TreeConfig,
    *,
    flag: str = "--output",
    wait: Tell | None = None,
    shared: SharedFeatures | None = None,
) -> LabelTree:
    """Make a label tree, or open the one made before from the same inputs and settings.

    Args:
        options: inputs, settings and output.
        flag: what names the output, for messages.
        wait: called with a sentence before waiting for another process that makes a tree there;
            None refuses instead.
        shared: keeps the features for the next tree; None keeps nothing.

    Raises:
        InputError: a setting or file that cannot be used, something else at the output, or an
            output that is in use.
    """
    check(options)
    check_place(options.folder, flag)
    dataset = Dataset.open(options.dataset)
    options = replace(options, features=_feature_source(options, dataset))
    encoder = LabelEncoder(options.label_text) if options.label_text else None
    settings = settings_of(options, dataset, encoder)
    standing = _standing(options, settings["key"], flag)
    if standing is None:
        with own_folder(options.folder, flag, writes=WRITTEN, wait=wait):
            # Another process may have made it meanwhile.
            standing = _standing(options, settings["key"], flag)
            if standing is None:
                return _make(options, dataset, encoder, settings, shared)
    log.info(f"{options.folder}: made from the same inputs before, used again")
    return standing


def _make(
    options: TreeConfig,
    dataset: Dataset,
    encoder: LabelEncoder | None,
    settings: dict[str, Any],
    shared: SharedFeatures | None,
) -> LabelTree:
    _set_threads(options.threads)
    clock = _Clock()

    def found() -> Found:
        vectors = label_vectors(dataset, encoder, options.label_vectors)
        return _features(options, dataset, vectors, clock)

    if shared is None or options.graph:  # walks depend on the seed, and the features on them
        shared = SharedFeatures()
    features, documents, labels = shared.of(settings, found)
    if bare := int(features.empty.sum()):
        log.info(
            f"{bare:,} of {len(features):,} labels have no features; they get clusters of their own"
        )
    if options.counts[-1] >= len(features):
        log.info(
            f"note: {options.counts[-1]:,} clusters for {len(features):,} labels: such a level has "
            "one label in each"
        )
    means = Means(starts=options.starts, tolerance=options.tolerance, seed=options.seed)
    tree = LabelTree.from_partitions(
        cluster(features, options.counts, means, tell=log.info), settings
    )
    clock.told("clusters")
    facts = report(tree, features, documents, labels, options.seed)
    clock.told("report")
    _write(options, tree, facts | {"seconds": clock.seconds})
    log.info("\n".join(lines_of(facts)))
    log.info(
        f"{options.folder}/: {' → '.join(f'{n:,}' for n in tree.sizes)}, content "
        f"{tree.content_hash[:16]}"
    )
    return tree


def check(options: TreeConfig) -> None:
    """Refuse settings that cannot be, before any file is read.

    Raises:
        InputError: the first of them.
    """
    vectors = bool(options.label_text) + bool(options.label_vectors)
    counts = options.counts if all(depth < 63 for depth in options.depths) else []
    rules = [
        (
            all(0 <= depth < 63 for depth in options.depths),
            "--depths",
            "exponents from 0 to 62",
            options.depths,
        ),
        (
            1 <= len(counts) < MOST_LEVELS,
            "--depths",
            f"1 to {MOST_LEVELS - 1} levels",
            options.depths,
        ),
        (
            counts == sorted(counts) and min(counts, default=1) >= 1,
            "--depths",
            "levels from coarse to fine",
            counts,
        ),
        (vectors < 2, "--label-vectors", "one of label-text and label-vectors", "both"),
        (
            vectors or options.features != "none",
            "--features none",
            "label-text or label-vectors",
            "neither",
        ),
        (vectors or options.prune <= -1, "--prune", "label-text or label-vectors", "neither"),
        (options.keep >= 1, "--keep", "1 or more", options.keep),
    ]
    for good, where, expected, got in rules:
        if not good:
            raise InputError(where, expected, str(got), "mend the setting")


def settings_of(
    options: TreeConfig, dataset: Dataset, encoder: LabelEncoder | None
) -> dict[str, Any]:
    """All that decides the tree, files by their content; `key` is its hash."""
    settings = {name: value for name, value in asdict(options).items() if name not in ASIDE}
    settings |= {
        "dataset": dataset.content_hash,
        "clusters": options.counts,
        "recipe_version": RECIPE_VERSION,
    }
    named = options.features in ("text", "tokens", "bags", "none")
    settings["features"] = options.features if named else digest(options.features)
    settings["label_text"] = encoder.hash if encoder else None
    settings["label_vectors"] = digest(options.label_vectors) if options.label_vectors else None
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return settings | {"key": key}


def _standing(options: TreeConfig, key: str, flag: str) -> LabelTree | None:
    folder = options.folder
    if not folder.exists() or (
        folder.is_dir() and not any(p for p in folder.iterdir() if not is_ours(p.name, WRITTEN))
    ):
        return None
    if not (folder / FILE).is_file():
        # Never written over, whatever the flags: these are somebody's files.
        got = "other files" if folder.is_dir() else "a file"
        raise InputError(
            str(folder), "a free place or the folder of a label tree", got, f"choose another {flag}"
        )
    try:
        tree = LabelTree.load(folder)
    except InputError as error:
        if options.overwrite:
            return None
        raise InputError(
            error.where, error.expected, error.got, "make it again with --overwrite"
        ) from error
    if tree.settings.get("key") == key:
        return tree
    if not options.overwrite:
        expected = "a tree made from these inputs and settings"
        mend = f"choose another {flag}, or replace it with --overwrite"
        raise InputError(str(folder), expected, "one made from others", mend)
    return None


def _feature_source(options: TreeConfig, dataset: Dataset) -> str:
    if options.features == "auto":
        if dataset.vocabulary is not None:
            return "bags"
        return "text" if (dataset.splits["train"].folder / "texts.jsonl").is_file() else "tokens"
    return options.features


def _set_threads(threads: int) -> None:
    most = most_threads()
    if not 0 <= threads <= most:
        raise InputError(
            "--threads",
            f"0 (all) to {most}",
            str(threads),
            "choose fewer, or set NUMBA_NUM_THREADS",
        )
    use_threads(threads)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def told(self, part: str) -> None:
        now = time.monotonic()
        self.seconds[part] = round(now - self._last, 2)
        self._last = now
        log.info(f"{part}: {self.seconds[part]:.1f} s")


def _features(
    options: TreeConfig, dataset: Dataset, vectors: np.ndarray | None, clock: _Clock
) -> Found:
    """Compute label features, and for the report features and labels of documents.

    Those are the validation split's, or the training split's where there is none.
    """
    train, checked = dataset.splits["train"], dataset.splits.get("val", dataset.splits["train"])
    if options.features == "none":
        return label_features(None, vectors), None, None
    texts = None
    if options.features == "text":
        words = TextFeatures(
            train.texts, ngrams=options.ngrams, most_terms=options.terms, common=options.common
        )
        found = words.documents
        documents = words.documents if checked is train else words.transform(checked.texts)
        texts = None if dataset.label_names is None else words.transform(dataset.label_names)
    elif options.features == "tokens":
        tokens = TokenFeatures(train.tokens)
        found = tokens.documents
        documents = tokens.documents if checked is train else tokens.transform(checked.tokens)
        texts = None if dataset.label_tokens is None else tokens.transform(dataset.label_tokens)
    elif options.features == "bags":
        found, documents, texts = train.features, checked.features, dataset.label_features
    else:
        checked = train
        found = documents = read_features(options.features, len(train))
    centroids = label_centroids(found, train.labels, options.keep)
    if texts is not None:
        centroids = fill_empty(centroids, texts, options.keep)
    clock.told("features")
    if options.graph:
        graph = label_graph(
            train.labels,
            visits=options.visits,
            restart=options.restart,
            top=options.top,
            most_documents=options.most_documents,
            seed=options.seed,
        )
        if options.prune > -1 and vectors is not None:
            graph = prune(graph, vectors, options.prune)
        clock.told("graph")
        centroids = smooth(graph, centroids, options.keep)
        clock.told("smoothing")
    return label_features(centroids, vectors, in_place=True), documents, checked.labels


def _write(options: TreeConfig, tree: LabelTree, facts: dict[str, Any]) -> None:
    """Write the report, then the tree: a folder that holds it is finished."""
    with replacing(options.folder / "report.json") as file:
        file.write((json.dumps(facts, indent=1) + "\n").encode())
    if options.plot and not plot(facts, options.folder / "tree.png"):
        log.info("note: no tree.png, matplotlib is not installed")
    tree.save(options.folder)
