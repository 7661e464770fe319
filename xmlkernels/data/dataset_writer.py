"""Write a dataset folder: its documents and labels, whole or not at all, once for each key."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy import sparse
from scipy.sparse import csr_matrix

from xmlkernels.data.formats.matrices import write_npz
from xmlkernels.data.formats.text_lines import without_separator
from xmlkernels.data.formats.token_maps import from_padded_map
from xmlkernels.data.manifest import (
    FEATURES,
    IDS,
    LABEL_FEATURES,
    MANIFEST,
    read_manifest,
    refuse_foreign,
    write_manifest,
)
from xmlkernels.data.profile import Profile, write_profile
from xmlkernels.data.profiling import Measured, lines_of, measure
from xmlkernels.data.raw import Raw, RawSplit
from xmlkernels.data.token_store import TokenStore
from xmlkernels.data.tokens import Tokenizer, tokenize_to_file
from xmlkernels.errors import InputError
from xmlkernels.files import recover_folder, replacing_folder
from xmlkernels.locks import own_place
from xmlkernels.terms import PART
from xmlkernels.ticks import Ticks

log = logging.getLogger(__name__)

Tell = Callable[[str], None]
T = TypeVar("T")
TOKENS = "tokens.bin"


def make_once(
    output: Path,
    key: str,
    opened: Callable[[], T],
    make: Callable[[Path], None],
    *,
    overwrite: bool,
    flag: str,
    wait: Tell | None = None,
) -> tuple[T, bool]:
    """Open the dataset folder of this key, and make it first where it is not there.

    Args:
        opened: opens `output` and checks it.
        make: makes the folder of the path that it is given.
        overwrite: whether another dataset there is replaced.
        flag: what names the output, for messages.
        wait: receives a line when another process makes a dataset there, which is then waited for;
            None refuses.

    Returns:
        What `opened` gives, and whether the folder stood already.

    Raises:
        InputError: something else is there, or the place is in use.
    """
    found = _standing(output, key, opened, overwrite, flag)
    if found is None:
        with own_place(output, flag, make=True, wait=wait) as place:
            recover_folder(place, MANIFEST)
            # Another process may have made it meanwhile.
            found = _standing(output, key, opened, overwrite, flag)
            if found is None:
                make(output)
                return opened(), False
    return found, True


def _standing(
    output: Path, key: str, opened: Callable[[], T], overwrite: bool, flag: str
) -> T | None:
    """Open what is at `output`, if it is the dataset of this key.

    None where the place is free or may be cleared.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / MANIFEST).is_file():
        # Never cleared, whatever the flags: these are somebody's files.
        got = "other files" if output.is_dir() else "a file"
        raise InputError(
            str(output), "a free place or a dataset folder", got, f"choose another {flag}"
        )
    try:
        if read_manifest(output)["key"] == key:
            return opened()
    except InputError as error:
        if not overwrite:
            raise InputError(
                error.where, error.expected, error.got, "make it again with --overwrite"
            ) from error
    if not overwrite:
        raise InputError(
            str(output),
            "a dataset made from these inputs and settings",
            "one made from others",
            f"choose another {flag}, or replace it with --overwrite",
        )
    refuse_foreign(output)
    return None


def write_folder(
    output: Path,
    raw: Raw,
    tokenizer: Tokenizer | None,
    *,
    name: str,
    key: str,
    max_length: int,
    keep_texts: bool,
    propensity: tuple[float, float],
    tokenizer_name: str | None,
    source: Mapping[str, Any],
    overwrite: bool,
    tell: Tell = lambda line: None,
) -> None:
    """Write a whole dataset folder in the place of `output`.

    Args:
        raw: its documents and labels, rows chosen.
        key: what decides whether the folder can be used again.
        tokenizer_name: what the manifest calls the tokenizer.
        source: where the data came from, for the manifest.
        overwrite: whether a dataset there is replaced.
        tell: receives a line now and then.
    """
    with replacing_folder(output, replace=overwrite, check=refuse_foreign) as folder:
        counts = write_splits(raw, tokenizer, max_length, folder, keep_texts=keep_texts, tell=tell)
        write_labels(raw, tokenizer, max_length, folder)
        profile = profile_of(raw, name, folder, max_length)
        write_profile(folder, profile)
        for line in lines_of(profile):
            tell(line)
        made_by: dict[str, Any] | None = None
        if tokenizer is not None:
            tokenizer.save(folder / "tokenizer")
            made_by = {"name": tokenizer_name, "hash": tokenizer.hash, "max_length": max_length}
        write_manifest(
            folder,
            name=name,
            key=key,
            num_labels=raw.num_labels,
            propensity=propensity,
            tokenizer=made_by,
            splits=counts,
            vocabulary=raw.vocabulary,
            source=source,
        )


def profile_of(raw: Raw, name: str, folder: Path, max_length: int) -> Profile:
    """Measure what was read and written.

    Args:
        raw: its documents and labels.
        name: of the dataset.
        folder: where its splits were written.
        max_length: tokens kept of each document.
    """
    splits = {}
    for split, part in raw.splits.items():
        tokens = folder / split / TOKENS
        lengths = TokenStore.open(tokens).lengths if tokens.is_file() else None
        texts = None
        if part.texts is not None:
            texts = _words(part.texts, raw.separator)
        splits[split] = Measured(texts, part.labels, lengths, max_length)
    return measure(name, splits, raw.label_names)


