"""A prepared dataset: one folder whose manifest names, counts and hashes everything in it.

::

    manifest.json            format, counts, PSP constants, hashes; written last
    label_names.txt          one name a line (optional)
    label_tokens.bin         tokens of the label texts, for label-text augmentation (optional)
    tokenizer/               the tokenizer that made the tokens
    {train,val,test}/        tokens.bin · labels.npz (scipy CSR) · filter.npy (int64 pairs) · texts.jsonl (optional)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse import csr_matrix

from xmlkernels.data.token_store import TokenStore
from xmlkernels.errors import InputError

FORMAT = "xmlkernels-dataset"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val", "test")
PREPARE_AGAIN = "prepare the data again"


@dataclass(frozen=True)
class Split:
    """Documents of one split: tokens (N rows), labels CSR [N, L], pairs (document, label) never to be predicted."""

    name: str
    folder: Path
    tokens: TokenStore
    labels: csr_matrix
    filter_pairs: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def texts(self) -> list[str]:
        """The documents' texts. InputError where the dataset was prepared without keeping them."""
        path = self.folder / "texts.jsonl"
        if not path.is_file():
            raise InputError(str(path), "the documents' texts", "no such file", "prepare the data with --keep-texts")
        lines = path.read_text(encoding="ascii").splitlines()
        if len(lines) != len(self):
            raise InputError(str(path), f"{len(self)} lines", str(len(lines)), PREPARE_AGAIN)
        return [json.loads(line) for line in lines]


class Dataset:
    """An opened dataset folder; token files are mapped, labels are in memory.

    Attributes:
        splits: `train` and, where prepared, `val` and `test`.
        label_tokens: tokens of the L label texts, or None.
        manifest: what manifest.json says.
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], splits: dict[str, Split], label_tokens: TokenStore | None
    ) -> None:
        self.folder, self.manifest, self.splits, self.label_tokens = folder, manifest, splits, label_tokens
        self.name: str = manifest["name"]
        self.num_labels: int = manifest["num_labels"]
        self.propensity: tuple[float, float] = (manifest["propensity"]["A"], manifest["propensity"]["B"])
        self.content_hash: str = manifest["content_hash"]
        self.key: str = manifest["key"]
        self.max_length: int = manifest["tokenizer"]["max_length"]
        self.tokenizer_hash: str = manifest["tokenizer"]["hash"]
        self.tokenizer_folder = folder / "tokenizer"

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> Dataset:
        """Open a dataset folder and check that its files are whole.

        Sizes and row counts are always compared with the manifest; `verify` reads every file and compares its sha256.

        Raises:
            InputError: no dataset, another format version, a file missing, cut short or from another dataset.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        for name, facts in manifest["files"].items():
            _check_file(folder / name, facts, verify)
        splits = {name: _open_split(folder, name, manifest) for name in manifest["splits"]}
        label_tokens = None
        if "label_tokens.bin" in manifest["files"]:
            label_tokens = _open_tokens(folder / "label_tokens.bin", manifest["num_labels"], manifest)
        return cls(folder, manifest, splits, label_tokens)

    @cached_property
    def label_names(self) -> list[str] | None:
        """Names of the L labels, or None where the dataset has none."""
        if "label_names.txt" not in self.manifest["files"]:
            return None
        path = self.folder / "label_names.txt"
        names = path.read_text(encoding="utf-8").split("\n")[:-1]
        if len(names) != self.num_labels:
            raise InputError(str(path), f"{self.num_labels} lines, one for each label", str(len(names)), PREPARE_AGAIN)
        return names


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a dataset folder.

    Raises:
        InputError: no manifest there, or not one of this format and version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise InputError(str(folder), f"a dataset folder with {MANIFEST}", "none", "run train/prepare.py to make it")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(str(path), "JSON", str(error), PREPARE_AGAIN) from error
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else (None, None)
    if found != (FORMAT, FORMAT_VERSION):
        raise InputError(str(path), f"format {FORMAT} version {FORMAT_VERSION}", f"{found[0]} {found[1]}", PREPARE_AGAIN)
    keys = {"name", "key", "num_labels", "propensity", "tokenizer", "splits", "files", "content_hash"}
    if missing := sorted(keys - manifest.keys()):
        raise InputError(str(path), f"the keys {sorted(keys)}", f"none named {missing[0]}", PREPARE_AGAIN)
    return manifest


