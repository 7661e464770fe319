"""Label ids of raw files: how many are used, whether they fit a table, and new numbers for them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.data.raw import Raw, RawSplit
from xmlkernels.errors import InputError

MOST_LABELS = 2**31 - 1
# Beyond this share of labels without a document, ids that nothing declares are those of a database,
# not numbers.
_SPARSE, _FEW = 100, 10_000
_DIVIDERS = re.compile(r"[,;|\t]")


def used_labels(raw: Raw) -> np.ndarray:
    """int64 [n]: the labels that any document of any split has, ascending."""
    return np.unique(
        np.concatenate([split.labels.indices for split in raw.splits.values()])
    ).astype(np.int64)


def check_width(raw: Raw, where: str) -> None:
    """Refuse a width that no table can have, or that comes from a few far-apart ids.

    Args:
        where: the label file, for the message.

    Raises:
        InputError: more than 2^31 - 1 labels, or ids so sparse that fewer than one label of a
            hundred has a document.
    """
    labels, used = raw.num_labels, used_labels(raw)
    if labels > MOST_LABELS or (not raw.declared and labels > max(_FEW, _SPARSE * len(used))):
        got = f"ids up to {labels - 1:,} ({len(used):,} in use)"
        mend = "number them anew with --remap-labels, which keeps the ids as names"
        if labels <= MOST_LABELS:
            mend += f", or say --num-labels {labels} where so many labels exist"
        raise InputError(where, "label ids numbered from 0, of which most are used", got, mend)


def remap_labels(raw: Raw) -> None:
    """Give the labels that any document has numbers from 0, in the order of their ids.

    Names keep the ids where there are no names.

    Texts, names, features and token maps of the labels, and the filter pairs, follow; those of
    other labels go.
    """
    used = used_labels(raw)
    names = raw.label_names
    raw.label_names = (
        [str(label) for label in used.tolist()]
        if names is None
        else [names[label] for label in used]
    )
    if raw.label_texts is not None:
        raw.label_texts = [raw.label_texts[label] for label in used]
    if raw.label_features is not None:
        raw.label_features = raw.label_features[used]
    if raw.label_maps is not None:
        raw.label_maps = raw.label_maps[0][used], raw.label_maps[1][used]
    for split in raw.splits.values():
        _renumber(split, used)


def _renumber(split: RawSplit, used: np.ndarray) -> None:
    labels, pairs = split.labels, split.filter_pairs
    columns = np.searchsorted(used, labels.indices)
    split.labels = csr_matrix(
        (labels.data, columns, labels.indptr), shape=(labels.shape[0], len(used))
    )
    kept = pairs[np.isin(pairs[:, 1], used)]
    split.filter_pairs = np.stack([kept[:, 0], np.searchsorted(used, kept[:, 1])], axis=1)


def label_lines(raw: Raw) -> list[str]:
    """Describe the labels in sentences: how many have no document, where ids seem to begin."""
    used, labels = used_labels(raw), raw.num_labels
    told = []
    if (unused := labels - len(used)) > 0:
        told.append(
            f"note: labels: {labels:,}, of which {unused:,} ({unused / labels:.1%}) have no "
            "document in any split"
        )
    if len(used) > 1 and used[0] == 1 and 2 * len(used) > labels:
        told.append(
            "note: labels: no document has label 0: do the ids begin at 1? Line 1 of the names is "
            "label 0"
        )
    return told


def name_lines(names: Sequence[str]) -> list[str]:
    """Describe label names read with documents: the first five, and any that look like several."""
    told = [f"labels: {len(names):,}, the first {', '.join(repr(name[:60]) for name in names[:5])}"]
    known = set(names)
    several = [name for name in names if len(parts := _parts(name)) > 1 and known.issuperset(parts)]
    divided = [name for name in names if len(_parts(name)) > 1]
    if suspects := several or (divided if 2 * len(divided) > len(names) else []):
        what = f"{_count(suspects)} like several in one ({suspects[0][:60]!r})"
        told.append(f"note: labels: {what}: do commas or tabs divide them? --label-divider says so")
    return told


def _parts(name: str) -> list[str]:
    return [part for piece in _DIVIDERS.split(name) if (part := piece.strip())]


def _count(names: Sequence[str]) -> str:
    return "1 name looks" if len(names) == 1 else f"{len(names):,} names look"