def write_splits(
    raw: Raw,
    tokenizer: Tokenizer | None,
    max_length: int,
    folder: Path,
    *,
    keep_texts: bool,
    tell: Tell,
) -> dict[str, dict[str, int]]:
    """Write every split into `folder`; return its counts for the manifest.

    Without tokenizer and features the texts are kept: there is nothing else of the documents.

    Label values other than 1 (relevances) are stored as 1: training and metrics know only positive
    and negative.
    """
    counts = {}
    joiner = str(raw.facts["separator"]) if "parts" in raw.facts else None
    kept = keep_texts or (tokenizer is None and raw.vocabulary is None)
    for name, split in raw.splits.items():
        labels = split.labels
        graded = int((labels.data != 1).sum())
        if graded:
            tell(f"{name}: {graded:,} label values are not 1 and count as 1")
            labels = labels.copy()
            labels.data[:] = 1
        pairs = np.unique(split.filter_pairs, axis=0)
        write_split(
            folder, name, labels, pairs, _words(split.texts, raw.separator) if kept else None
        )
        counts[name] = {
            "documents": labels.shape[0],
            "positives": int(labels.nnz),
            "unlabelled": int((np.diff(labels.indptr) == 0).sum()),
            "filter_pairs": len(pairs),
            **_write_documents(folder / name, name, split, tokenizer, max_length, joiner),
        }
        tell(_summary(name, counts[name]))
    return counts


def _words(texts: list[str] | None, separator: str) -> list[str] | None:
    return None if texts is None else [without_separator(text, separator) for text in texts]


def _write_documents(
    folder: Path,
    name: str,
    split: RawSplit,
    tokenizer: Tokenizer | None,
    max_length: int,
    joiner: str | None,
) -> dict[str, int]:
    """Write the documents' tokens or, where there is no tokenizer, their features, if any.

    Returns their counts.
    """
    if tokenizer is None:
        if split.features is None:
            return {}
        write_npz(folder / FEATURES, split.features)
        return {"words": int(split.features.nnz)}
    store = _write_tokens(folder / TOKENS, name, split, tokenizer, max_length, joiner)
    return {
        "tokens": store.header.tokens,
        "at_max_length": int((store.lengths == max_length).sum()),
    }


def _summary(name: str, count: dict[str, int]) -> str:
    documents = max(1, count["documents"])
    if "words" in count:
        length = f"{count['words'] / documents:.1f} words each"
    elif "tokens" not in count:
        length = "texts alone"
    else:
        share = count["at_max_length"] / documents
        length = f"{count['tokens'] / documents:.1f} tokens each ({share:.1%} at the maximum)"
    return (
        f"{name}: {count['documents']:,} documents, {count['positives'] / documents:.2f} labels "
        "each "
        f"({count['unlabelled']:,} without), {length}"
    )


def write_labels(raw: Raw, tokenizer: Tokenizer | None, max_length: int, folder: Path) -> None:
    """Write label names, and tokens or features of the label texts, where there are any."""
    if raw.label_names is not None:
        write_label_names(folder, raw.label_names)
    if raw.label_ids is not None:
        write_label_names(folder, raw.label_ids, IDS)
    if raw.label_features is not None:
        write_npz(folder / LABEL_FEATURES, raw.label_features)
    if tokenizer is None:
        return
    if raw.label_maps is not None or raw.label_texts is not None:
        labels = RawSplit(raw.label_texts, raw.splits["train"].labels, maps=raw.label_maps)
        _write_tokens(folder / "label_tokens.bin", "label texts", labels, tokenizer, max_length)


def _write_tokens(
    path: Path,
    name: str,
    split: RawSplit,
    tokenizer: Tokenizer,
    max_length: int,
    joiner: str | None = None,
) -> TokenStore:
    """Tokenise texts; with a joiner, which takes the place of what keeps their parts apart."""
    if split.maps is not None:
        return _from_maps(path, name, split.maps, split.map_rows, tokenizer)
    if split.texts is None:
        raise InputError(f"{name} split", "texts or token maps", "neither", "give one of them")
    ticks = Ticks(log, f"{name}: tokens", len(split.texts), "documents")
    texts = split.texts
    if joiner is not None:
        texts = [joiner.join(filter(None, text.split(PART))) for text in texts]
    return tokenize_to_file(texts, path, tokenizer, max_length, progress=ticks.add)


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


def write_split(
    folder: Path,
    name: str,
    labels: csr_matrix,
    filter_pairs: np.ndarray,
    texts: Sequence[str] | None = None,
) -> None:
    """Write labels [N, L], filter pairs [n, 2] and texts of one split.

    Its tokens.bin is written apart.
    """
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    sparse.save_npz(target / "labels.npz", labels)
    np.save(target / "filter.npy", np.asarray(filter_pairs, np.int64).reshape(-1, 2))
    if texts is not None:
        with open(target / "texts.jsonl", "w", encoding="ascii", newline="\n") as file:
            ticks = Ticks(log, f"{name}: texts written", len(texts), "documents")
            file.writelines(json.dumps(text) + "\n" for text in ticks.over(texts))


def write_label_names(
    folder: Path, names: Sequence[str], file_name: str = "label_names.txt"
) -> None:
    """One name a line; a line break inside a name becomes a space."""
    with open(folder / file_name, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(re.sub(r"[\r\n]+", " ", name) + "\n" for name in names)
