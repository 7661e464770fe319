"""The steps between raw data and a dataset folder: which rows, their tokens, the labels' side."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from xmlkernels.data.dataset_writer import write_label_names, write_split
from xmlkernels.data.formats.labels import drop_unlabelled, write_npz
from xmlkernels.data.formats.text_lines import without_separator
from xmlkernels.data.formats.token_maps import from_padded_map
from xmlkernels.data.manifest import FEATURES, LABEL_FEATURES
from xmlkernels.data.raw import Raw, RawSplit
from xmlkernels.data.token_store import TokenStore
from xmlkernels.data.tokens import Tokenizer, tokenize_to_file
from xmlkernels.errors import InputError

Tell = Callable[[str], None]
SECONDS_BETWEEN_LINES = 10.0


def choose_rows(raw: Raw, *, drop: tuple[str, ...], validation_share: float, seed: int) -> None:
    """Leave out unlabelled documents of the splits in `drop`, then draw the validation split from
    the training rows.

    The draw is a pure function of (seed, number of training rows left). Both parts keep the order
    of the file.

    Raises:
        InputError: a split without any label, or a share that leaves one side empty.
    """
    for name, split in raw.splits.items():
        rows = drop_unlabelled(split.labels, keep=name not in drop, name=f"the {name} split")
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


def write_splits(
    raw: Raw,
    tokenizer: Tokenizer | None,
    max_length: int,
    folder: Path,
    *,
    keep_texts: bool,
    tell: Tell,
) -> dict[str, dict[str, int]]:
    """Write every split into `folder`; returns its counts for the manifest.

    Label values other than 1 (relevances) are stored as 1: training and metrics know only positive
    and negative.
    """
    counts = {}
    for name, split in raw.splits.items():
        labels = split.labels
        graded = int((labels.data != 1).sum())
        if graded:
            tell(f"{name}: {graded:,} label values are not 1 and count as 1")
            labels = labels.copy()
            labels.data[:] = 1
        pairs = np.unique(split.filter_pairs, axis=0)
        write_split(
            folder, name, labels, pairs, _words(split.texts, raw.separator) if keep_texts else None
        )
        counts[name] = {
            "documents": labels.shape[0],
            "positives": int(labels.nnz),
            "unlabelled": int((np.diff(labels.indptr) == 0).sum()),
            "filter_pairs": len(pairs),
            **_write_documents(folder / name, name, split, tokenizer, max_length, tell),
        }
        tell(_told(name, counts[name]))
    return counts


def _words(texts: list[str] | None, separator: str) -> list[str] | None:
    return None if texts is None else [without_separator(text, separator) for text in texts]


def _write_documents(
    folder: Path,
    name: str,
    split: RawSplit,
    tokenizer: Tokenizer | None,
    max_length: int,
    tell: Tell,
) -> dict[str, int]:
    """Write the documents' tokens, or their features where there is no tokenizer; returns what is
    counted of them.
    """
    if tokenizer is None:
        assert split.features is not None
        write_npz(folder / FEATURES, split.features)
        return {"words": int(split.features.nnz)}
    store = _write_tokens(folder / "tokens.bin", name, split, tokenizer, max_length, tell)
    return {
        "tokens": store.header.tokens,
        "at_max_length": int((store.lengths == max_length).sum()),
    }


def _told(name: str, count: dict[str, int]) -> str:
    documents = max(1, count["documents"])
    if "words" in count:
        length = f"{count['words'] / documents:.1f} words each"
    else:
        share = count["at_max_length"] / documents
        length = f"{count['tokens'] / documents:.1f} tokens each ({share:.1%} at the maximum)"
    return (
        f"{name}: {count['documents']:,} documents, {count['positives'] / documents:.2f} labels "
        "each "
        f"({count['unlabelled']:,} without), {length}"
    )


def write_labels(
    raw: Raw, tokenizer: Tokenizer | None, max_length: int, folder: Path, *, tell: Tell
) -> None:
    """Write label names, and tokens or features of the label texts, where there are any."""
    if raw.label_names is not None:
        write_label_names(folder, raw.label_names)
    if raw.label_features is not None:
        write_npz(folder / LABEL_FEATURES, raw.label_features)
    if tokenizer is None:
        return
    if raw.label_maps is not None or raw.label_texts is not None:
        labels = RawSplit(raw.label_texts, raw.splits["train"].labels, maps=raw.label_maps)
        _write_tokens(
            folder / "label_tokens.bin", "label texts", labels, tokenizer, max_length, tell
        )


def _write_tokens(
    path: Path, name: str, split: RawSplit, tokenizer: Tokenizer, max_length: int, tell: Tell
) -> TokenStore:
    if split.maps is not None:
        return _from_maps(path, name, split.maps, split.map_rows, tokenizer)
    if split.texts is None:
        raise InputError(f"{name} split", "texts or token maps", "neither", "give one of them")
    last = time.monotonic()

    def progress(done: int, every: int) -> None:
        nonlocal last
        if done < every and time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            tell(f"{name}: {done:,} of {every:,} tokenised")

    return tokenize_to_file(split.texts, path, tokenizer, max_length, progress=progress)


def _from_maps(
    path: Path,
    name: str,
    maps: tuple[np.ndarray, np.ndarray],
    rows: np.ndarray | None,
    tokenizer: Tokenizer,
) -> TokenStore:
    ids, mask = maps
    (empty,) = tokenizer.encode_batch([""], max(ids.shape[1], 8))
    rows = np.arange(len(ids)) if rows is None else rows
    first = np.asarray(ids[rows[:1000], 0])
    # Every text of one tokenizer starts with its first special token; maps of another mostly do
    # not.
    if len(empty) > 1 and (first != empty[0]).any():
        raise InputError(
            f"token map of the {name} split",
            f"rows that start with {empty[0]}, as this tokenizer's do",
            str(first[first != empty[0]][0]),
            "give the tokenizer the maps were made with",
        )
    return from_padded_map(
        path,
        ids,
        mask,
        rows=rows,
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        pad_id=tokenizer.pad_id,
        name=f"token map of the {name} split",
    )
