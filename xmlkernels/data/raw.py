"""What the readers of all layouts return: documents, labels, filter pairs, facts of labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.data.formats.matrices import drop_unlabelled, select_pairs
from xmlkernels.errors import InputError


@dataclass(frozen=True)
class Files:
    """The raw files of one split."""

    text: Path | None = None
    labels: Path | None = None
    filter: Path | None = None


@dataclass
class RawSplit:
    """N documents: texts, labels [N, L], filter pairs [n, 2].

    `features` [N, V] are the bags of words of a set without texts. `maps` are upstream's padded ids
    and masks [M, T] to take instead of texts: their rows `map_rows` [N], or all.
    """

    texts: list[str] | None
    labels: csr_matrix
    filter_pairs: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    maps: tuple[np.ndarray, np.ndarray] | None = None
    map_rows: np.ndarray | None = None
    features: csr_matrix | None = None

    def take(self, rows: np.ndarray) -> RawSplit:
        """Return the split of the given rows (ascending), its filter pairs renumbered."""
        texts = None if self.texts is None else [self.texts[row] for row in rows]
        map_rows = rows if self.map_rows is None else self.map_rows[rows]
        features = None if self.features is None else self.features[rows]
        return RawSplit(
            texts,
            self.labels[rows],
            select_pairs(self.filter_pairs, rows),
            self.maps,
            map_rows,
            features,
        )


@dataclass
class Raw:
    """Everything read: the splits, and of the L labels their names and texts where there are any.

    `label_ids` are what the documents call the labels, where another file gave the names.

    `declared` is whether anything but the largest id says how many labels there are.
    `separator` joins the title and the body of the texts; `facts` go into the manifest.
    """

    splits: dict[str, RawSplit]
    label_names: list[str] | None = None
    label_texts: list[str] | None = None
    label_ids: list[str] | None = None
    label_maps: tuple[np.ndarray, np.ndarray] | None = None
    label_features: csr_matrix | None = None
    declared: bool = False
    separator: str = " "
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def num_labels(self) -> int:
        """L."""
        return int(self.splits["train"].labels.shape[1])

    @property
    def vocabulary(self) -> int | None:
        """V of bags of words; None for texts."""
        features = self.splits["train"].features
        return None if features is None else int(features.shape[1])


def choose_rows(raw: Raw, *, drop: tuple[str, ...], validation_share: float, seed: int) -> None:
    """Drop unlabelled documents of the splits in `drop`, then draw the validation split.

    It is drawn from the training rows.

    The draw is a pure function of (seed, number of training rows left). Both parts keep the order
    of the file.

    Raises:
        InputError: a split without any label, or a share that leaves one side empty.
    """
    for name, split in raw.splits.items():
        table = "columns" in raw.facts  # its reader has told the line, which no split has
        where = f"the {name} split"
        rows = drop_unlabelled(split.labels, keep=name not in drop, name=where, told=not table)
        if len(rows) < split.labels.shape[0]:
            raw.splits[name] = split.take(rows)
    if not validation_share:
        return
    train = raw.splits["train"]
    count = train.labels.shape[0]
    held_out = max(1, round(validation_share * count))
    if held_out >= count:
        raise InputError(
            "--validation-share",
            f"a share that leaves some of {count} documents for training",
            str(validation_share),
            "choose a smaller one",
        )
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(count)
    val, test = train.take(np.sort(order[:held_out])), raw.splits.pop("test", None)
    raw.splits |= {"train": train.take(np.sort(order[held_out:])), "val": val} | (
        {"test": test} if test else {}
    )
