"""Divide documents into training, validation and test by a hash of their texts."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

from xmlkernels.data.raw import Raw
from xmlkernels.errors import InputError


def places_of(texts: Iterable[str], seed: int) -> np.ndarray:
    """Return a place from 0 to below 1 for each text, fp64 [N].

    It is the same on every machine and for texts that differ in letter case and spacing alone.
    """
    key = seed.to_bytes(8, "little")
    hashes = b"".join(
        blake2b(" ".join(text.casefold().split()).encode("utf-8", "replace"), digest_size=8,
                key=key).digest()
        for text in texts
    )  # fmt: skip
    return np.frombuffer(hashes, np.dtype("<u8")).astype(np.float64) / 2**64


def split_by_hash(raw: Raw, *, validation: float, test: float, seed: int) -> None:
    """Take shares of the training documents as validation and test splits.

    Equal texts are on one side, so that the shares are met on average. A split that would be empty
    takes the texts whose places come next.

    Args:
        raw: with a training split of texts.
        validation, test: shares.
        seed: another draws others.

    Raises:
        InputError: there are no texts, or too few different ones.
    """
    wanted = {name: share for name, share in (("test", test), ("val", validation)) if share}
    if not wanted:
        return
    train = raw.splits["train"]
    if train.texts is None:
        mend = "give --validation and --test"
        raise InputError("--validation-share", "texts to draw from", "bags of words", mend)
    places = places_of(train.texts, seed)
    order = np.unique(places)
    if len(order) <= len(wanted):
        expected = f"more than {len(wanted)} different texts"
        mend = "give more documents, or files of each split"
        raise InputError("the data", expected, str(len(order)), mend)
    ranks = np.searchsorted(order, places)
    first, end = 0, 0.0
    for number, (name, share) in enumerate(wanted.items(), 1):
        end += share
        # One text at least for this split, for each that follows and for training.
        most = len(order) - 1 - (len(wanted) - number)
        last = min(max(int(np.searchsorted(order, end)), first + 1), most)
        raw.splits[name] = train.take(np.flatnonzero((ranks >= first) & (ranks < last)))
        first = last
    rest = {"train": train.take(np.flatnonzero(ranks >= first))}
    found = rest | {name: raw.splits[name] for name in ("val", "test") if name in raw.splits}
    raw.splits.clear()
    raw.splits.update(found)
