"""The recipe `linear`: a label tree and a linear classifier per label on it, in one command."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from xmlkernels import InputError
from xmlkernels.data.dataset import Dataset
from xmlkernels.ranker.linear import Settings
from xmlkernels.training.config import Config
from xmlkernels.training.inputs import cached_tree, cached_tree_folder, open_dataset
from xmlkernels.training.owned import refuse_others
from xmlkernels.training.ranker import train_ranker
from xmlkernels.training.ranker_config import RankerConfig

log = logging.getLogger(__name__)

# Chosen on whole source packages held out of debian-deps: what is taken where there is no
# validation split to choose it on.
SHARE = 0.7
_LABELS_PER_CLUSTER = 100
_ONE_LEVEL = 8  # 2^8 clusters are scored one by one; more get levels above them
_STEP = 4


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
    """Folder for the ranker and its figures; files of an earlier ranker are replaced."""
    cache: str = "cache"
    """Where the built-in corpus and label trees are kept, by content: a second run takes its tree
    from there."""

    # ---- label tree ----
    depths: tuple[int, ...] = ()
    """2^depth clusters per level, coarse to fine; by default about 100 labels per cluster. Up to
    200 labels have no tree: each is trained and scored on every document."""
    beam: int = 10
    """Clusters kept per level, whose labels make the shortlist of a document."""

    # ---- features ----
    longest: int = 1
    """Words of the longest phrase in TF-IDF."""
    min_df: int = 2
    """Training texts that a word or phrase must occur in."""
    max_features: int = 0
    """TF-IDF columns, the most frequent ones; 0 takes all."""

    # ---- training ----
    training: Settings = field(default_factory=Settings)
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


def train_linear(options: LinearConfig) -> dict[str, Any]:
    """Build the tree, train the classifiers and measure them; return what metrics.json holds.

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
    refuse_others(options.output)  # before a corpus or a tree is made for it
    dataset = open_dataset(
        Config(
            dataset=options.dataset,
            documents=options.documents,
            cache=options.cache,
            encoder="bow",
        )
    )
    depths = options.depths or tree_depths(dataset.num_labels)
    tree = ""
    if depths:
        cached_tree(
            dataset,
            depths,
            cache=options.cache,
            seed=options.training.seed,
            threads=options.threads,
        )
        tree = str(
            cached_tree_folder(dataset, depths, cache=options.cache, seed=options.training.seed)
        )
    else:
        log.info(f"{dataset.num_labels:,} labels: no tree, each is trained on every document")
    return train_ranker(_ranker(options, dataset, tree))


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
        training=options.training,
        threads=options.threads,
        share=share,
        blend=blend,
        top_k=options.top_k,
    )


def tree_depths(labels: int) -> tuple[int, ...]:
    """Depths of a tree with about 100 labels in a finest cluster, one level up to 2^8 clusters.

    11,862 labels give (7,), 670,000 (5, 9, 13); up to 200 give none.
    """
    if labels <= 2 * _LABELS_PER_CLUSTER:
        return ()
    finest = max(1, round(math.log2(labels / _LABELS_PER_CLUSTER)))
    if finest <= _ONE_LEVEL:
        return (finest,)
    levels = min(1 + math.ceil((finest - _ONE_LEVEL) / _STEP), 4)
    return tuple(finest - _STEP * above for above in reversed(range(levels)))
