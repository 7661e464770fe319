"""The manifest of a dataset folder: written, read, and compared with the files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NotRequired, TypedDict

from xmlkernels.checksums import Xxh3, checksum, compare, file_checksum
from xmlkernels.errors import InputError
from xmlkernels.files import sync
from xmlkernels.records import Count, Positive, read_record

FORMAT = "xmlkernels-dataset"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# For people and reports: it follows from the other files, so that it is no part of their hash.
PROFILE = "profile.json"
# What the documents called the labels, where a second file named them: the URIs of subjects.
IDS = "label_ids.txt"
FEATURES, LABEL_FEATURES = "features.npz", "label_features.npz"
SPLITS = ("train", "val", "test")
PREPARE_AGAIN = "prepare the data again"


class FileFacts(TypedDict):
    """Size and hash of one file."""

    bytes: Count
    sha256: str


class SplitFacts(TypedDict):
    """What a reader relies on of a split; its other counts are for people."""

    documents: Count


class TokenizerFacts(TypedDict):
    """Which tokenizer made the tokens."""

    hash: str
    max_length: Positive


class Propensity(TypedDict):
    """The two constants of the propensity model (Jain et al. 2016)."""

    A: float
    B: float


class Checksums(TypedDict):
    """XXH3 of every file and of the manifest itself: fast to compare."""

    files: dict[str, Xxh3]
    manifest: Xxh3


class Manifest(TypedDict):
    """The keys of manifest.json that are read; others are kept for people."""

    name: str
    key: str
    content_hash: str
    num_labels: Count
    propensity: Propensity
    tokenizer: TokenizerFacts | None
    vocabulary: NotRequired[Count | None]
    splits: dict[str, SplitFacts]
    files: dict[str, FileFacts]
    checksums: NotRequired[Checksums]


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read the manifest of a dataset folder and check the type of every value.

    Raises:
        InputError: no manifest there, not one of this format and version, a value of another type,
            a file outside the folder, or another split than train, val and test.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise InputError(
            str(folder),
            f"a dataset folder with {MANIFEST}",
            "none",
            "run xmlkernels prepare to make it",
        )
    kind = {"format": FORMAT, "version": FORMAT_VERSION}
    manifest = read_record(path, Manifest, mend=PREPARE_AGAIN, kind=kind)
    for name in manifest["files"]:
        if not _stays_inside(name):
            raise InputError(
                f"{path}, $.files", "names of files inside the folder", repr(name), PREPARE_AGAIN
            )
    if wrong := sorted(manifest["splits"].keys() - set(SPLITS)):
        raise InputError(
            f"{path}, $.splits", f"splits among {', '.join(SPLITS)}", repr(wrong[0]), PREPARE_AGAIN
        )
    kinds = [manifest["tokenizer"] is not None, manifest.get("vocabulary") is not None]
    for known, what, end in zip(
        kinds, ("tokenizer", "vocabulary"), ("tokens.bin", "features.npz"), strict=True
    ):
        held = next((name for name in manifest["files"] if name.endswith(end)), None)
        if held is not None and not known:
            expected = f"the {what} of {held}"
            raise InputError(f"{path}, $.{what}", expected, "none", PREPARE_AGAIN)
    # With neither, all that there is of the documents is their texts.
    texts = all(f"{name}/texts.jsonl" in manifest["files"] for name in manifest["splits"])
    if all(kinds) or not (any(kinds) or texts):
        got = "both" if all(kinds) else "neither, and no texts"
        raise InputError(
            str(path), "a tokenizer, or the vocabulary of bags of words", got, PREPARE_AGAIN
        )
    if (found := content_hash(manifest)) != manifest["content_hash"]:
        raise InputError(
            f"{path}, $.content_hash",
            f"{found}, that of its files",
            manifest["content_hash"][:64],
            PREPARE_AGAIN,
        )
    if "checksums" in manifest:
        compare(
            manifest_checksum(manifest), manifest["checksums"]["manifest"], str(path), PREPARE_AGAIN
        )
    return dict(manifest)


def content_hash(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of what a dataset is: its labels, propensities and files."""
    facts = {key: manifest[key] for key in ("num_labels", "propensity")}
    return hashlib.sha256(
        json.dumps([facts, manifest["files"]], sort_keys=True).encode()
    ).hexdigest()


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """Return the checksum of everything in a manifest but this checksum."""
    rest = dict(manifest) | {"checksums": {"files": manifest["checksums"]["files"]}}
    return checksum(json.dumps(rest, sort_keys=True).encode())


