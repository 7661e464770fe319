"""Sizes of a run's data: those of an opened dataset, or those that somebody names."""

import logging
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from xmlkernels.data.dataset import Dataset
from xmlkernels.data.tokens import load_tokenizer
from xmlkernels.training.config import Config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """Sizes of the data.

    Attributes:
        labels: L.
        documents, validation, test: of the splits; 0 where there is none.
        virtual: label texts that are trained on as documents.
        longest: tokens of the longest document; 0 for a bag of words.
        class_token: where the class token of a document is: "first" or "last".
    """

    labels: int
    documents: int
    validation: int
    test: int
    virtual: int
    longest: int
    class_token: str = "first"

    @property
    def trained_on(self) -> int:
        """Documents of an epoch."""
        return self.documents + self.virtual


class TreeShape(Protocol):
    """Sizes of a label tree, as `LabelTree` has them."""

    @property
    def levels(self) -> int:
        """Levels, the labels' among them."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Nodes of each level, coarse to fine, labels last."""

    def widest(self, level: int) -> int:
        """Count the children of the level's largest node."""

    def bounds(self, level: int) -> np.ndarray:
        """Give the first label row under each node of a level, and the end: int64 [n_r + 1]."""


@dataclass(frozen=True)
class BalancedTree:
    """The sizes of a tree whose nodes are halved evenly, as `xmlkernels tree` halves them.

    Attributes:
        sizes: nodes of each level, coarse to fine, labels last.
    """

    sizes: tuple[int, ...]

    @property
    def levels(self) -> int:
        """Levels, the labels' among them."""
        return len(self.sizes)

    def widest(self, level: int) -> int:
        """Count the children of a level's largest node."""
        return -(-self.sizes[level + 1] // self.sizes[level])

    def bounds(self, level: int) -> np.ndarray:
        """Give the first label row under each node of a level, and the end: int64 [n_r + 1]."""
        nodes = self.sizes[level]
        return np.arange(nodes + 1, dtype=np.int64) * self.sizes[-1] // nodes


def facts_of(config: Config, dataset: Dataset) -> Facts:
    """Read the sizes of an opened dataset."""
    count = {name: len(split) for name, split in dataset.splits.items()}
    return Facts(
        labels=dataset.num_labels,
        documents=count.get("train", 0),
        validation=count.get("val", 0),
        test=count.get("test", 0),
        virtual=dataset.num_labels if config.label_text else 0,
        longest=_longest(config, dataset),
        class_token=_class_token(config, dataset),
    )


def _class_token(config: Config, dataset: Dataset) -> str:
    if config.encoder == "bow" or config.pooling != "cls":
        return "first"
    position = load_tokenizer(dataset.tokenizer_folder).class_position
    if position is None:
        log.info(
            "note: this tokenizer sets no class token; --pooling cls reads the first token of a "
            "document"
        )
    return position or "first"


def _longest(config: Config, dataset: Dataset) -> int:
    if config.encoder == "bow":
        return 0
    stores = [split.tokens for split in dataset.splits.values()]
    if config.label_text and dataset.label_tokens is not None:
        stores.append(dataset.label_tokens)
    return max(int(store.lengths.max(initial=0)) for store in stores)
