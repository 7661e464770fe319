"""The label tree: clusters of clusters of labels, and the order of the label table.

The order makes the labels of a cluster neighbours.

One safetensors file: `order` and `children.0` … `children.R-2` (int64), and a JSON text of the
settings in its header.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from xmlkernels.checksums import ALGORITHM, check_seal, seal
from xmlkernels.data.formats.arrays import read_tensors
from xmlkernels.errors import InputError
from xmlkernels.files import replacing
from xmlkernels.records import parse_record

FORMAT, VERSION = "xmlkernels label tree", "1"
FILE = "tree.safetensors"
MOST_LEVELS = 5
MAKE_AGAIN = "make the tree again with xmlkernels tree"


@dataclass(frozen=True, eq=False)
class LabelTree:
    """R levels, coarse to fine; the last one is the label table. n_r nodes at level r, n_{R-1} = L.

    Nodes of every level are in tree order: the children of a node are neighbours, and so are the
    labels of a cluster.

    Args:
        children: R − 1 int64 arrays [n_r + 1]; node c of level r owns the nodes
            children[r][c]:children[r][c + 1] of level r + 1, at least one.
        order: int64 [L], the label id of each table row; a permutation.
        settings: JSON values: what the tree was made from. `dataset` is the content hash of the
            dataset.

    Raises:
        InputError: no such tree: a gap, a label in two clusters or in none, a cluster without
            children, R not 2 to 5.
    """

    children: tuple[np.ndarray, ...]
    order: np.ndarray
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(
            self,
            "children",
            tuple(_frozen(f"children[{r}]", c) for r, c in enumerate(self.children)),
        )
        object.__setattr__(self, "order", _frozen("order", self.order))
        _check_children(self.children, len(self.order))
        _check_order(self.order)

    @classmethod
    def from_partitions(
        cls, partitions: Sequence[np.ndarray], settings: Mapping[str, Any] | None = None
    ) -> LabelTree:
        """Build a tree of nested partitions, coarse to fine.

        Clusters may have any size and any number of children.

        Args:
            partitions: R − 1 integer arrays [L], the cluster of each label. Cluster numbers need
                not be dense; siblings are in the order of their numbers, labels of a cluster in
                the order of their ids.

        Raises:
            InputError: lengths differ, or a cluster lies in two clusters of the level above.
        """
        parts = [np.asarray(part) for part in partitions]
        if not 1 <= len(parts) < MOST_LEVELS:
            raise InputError(
                "partitions",
                f"1 to {MOST_LEVELS - 1}, one for each level",
                str(len(parts)),
                "choose other levels",
            )
        labels = len(parts[0])
        for r, part in enumerate(parts):
            if part.shape != (labels,) or not np.issubdtype(part.dtype, np.integer):
                got = f"{part.dtype} {list(part.shape)}"
                raise InputError(
                    f"partition {r}",
                    f"an integer for each of {labels} labels",
                    got,
                    "pass partitions of one label set",
                )
        order = np.lexsort((np.arange(labels), *reversed(parts)))
        # Level r begins a node wherever its cluster or any coarser one changes.
        begins = np.zeros(labels, bool)
        begins[:1] = True
        starts = []
        for r, part in enumerate(parts):
            begins[1:] |= np.diff(part[order]) != 0
            starts.append(np.append(np.flatnonzero(begins), labels))
            if r and len(starts[r]) - 1 != len(np.unique(part)):
                wrong = _in_two_clusters(part, parts[r - 1])
                mend = "pass partitions that refine one another"
                raise InputError(
                    f"partition {r}",
                    "clusters inside one cluster of the level above",
                    f"cluster {wrong} in two",
                    mend,
                )
        rows = np.arange(labels + 1)
        children = [
            np.searchsorted(finer, coarser)
            for coarser, finer in zip(starts, [*starts[1:], rows], strict=True)
        ]
        return cls(tuple(children), order, dict(settings or {}))

    @property
    def levels(self) -> int:
        """R, the label level included."""
        return len(self.children) + 1

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Nodes of each level: (n_0, …, n_{R-2}, L)."""
        return (*(len(c) - 1 for c in self.children), len(self.order))

    @cached_property
    def place(self) -> np.ndarray:
        """int64 [L], the table row of each label id."""
        place = np.empty_like(self.order)
        place[self.order] = np.arange(len(self.order))
        place.setflags(write=False)
        return place

    def widest(self, level: int) -> int:
        """Most children of a node of `level` (0 ≤ level < R − 1)."""
        self._check_level(level, self.levels - 1)
        return int(np.diff(self.children[level]).max())

    def ancestors(self, level: int) -> np.ndarray:
        """Return the node of `level` that each table row belongs to, ascending; int64 [L].

        Level R − 1 gives the rows themselves.
        """
        rows = self.bounds(level)
        return np.repeat(np.arange(len(rows) - 1), np.diff(rows))

    def bounds(self, level: int) -> np.ndarray:
        """int64 [n_r + 1]: node c of `level` owns the table rows bounds[c]:bounds[c + 1]."""
        self._check_level(level, self.levels)
        rows = np.arange(self.sizes[level] + 1)
        for finer in self.children[level:]:
            rows = finer[rows]
        return rows

    def _check_level(self, level: int, below: int) -> None:
        if not 0 <= level < below:
            raise InputError(
                "level",
                f"0 to {below - 1}",
                str(level),
                f"this tree has {self.levels} levels, the labels included",
            )

    @cached_property
    def content_hash(self) -> str:
        """Return the sha256 of children and order.

        Equal for all trees that give the same table and the same clusters.
        """
        digest = hashlib.sha256()
        for array in (*self.children, self.order):
            digest.update(np.int64(len(array)).tobytes() + array.astype("<i8").tobytes())
        return digest.hexdigest()

    def check_dataset(self, content_hash: str, num_labels: int) -> None:
        """Raise InputError where the tree has other labels, or was made from another dataset."""
        if len(self.order) != num_labels:
            raise InputError(
                "label tree",
                f"{num_labels} labels, as the dataset has",
                str(len(self.order)),
                MAKE_AGAIN,
            )
        made = self.settings.get("dataset")
        if made is not None and made != content_hash:
            got = f"one of {str(made)[:16]}"
            raise InputError(
                "label tree",
                f"a tree of the dataset {content_hash[:16]}",
                got,
                f"{MAKE_AGAIN} from this dataset",
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tree to a file, whole or not at all.

        A folder that exists gets a file `tree.safetensors`.

        Raises:
            InputError: the place cannot be written, or `settings` is no JSON.
        """
        from safetensors.numpy import save

        tensors = {"order": np.asarray(self.order)} | {
            f"children.{r}": np.asarray(c) for r, c in enumerate(self.children)
        }
        try:
            settings = json.dumps(self.settings, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(
                "settings of the label tree",
                "JSON values",
                str(error),
                "pass numbers, strings, lists, dicts",
            ) from error
        head = {
            "format": FORMAT,
            "version": VERSION,
            "content_hash": self.content_hash,
            "settings": settings,
        }
        with replacing(_file(path)) as file:
            file.write(save(tensors, metadata=head | {ALGORITHM: seal(tensors, head)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LabelTree:
        """Read a tree from a file, or from a folder that holds `tree.safetensors`.

        Raises:
            InputError: nothing there, no label tree, another format version, damaged, or no tree in
                the sense of the class.
        """
        file = _file(path)
        head, tensors = _read(file)
        names = [f"children.{r}" for r in range(len(tensors) - 1)]
        if set(tensors) != {"order", *names}:
            raise InputError(
                str(file), "order and children.0 to children.R-2", f"{sorted(tensors)}", MAKE_AGAIN
            )
        settings: dict[str, Any] = parse_record(
            head.get("settings", ""), dict[str, Any], where=f"{file}, settings", mend=MAKE_AGAIN
        )
        try:
            tree = cls(tuple(tensors[name] for name in names), tensors["order"], settings)
        except InputError as error:
            raise InputError(
                f"{file}, {error.where}", error.expected, error.got, error.mend
            ) from error
        if tree.content_hash != head.get("content_hash"):
            raise InputError(
                str(file),
                f"content {head.get('content_hash')}",
                f"{tree.content_hash}",
                f"copy it again, or {MAKE_AGAIN}",
            )
        keys = {"format", "version", "content_hash", "settings"}
        check_seal(head, tensors, keys, str(file), f"copy it again, or {MAKE_AGAIN}")
        return tree


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path / FILE if path.is_dir() else path


def _read(file: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    if not file.is_file():
        raise InputError(
            str(file), "a label tree", "no such file", "run xmlkernels tree to make it"
        )
    head, tensors = read_tensors(
        file, "a whole safetensors file", f"copy it again, or {MAKE_AGAIN}"
    )
    if head.get("format") != FORMAT:
        raise InputError(
            str(file),
            f"the format {FORMAT!r}",
            f"{head.get('format')!r}",
            "pass what xmlkernels tree wrote",
        )
    if head.get("version") != VERSION:
        raise InputError(
            str(file),
            f"version {VERSION}",
            f"version {head.get('version')}",
            "read it with the xmlkernels that wrote it",
        )
    return head, tensors


def _frozen(name: str, array: np.ndarray) -> np.ndarray:
    """Return a read-only int64 copy: the cached properties must remain true."""
    array = np.asarray(array)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            name, "integers in one dimension", f"{array.dtype} {list(array.shape)}", MAKE_AGAIN
        )
    array = np.array(array, np.int64)
    array.setflags(write=False)
    return array


def _check_children(children: tuple[np.ndarray, ...], labels: int) -> None:
    if not 2 <= len(children) + 1 <= MOST_LEVELS:
        got = str(len(children) + 1)
        raise InputError(
            "children",
            f"2 to {MOST_LEVELS} levels, the label level included",
            got,
            "choose other depths",
        )
    for r, starts in enumerate(children):
        below = len(children[r + 1]) - 1 if r + 1 < len(children) else labels
        if len(starts) < 2 or starts[0] != 0 or starts[-1] != below:
            got = f"{starts[0]} to {starts[-1]}" if len(starts) > 1 else f"{len(starts)} bounds"
            expected = f"bounds from 0 to {below}, the nodes of the level below"
            raise InputError(f"children[{r}]", expected, got, MAKE_AGAIN)
        empty = np.flatnonzero(np.diff(starts) < 1)
        if empty.size:
            got = f"{starts[empty[0] + 1] - starts[empty[0]]} of cluster {empty[0]}"
            raise InputError(
                f"children[{r}]", "at least one child of each cluster", got, MAKE_AGAIN
            )


def arrangement(tree: LabelTree | None) -> dict[str, Any]:
    """Give the options of `Inputs.batches` for a model on this tree; none without a tree."""
    if tree is None:
        return {}
    return {
        "order": np.asarray(tree.order),
        "ancestors": tuple(tree.ancestors(r) for r in range(tree.levels - 1)),
    }


def _check_order(order: np.ndarray) -> None:
    labels = len(order)
    outside = np.flatnonzero((order < 0) | (order >= labels))
    if outside.size:
        raise InputError(
            "order", f"label ids from 0 to {labels - 1}", str(order[outside[0]]), MAKE_AGAIN
        )
    count = np.bincount(order, minlength=labels)
    if (count != 1).any():
        twice, never = int(np.argmax(count)), int(np.argmin(count))
        got = f"label {twice} in {count[twice]} clusters and label {never} in none"
        raise InputError("order", "each label in one cluster", got, MAKE_AGAIN)


def _in_two_clusters(fine: np.ndarray, coarse: np.ndarray) -> int:
    """Return the first cluster of `fine` whose labels are in more than one cluster of `coarse`."""
    order = np.lexsort((coarse, fine))
    same, moved = np.diff(fine[order]) == 0, np.diff(coarse[order]) != 0
    at = np.flatnonzero(same & moved)
    return int(fine[order][at[0]]) if at.size else -1
