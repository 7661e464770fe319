"""Writing a dataset folder: its parts, its manifest, and the whole of it in place of an older
one.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse import csr_matrix

from xmlkernels.checksums import file_checksum
from xmlkernels.data.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    content_hash,
    manifest_checksum,
)
from xmlkernels.errors import InputError
from xmlkernels.files import naming


def write_split(
    folder: Path,
    name: str,
    labels: csr_matrix,
    filter_pairs: np.ndarray,
    texts: Sequence[str] | None = None,
) -> None:
    """Write labels [N, L], filter pairs [n, 2] and texts of one split; its tokens.bin is written
    apart.
    """
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    sparse.save_npz(target / "labels.npz", labels)
    np.save(target / "filter.npy", np.asarray(filter_pairs, np.int64).reshape(-1, 2))
    if texts is not None:
        with open(target / "texts.jsonl", "w", encoding="ascii", newline="\n") as file:
            file.writelines(json.dumps(text) + "\n" for text in texts)


def write_label_names(folder: Path, names: Sequence[str]) -> None:
    """One name a line; a line break inside a name becomes a space."""
    with open(folder / "label_names.txt", "w", encoding="utf-8", newline="\n") as file:
        file.writelines(re.sub(r"[\r\n]+", " ", name) + "\n" for name in names)


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
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        inner = path.relative_to(folder).as_posix()
        files[inner], fast[inner] = (
            {"bytes": path.stat().st_size, "sha256": digest},
            file_checksum(path),
        )
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
        sync_folder(below)


# What the writers above, and those of tokens and bags of words, call their files: known also
# without a manifest.
_OURS = re.compile(
    r"manifest\.json|label_(names\.txt|tokens\.bin|features\.npz)|tokenizer/[^/]+"
    r"|(train|val|test)/(labels\.npz|filter\.npy|texts\.jsonl|tokens\.bin|features\.npz)"
)


def refuse_foreign(folder: Path) -> None:
    """InputError where a dataset folder that is about to be replaced holds anything but a dataset's
    own files.
    """
    held = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )
    own: set[str] = set()
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        damaged = True  # the names of the files beside it must speak for it
    else:
        damaged = False
        if isinstance(manifest, dict) and manifest.get("format") == FORMAT:
            listed = manifest.get("files")
            own = {MANIFEST, *(listed if isinstance(listed, dict) else ())}
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


def recover(output: Path) -> None:
    """Put right what a process left that was killed while it replaced a folder; only for whoever
    holds the place.
    """
    for old in output.parent.glob(f".{glob.escape(output.name)}.*.old"):
        if not re.fullmatch(re.escape(f".{output.name}") + r"\.[0-9a-f]{12}\.old", old.name):
            continue
        if not output.exists() and (old / MANIFEST).is_file():
            os.rename(old, output)
        else:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def building(output: Path, *, replace: bool) -> Iterator[Path]:
    """A new folder that takes the place of `output` when the block ends well, and vanishes when it
    does not.

    Args:
        replace: whether a dataset folder that stands there goes; the new one is whole before the
            old one moves.

    Raises:
        InputError: the folder cannot be made, what stands there is more than a dataset, or another
            process put one there meanwhile.
        OSError: the disk refuses (full, say), with a file name; what stood there stays.
    """
    output = output.resolve()
    folder = output.with_name(f".{output.name}.{secrets.token_hex(6)}.part")
    old = folder.with_suffix(".old")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            str(output), "a place to make a folder", str(error.strerror), "choose another"
        ) from error
    try:
        with naming(output):
            yield folder
        if replace and output.exists():
            refuse_foreign(output)
            os.rename(output, old)
        try:
            os.rename(folder, output)
        except OSError as error:
            if old.exists():
                os.rename(old, output)
            raise InputError(
                str(output), "nothing there", "a folder made meanwhile", "run the command again"
            ) from error
        sync_folder(output.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():  # stopped between the two renames
            os.rename(old, output)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