def _stays_inside(name: str) -> bool:
    """Return whether a name means a file below its folder, on every system."""
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(name)
        if not path.parts or path.is_absolute() or path.drive or ".." in path.parts or "\0" in name:
            return False
    return True


def write_manifest(
    folder: Path,
    *,
    name: str,
    key: str,
    num_labels: int,
    propensity: tuple[float, float],
    tokenizer: Mapping[str, Any] | None,
    splits: Mapping[str, Mapping[str, int]],
    source: Mapping[str, Any],
    vocabulary: int | None = None,
) -> None:
    """Hash and fsync every file of the folder, then write the manifest over them.

    Args:
        key: what decides whether a folder can be reused (a hash of inputs and settings).
        tokenizer: `name`, `hash`, `max_length`; None for bags of words.
        vocabulary: their V; None for tokens.
        splits: per split its counts: `documents`, `positives`, `unlabelled`, `filter_pairs`.
        source: where the data came from; kept for the reader, never interpreted.
    """
    files, fast = {}, {}
    every = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in (path for path in every if path != folder / PROFILE):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        inner = path.relative_to(folder).as_posix()
        files[inner] = {"bytes": path.stat().st_size, "sha256": digest}
        fast[inner] = file_checksum(path)
    facts = {"num_labels": num_labels, "propensity": dict(zip("AB", propensity, strict=True))}
    content = content_hash(facts | {"files": files})
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "name": name,
        "key": key,
        "content_hash": content,
        **facts,
    }
    if vocabulary is not None:
        manifest["vocabulary"] = vocabulary
    manifest |= {
        "tokenizer": tokenizer and dict(tokenizer),
        "splits": dict(splits),
        "source": dict(source),
        "files": files,
    }
    manifest["checksums"] = {"files": fast}
    manifest = json.loads(json.dumps(manifest))  # as it will be read, tuples as lists
    manifest["checksums"]["manifest"] = manifest_checksum(manifest)
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    for below in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(below)


# Names of the files of a dataset, which count as its own even where the manifest is damaged.
_OURS = re.compile(
    r"(manifest|profile)\.json|label_(names\.txt|tokens\.bin|features\.npz)|tokenizer/[^/]+"
    r"|(train|val|test)/(labels\.npz|filter\.npy|texts\.jsonl|tokens\.bin|features\.npz)"
)


def refuse_foreign(folder: Path) -> None:
    """Raise InputError where a folder to be replaced holds anything but a dataset's own files."""
    held = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )
    own: set[str] = set()
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        damaged = True  # the names of the other files must do
    else:
        damaged = False
        if isinstance(manifest, dict) and manifest.get("format") == FORMAT:
            listed = manifest.get("files")
            own = {MANIFEST, PROFILE, *(listed if isinstance(listed, dict) else ())}
    if damaged or own:
        own |= {name for name in held if _OURS.fullmatch(name)}
    foreign = [name for name in held if name not in own] or (
        held if damaged and held == [MANIFEST] else []
    )
    if foreign:
        got = foreign[0] if len(foreign) == 1 else f"{foreign[0]} and {len(foreign) - 1} more"
        mend = "nothing was deleted: move them, or choose another --output"
        raise InputError(
            str(folder), "nothing but a dataset to replace", f"other files in it: {got}", mend
        )
