"""What a recipe leaves to the dataset: whether label texts are used, and the shape of a cascade."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xmlkernels.data.manifest import LABEL_FEATURES, read_manifest
from xmlkernels.options import check_values
from xmlkernels.training.config import Config
from xmlkernels.tree.label_tree import LabelTree

log = logging.getLogger(__name__)

BUILT_IN = "docstrings"
LABEL_TEXT, SHAPE = "label_text", ("tree_depths", "topk", "rw_loss", "embed_drops")
_LABELS_PER_CLUSTER = 8  # of the finest level, and clusters of one level in one of the level above
_DEEPEST = 16
_FIRST_TOPK = 128


def fitted(config: Config, given: Collection[str], decided: Collection[str]) -> Config:
    """Return the settings with what the dataset decides; the log says what that is.

    Label texts are used where there are any, and a recipe that wants them does without where there
    are none. A cascade gets a tree that fits the number of labels.

    Args:
        config: the settings of a recipe, changed.
        given: fields that somebody chose; they stay as they are.
        decided: fields that the recipe leaves to the dataset.

    Raises:
        InputError: a setting is out of range, or the dataset, or a tree that is named, cannot be
            read.
    """
    check_values(config)  # a shape is computed from them
    # The recipes' own values are those of the built-in corpus.
    if config.dataset == BUILT_IN or not (decided or Path(config.dataset).is_dir()):
        return config
    manifest = read_manifest(config.dataset)
    if LABEL_TEXT not in given:
        config = _with_label_text(config, manifest, LABEL_TEXT in decided)
    if config.model == "cascade" and set(SHAPE) & set(decided):
        config = _with_shape(config, manifest["num_labels"], given)
    return config


def _with_label_text(config: Config, manifest: Mapping[str, Any], decided: bool) -> Config:
    own = bool({"label_tokens.bin", LABEL_FEATURES} & set(manifest["files"]))
    if decided:
        told = "has no label texts: trained on documents alone"
        if own:
            told = "has label texts: each is a training document of its own label "
            told += "(--no-label-text: not)"
        elif config.encoder == "bow" and "label_names.txt" in manifest["files"]:
            told = "has names of its labels: --label-text trains on each as on a document"
        log.info(f"{config.dataset} {told}")
        return replace(config, label_text=own)
    # A bag of words of kept texts takes names for texts where it is told to.
    possible = own or (config.encoder == "bow" and "label_names.txt" in manifest["files"])
    if config.label_text and not possible:
        log.info(f"note: {config.dataset} has no label texts: trained on documents alone")
        return replace(config, label_text=False)
    return config


def _with_shape(config: Config, labels: int, given: Collection[str]) -> Config:
    if config.tree:
        sizes: Sequence[int] = LabelTree.load(config.tree).sizes
    else:
        depths = config.tree_depths if "tree_depths" in given else tree_depths(labels)
        config = replace(config, tree_depths=depths)
        sizes = (*(2**depth for depth in depths), labels)
    if "topk" not in given:
        config = replace(config, topk=shortlists(sizes))
    if "rw_loss" not in given and len(config.topk) == len(sizes) - 1:
        config = replace(config, rw_loss=level_weights(sizes, config.topk))
    if "embed_drops" not in given and len(config.embed_drops) != len(sizes):
        config = replace(config, embed_drops=())  # those of CascadeXML for so many levels
    flags = {"--topk": config.topk, "--rw-loss": config.rw_loss}
    if not config.tree:
        flags = {"--tree-depths": config.tree_depths} | flags
    told = " ".join(
        f"{flag} {' '.join(f'{n:g}' for n in values)}" for flag, values in flags.items()
    )
    log.info(f"a cascade for {labels:,} labels: {told}")
    return config


def tree_depths(labels: int) -> tuple[int, ...]:
    """Depths of a label tree with about 8 labels in a finest cluster, 8 clusters in a coarser one.

    Two levels of clusters up to 2^13 clusters, three beyond, and never more than 2^16 clusters;
    fewer labels give fewer levels: 670,000 give (10, 13, 16), 4,271 (6, 9), 100 (4,), 10 (0,).
    """
    finest = min(max(round(math.log2(max(labels, 1) / _LABELS_PER_CLUSTER)), 0), _DEEPEST)
    step = round(math.log2(_LABELS_PER_CLUSTER))
    levels = 3 if finest > 13 else 2
    depths = tuple(finest - step * above for above in reversed(range(levels)))
    return tuple(depth for depth in depths if depth > 1) or (finest,)


def shortlists(sizes: Sequence[int]) -> tuple[int, ...]:
    """Clusters to keep of each level: 4·√clusters, at most 128, 256, 512, … and what there are.

    Args:
        sizes: clusters of each level, coarse to fine, then labels.
    """
    kept: list[int] = []
    for level, clusters in enumerate(sizes[:-1]):
        there = clusters if level == 0 else kept[-1] * max(clusters // sizes[level - 1], 1)
        wanted = min(round(4 * math.sqrt(clusters)), _FIRST_TOPK * 2**level)
        kept.append(max(1, min(wanted, there, clusters)))
    return tuple(kept)


def level_weights(sizes: Sequence[int], topk: Sequence[int]) -> tuple[float, ...]:
    """Weights of the levels' losses in proportion to their candidates, the coarsest level's 1.

    A level's loss is a mean over its candidates; so weighted, every candidate of every level counts
    the same.
    """
    candidates = [float(sizes[0])]
    for level, kept in enumerate(topk):
        candidates.append(max(1.0, min(kept, sizes[level]) * sizes[level + 1] / sizes[level]))
    return tuple(float(f"{count / candidates[0]:.2g}") for count in candidates)