def write_split(
    folder: Path,
    name: str,
    labels: csr_matrix,
    filter_pairs: np.ndarray,
    texts: Sequence[str] | None = None,
) -> None:
    """Write labels [N, L], filter pairs [n, 2] and texts of one split; its tokens.bin is written apart."""
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
    tokenizer: Mapping[str, Any],
    splits: Mapping[str, Mapping[str, int]],
    source: Mapping[str, Any],
) -> None:
    """Hash and fsync every file of the folder, then write the manifest over them.

    Args:
        key: what decides whether a folder can be reused (a hash of inputs and settings).
        tokenizer: `name`, `hash`, `max_length`.
        splits: per split its counts: `documents`, `positives`, `unlabelled`, `filter_pairs`.
        source: where the data came from; kept for the reader, never interpreted.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    facts = {"num_labels": num_labels, "propensity": dict(zip("AB", propensity, strict=True))}
    content = hashlib.sha256(json.dumps([facts, files], sort_keys=True).encode()).hexdigest()
    manifest = {"format": FORMAT, "version": FORMAT_VERSION, "name": name, "key": key, "content_hash": content, **facts}
    manifest |= {"tokenizer": dict(tokenizer), "splits": dict(splits), "source": dict(source), "files": files}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(inner)


@contextmanager
def building(output: Path, *, replace: bool) -> Iterator[Path]:
    """A new folder that takes the place of `output` when the block ends well, and vanishes when it does not.

    Args:
        replace: whether a dataset folder that stands there goes; the new one is whole before the old one moves.

    Raises:
        InputError: the folder cannot be made, or another process put one there meanwhile.
    """
    output = output.resolve()
    folder = output.with_name(f".{output.name}.{secrets.token_hex(6)}.part")
    old = folder.with_suffix(".old")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(str(output), "a place to make a folder", str(error.strerror), "choose another") from error
    try:
        yield folder
        if replace and output.exists():
            os.rename(output, old)
        try:
            os.rename(folder, output)
        except OSError as error:
            if old.exists():
                os.rename(old, output)
            raise InputError(str(output), "nothing there", "a folder made meanwhile", "run the command again") from error
        sync_folder(output.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _check_file(path: Path, facts: Mapping[str, Any], verify: bool) -> None:
    if not path.is_file():
        raise InputError(str(path), "a file the manifest names", "no such file", PREPARE_AGAIN)
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise InputError(str(path), f"{facts['bytes']} bytes, as the manifest says", f"{size} bytes", PREPARE_AGAIN)
    if verify:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != facts["sha256"]:
            raise InputError(str(path), f"sha256 {facts['sha256']}", digest, PREPARE_AGAIN)


def _open_tokens(path: Path, rows: int, manifest: Mapping[str, Any]) -> TokenStore:
    store = TokenStore.open(path)
    if len(store) != rows:
        raise InputError(str(path), f"{rows} rows", str(len(store)), PREPARE_AGAIN)
    if store.header.tokenizer_hash != manifest["tokenizer"]["hash"]:
        raise InputError(str(path), "tokens of the manifest's tokenizer", "tokens of another", PREPARE_AGAIN)
    return store


def _open_split(folder: Path, name: str, manifest: Mapping[str, Any]) -> Split:
    documents, labels_count = manifest["splits"][name]["documents"], manifest["num_labels"]
    inside = folder / name
    try:
        labels = csr_matrix(sparse.load_npz(inside / "labels.npz"))
        pairs = np.load(inside / "filter.npy", allow_pickle=False)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(str(inside), "labels.npz and filter.npy", str(error), PREPARE_AGAIN) from error
    if labels.shape != (documents, labels_count):
        expected = f"labels of shape {(documents, labels_count)}"
        raise InputError(str(inside / "labels.npz"), expected, str(labels.shape), PREPARE_AGAIN)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != np.int64:
        raise InputError(str(inside / "filter.npy"), "int64 pairs [n, 2]", f"{pairs.dtype} {pairs.shape}", PREPARE_AGAIN)
    if pairs.size and (pairs.min() < 0 or (pairs.max(axis=0) >= labels.shape).any()):
        raise InputError(str(inside / "filter.npy"), f"pairs inside {labels.shape}", str(pairs.max(axis=0)), PREPARE_AGAIN)
    return Split(name, inside, _open_tokens(inside / "tokens.bin", documents, manifest), labels, pairs)
