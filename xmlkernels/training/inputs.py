"""From a configuration to data: the dataset, how its documents are read, the label tree."""

import logging
from dataclasses import replace
from pathlib import Path

from xmlkernels import InputError, dist
from xmlkernels.data.batches.bags import BagBatches
from xmlkernels.data.batches.tokens import Batches
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.inputs import BowInputs, Inputs, TokenInputs
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.tokens import load_tokenizer
from xmlkernels.data.vectorizer import Vectorizer
from xmlkernels.installed import source_of
from xmlkernels.parallel import most_threads
from xmlkernels.predict.folders import dataset_folder
from xmlkernels.training.checks import check_levels
from xmlkernels.training.config import Config, began_with
from xmlkernels.training.folder import read_json
from xmlkernels.training.label_vectors import SharedFeatures
from xmlkernels.training.tree import TreeConfig, build_tree
from xmlkernels.tree.label_tree import LabelTree, arrangement

log = logging.getLogger(__name__)

GRAPH_TOKENS = 32
"""What widths of batches are multiples of where each width has a CUDA graph of its own."""

_opened: set[Path] = set()  # built-in corpora that this process has made or opened, and logged


def open_dataset(config: Config) -> Dataset:
    """Open the dataset that the configuration names, or the built-in corpus, made on first use."""
    if config.dataset != "docstrings":
        return Dataset.open(config.dataset)
    tokenizer = source_of(config.encoder)
    part = f"{config.documents}-documents" if config.documents else "all"
    folder = Path(config.cache) / f"docstrings-{part}-{config.max_length}-{Path(tokenizer).name}"
    # A folder of this name made from other package versions or another tokenizer is only a cache:
    # replace it.
    settings = PrepareConfig(
        output=folder,
        tokenizer=tokenizer,
        max_length=config.max_length,
        source="docstrings",
        name="docstrings",
        documents=config.documents or None,
        keep_texts=True,
        overwrite=True,
    )
    if not folder.exists():
        log.info(
            f"{folder}: the built-in corpus, made on first use from the Python packages installed "
            "here (about a minute)"
        )
    # That a folder is used again is logged once, and not of one made a moment ago.
    tell = (lambda line: None) if folder.resolve() in _opened else log.info
    dataset = prepare(settings, tell, flag="--cache", wait=True)
    _opened.add(folder.resolve())
    return dataset


def dataset_of_run(folder: Path) -> Dataset:
    """Open the dataset of a finished run: where its metrics say it is, or else by its settings.

    Raises:
        InputError: there is none.
    """
    if (place := dataset_folder(folder)) is not None:
        return Dataset.open(place)
    settings = read_json(folder / "config.json")
    return open_dataset(replace(Config(), **began_with(settings)))


def open_inputs(config: Config, dataset: Dataset) -> Inputs:
    """Choose how this run reads documents.

    Raises:
        InputError: no training documents, or no label texts where the configuration asks for them.
    """
    train = dataset.splits.get("train")
    if train is None or not len(train):
        raise InputError(
            f"dataset {dataset.folder}",
            "training documents",
            "none",
            "prepare it from a file that holds some",
        )
    bow = config.encoder == "bow"
    own: object = dataset.label_names if bow else dataset.label_tokens
    if dataset.vocabulary:
        own = dataset.label_features
    if config.label_text and own is None:
        got = f"{dataset.folder} without"
        raise InputError(
            "--label-text", "a dataset with label texts", got, "prepare it with --label-text"
        )
    if bow and dataset.vocabulary:
        if (config.ngrams, config.min_df, config.max_features) != (
            Config.ngrams,
            Config.min_df,
            Config.max_features,
        ):
            log.info(
                "note: the dataset holds bags of words: --ngrams, --min-df and --max-features do "
                "nothing"
            )
        return BowInputs(dataset, None)
    if bow:
        most = config.max_features or None
        found = BowInputs.fitted(
            dataset, Vectorizer(longest=config.ngrams, min_df=config.min_df, max_features=most)
        )
        log.info(
            f"vocabulary: {found.vocabulary:,} terms of 1 to {config.ngrams} words, each in "
            f"{config.min_df} documents or more"
        )
        return found
    return TokenInputs(dataset, load_tokenizer(dataset.tokenizer_folder), dataset.max_length)


def open_tree(config: Config, dataset: Dataset) -> LabelTree | None:
    """Open the label tree that a cascade names, or build and cache one on first use.

    Returns:
        The tree; None for a model that needs none.

    Raises:
        InputError: no tree there, damaged, of another dataset, or of another depth than the
            configuration's lists.
    """
    if config.model != "cascade":
        return None
    if config.tree:
        tree = LabelTree.load(config.tree)
        tree.check_dataset(dataset.content_hash, dataset.num_labels)
        check_levels(config, tree.levels, f"as the tree {config.tree} has them")
        return tree
    return cached_tree(
        dataset,
        config.tree_depths,
        cache=config.cache,
        seed=config.seed,
        threads=config.threads,
    )


def cached_tree(
    dataset: Dataset,
    depths: tuple[int, ...],
    *,
    cache: str,
    seed: int,
    threads: int,
    graph: bool = True,
    shared: SharedFeatures | None = None,
) -> LabelTree:
    """Return the tree of these depths that `xmlkernels tree` makes, from the cache after first use.

    Args:
        dataset: whose labels it is of.
        depths: 2^depth clusters per level, coarse to fine.
        cache: the folder that keeps it, as trees/CONTENT-DEPTHS-SEED.
        seed: of its walks and first centres.
        threads: 0 takes all; they do not change the tree.
        graph: as the option of that name.
        shared: as `build_tree` takes it.
    """
    folder = cached_tree_folder(dataset, depths, cache=cache, seed=seed, graph=graph)
    if not folder.exists():
        clusters = ", ".join(f"{2**depth:,}" for depth in depths)
        log.info(f"label tree of {clusters} clusters, made on first use as xmlkernels tree does:")
    # A tree of this name made by another version is only a cache: replace it.
    return build_tree(
        TreeConfig(
            str(dataset.folder),
            str(folder),
            depths=depths,
            graph=graph,
            seed=seed,
            threads=min(threads, most_threads()),  # torch may have been given more than there are
            plot=False,
            overwrite=True,
        ),
        flag="--cache",
        wait=log.info,
        shared=shared,
    )


def cached_tree_folder(
    dataset: Dataset, depths: tuple[int, ...], *, cache: str, seed: int, graph: bool = True
) -> Path:
    """Return where `cached_tree` keeps that tree."""
    name = f"{dataset.content_hash[:16]}-{'-'.join(map(str, depths))}-{seed}"
    name += "" if graph else "-words"
    return Path(cache) / "trees" / name


def training_batches(
    config: Config, dataset: Dataset, inputs: Inputs, tree: LabelTree | None, *, graphs: bool
) -> Batches | BagBatches:
    """Cut the training split into batches of one update each.

    The labels' own texts are added where the configuration asks for them. Of several processes
    each reads its part of every batch.

    Args:
        config: the settings, checked.
        dataset, inputs: what is read, and how.
        tree: of a cascade; None end to end.
        graphs: whether each width of a batch has a CUDA graph of its own.
    """
    documents, more = config.batch * config.accumulate, arrangement(tree)
    batches = inputs.batches(
        dataset.splits["train"], documents, seed=config.seed, label_text=config.label_text, **more
    )
    if isinstance(batches, Batches) and graphs:
        batches.pad_to_multiple = GRAPH_TOKENS
    return batches.shared(dist.part) if dist.size() > 1 else batches
