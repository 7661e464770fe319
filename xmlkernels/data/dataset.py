"""A prepared dataset: one folder whose manifest names, counts and hashes everything in it.

::

    manifest.json            format, counts, PSP constants, hashes; written last
    label_names.txt          one name a line (optional)
    label_ids.txt            what the documents call the label, one a line (optional)
    label_tokens.bin         tokens of the label texts, for label-text augmentation (optional)
    tokenizer/               the tokenizer that made the tokens
    {train,val,test}/        tokens.bin · labels.npz (scipy CSR) · filter.npy (int64 pairs) ·
    texts.jsonl (optional)

A dataset of bags of words has {train,val,test}/features.npz and label_features.npz (optional) in
place of tokens and tokenizer; one of texts alone, for a bag of words and the ranker, has neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.checksums import compare, file_checksum
from xmlkernels.data.formats.arrays import read_npy
from xmlkernels.data.formats.matrices import read_npz
from xmlkernels.data.from_memory import Documents, Memory, write
from xmlkernels.data.manifest import (
    FEATURES,
    IDS,
    LABEL_FEATURES,
    MANIFEST,
    PREPARE_AGAIN,
    read_manifest,
)
from xmlkernels.data.token_store import TokenStore
from xmlkernels.data.tokens import Tokenizer
from xmlkernels.errors import InputError
from xmlkernels.records import parse_record


@dataclass(frozen=True)
class Split:
    """Documents of one split.

    Attributes:
        documents: their tokens or features (N rows); None where the texts are all there is.
        labels: CSR [N, L].
        filter_pairs: int64 [n, 2], (document, label) never to be predicted.
    """

    name: str
    folder: Path
    documents: TokenStore | csr_matrix | None
    labels: csr_matrix
    filter_pairs: np.ndarray

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    @property
    def tokens(self) -> TokenStore:
        """The documents' tokens. InputError where the dataset holds bags of words."""
        if isinstance(self.documents, TokenStore):
            return self.documents
        raise no_tokens(self.folder, bags=self.documents is not None)

    @property
    def features(self) -> csr_matrix:
        """The documents' bags of words, CSR fp32 [N, V].

        Raises:
            InputError: Where the dataset holds tokens.
        """
        if isinstance(self.documents, csr_matrix):
            return self.documents
        got = "one of texts" if self.documents is None else "one of tokens"
        mend = "prepare it from a bag-of-words file with --source bow, or vectorise its texts"
        raise InputError(str(self.folder), "a dataset of bags of words", got, mend)

    def some_texts(self, numbers: Collection[int]) -> dict[int, str]:
        """Read the texts of a few documents, by number; none where the dataset keeps no texts."""
        path = self.folder / "texts.jsonl"
        if not path.is_file():
            return {}
        with path.open("rb") as file:
            return {
                number: parse_record(line, str, where=f"{path}:{number + 1}", mend=PREPARE_AGAIN)
                for number, line in enumerate(file)
                if number in numbers
            }

    @cached_property
    def texts(self) -> list[str]:
        """The documents' texts. InputError where the dataset was prepared without keeping them."""
        path = self.folder / "texts.jsonl"
        if not path.is_file():
            raise InputError(
                str(path),
                "the documents' texts",
                "no such file",
                "prepare the data with --keep-texts",
            )
        if (self.folder.parent / MANIFEST).is_file():  # here, for they are many bytes that few need
            manifest = read_manifest(self.folder.parent)
            name = f"{self.name}/{path.name}"
            _check_content(
                path,
                manifest["files"].get(name, {}),
                manifest.get("checksums", {}).get("files", {}).get(name),
            )
        lines = _read_text(path, "ascii").split("\n")[:-1]
        if len(lines) != len(self):
            raise InputError(str(path), f"{len(self)} lines", str(len(lines)), PREPARE_AGAIN)
        return [
            parse_record(line, str, where=f"{path}:{n}", mend=PREPARE_AGAIN)
            for n, line in enumerate(lines, 1)
        ]


class Dataset:
    """An opened dataset folder; token files are open, labels are in memory.

    Attributes:
        splits: `train` and, where prepared, `val` and `test`.
        label_tokens: tokens of the L label texts, or None.
        label_features: bags of words of the L label texts, CSR fp32 [L, V], or None.
        vocabulary: V of a dataset of bags of words; None for one of tokens.
        manifest: what manifest.json says.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        splits: dict[str, Split],
        label_tokens: TokenStore | None,
        label_features: csr_matrix | None = None,
    ) -> None:
        self.folder, self.manifest, self.splits = folder, manifest, splits
        self.label_tokens, self.label_features = label_tokens, label_features
        self.name: str = manifest["name"]
        self.num_labels: int = manifest["num_labels"]
        self.propensity: tuple[float, float] = (
            manifest["propensity"]["A"],
            manifest["propensity"]["B"],
        )
        self.content_hash: str = manifest["content_hash"]
        self.key: str = manifest["key"]
        self.vocabulary: int | None = manifest.get("vocabulary")

    def _tokenizer(self) -> dict[str, Any]:
        if self.manifest["tokenizer"] is None:
            raise no_tokens(self.folder, bags=self.vocabulary is not None)
        return dict(self.manifest["tokenizer"])

    @property
    def max_length(self) -> int:
        """Tokens of the longest text at most.

        Raises:
            InputError: Where the dataset holds bags of words, as the two below.
        """
        return int(self._tokenizer()["max_length"])

    @property
    def tokenizer_hash(self) -> str:
        """Hash of the tokenizer that made the tokens."""
        return str(self._tokenizer()["hash"])

    @property
    def tokenizer_folder(self) -> Path:
        """Where that tokenizer is."""
        self._tokenizer()
        return self.folder / "tokenizer"

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> Dataset:
        """Open a dataset folder and check that its files are whole.

        Sizes, row counts and checksums are compared with the manifest: those of texts when they are
        read, those of token files that were written before there was a fast one only with `verify`,
        which reads every file and compares its sha256.

        Raises:
            InputError: no dataset, another format version, a file missing, cut short or from
                another dataset.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        fast = manifest.get("checksums", {}).get("files", {})
        for name, facts in manifest["files"].items():
            _check_file(folder / name, facts, fast.get(name), verify)
        splits = {name: _open_split(folder, name, manifest) for name in manifest["splits"]}
        label_tokens = label_features = None
        if "label_tokens.bin" in manifest["files"]:
            label_tokens = _open_tokens(
                folder / "label_tokens.bin", manifest["num_labels"], manifest
            )
        if LABEL_FEATURES in manifest["files"]:
            label_features = _open_features(
                folder / LABEL_FEATURES, (manifest["num_labels"], manifest["vocabulary"])
            )
        return cls(folder, manifest, splits, label_tokens, label_features)

    @classmethod
    def from_texts(
        cls,
        folder: str | Path,
        train: Documents,
        *,
        validation: Documents | None = None,
        test: Documents | None = None,
        tokenizer: str | Path | Tokenizer | None = None,
        label_names: Sequence[str] | None = None,
        num_labels: int | None = None,
        max_length: int = 128,
        validation_share: float = 0.0,
        seed: int = 0,
        propensity: tuple[float, float] = (0.55, 1.5),
        keep_texts: bool = True,
        overwrite: bool = False,
    ) -> Dataset:
        """Make a dataset folder of texts and labels in memory, or open the one that holds them.

        Args:
            folder: where; made when it is not there.
            train: texts, and a list of labels for each: names, or ids that count from 0. Bags of
                words, a sparse matrix [N, V], may stand for the texts, and a sparse matrix [N, L]
                for the lists of labels.
            validation, test: the same.
            tokenizer: that of the encoder to train: a Hugging Face name, a folder or "minilm".
                None keeps the texts alone, which is all that a bag of words and the ranker read.
            label_names: names in the order of ids; by default those of the lists, sorted.
            num_labels: of ids without names; by default one more than the largest.
            max_length: tokens kept of each text.
            validation_share: share of the training documents, drawn by `seed`, that becomes the
                validation split.
            propensity: A and B of the propensity model (Jain et al. 2016).
            keep_texts: False saves the disk where a tokenizer has read the texts.
            overwrite: replace a dataset of other texts or settings that `folder` holds.

        Raises:
            InputError: texts or labels that cannot be used, or `folder` holds something else.
        """
        parts = {"train": train, "val": validation, "test": test}
        memory = Memory(
            {name: part for name, part in parts.items() if part is not None},
            tokenizer,
            label_names,
            num_labels,
            max_length,
            validation_share,
            seed,
            propensity,
            keep_texts,
        )
        path = Path(folder)
        return write(
            path, memory, opened=lambda: cls.open(path, verify=overwrite), overwrite=overwrite
        )

    @cached_property
    def label_names(self) -> list[str] | None:
        """Names of the L labels, or None where the dataset has none."""
        return self._per_label("label_names.txt")

    @cached_property
    def label_ids(self) -> list[str] | None:
        """Ids of the L labels, such as URIs, or None where their names are all there is."""
        return self._per_label(IDS)

    def _per_label(self, file: str) -> list[str] | None:
        if file not in self.manifest["files"]:
            return None
        path = self.folder / file
        names = _read_text(path, "utf-8").split("\n")[:-1]
        if len(names) != self.num_labels:
            raise InputError(
                str(path),
                f"{self.num_labels} lines, one for each label",
                str(len(names)),
                PREPARE_AGAIN,
            )
        return names


def no_tokens(folder: Path, *, bags: bool) -> InputError:
    """Return the error for tokens wanted of a dataset of bags of words, or of texts alone."""
    got = "one of bags of words" if bags else "one of texts alone"
    mend = "train with --encoder bow, or prepare the dataset from texts with --tokenizer"
    return InputError(str(folder), "a dataset of tokens", got, mend)


def _read_text(path: Path, encoding: str) -> str:
    try:
        return path.read_text(encoding=encoding)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            str(path), f"a text in {encoding.upper()}", str(error), PREPARE_AGAIN
        ) from None


def _check_file(path: Path, facts: Mapping[str, Any], fast: str | None, verify: bool) -> None:
    if not path.is_file():
        raise InputError(str(path), "a file the manifest names", "no such file", PREPARE_AGAIN)
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise InputError(
            str(path),
            f"{facts['bytes']} bytes, as the manifest says",
            f"{size} bytes",
            PREPARE_AGAIN,
        )
    if verify:
        _check_content(path, facts, None)
    elif path.suffix != ".jsonl" and (fast is not None or path.suffix != ".bin"):
        _check_content(path, facts, fast)


def _check_content(path: Path, facts: Mapping[str, Any], fast: str | None) -> None:
    """Compare the fast checksum or, where there is none, the sha256."""
    try:
        if fast is not None:
            compare(file_checksum(path), fast, str(path), PREPARE_AGAIN)
        elif "sha256" in facts:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != facts["sha256"]:
                raise InputError(str(path), f"sha256 {facts['sha256']}", digest, PREPARE_AGAIN)
    except OSError as error:
        raise InputError(
            str(path), "a file that can be read", str(error.strerror or error), PREPARE_AGAIN
        ) from None


def _open_tokens(path: Path, rows: int, manifest: Mapping[str, Any]) -> TokenStore:
    store = TokenStore.open(path)
    if len(store) != rows:
        raise InputError(str(path), f"{rows} rows", str(len(store)), PREPARE_AGAIN)
    if store.header.tokenizer_hash != manifest["tokenizer"]["hash"]:
        raise InputError(
            str(path), "tokens of the manifest's tokenizer", "tokens of another", PREPARE_AGAIN
        )
    return store


def _open_features(path: Path, shape: tuple[int, int]) -> csr_matrix:
    return read_npz(path, rows=shape[0], cols=shape[1])


def _open_split(folder: Path, name: str, manifest: Mapping[str, Any]) -> Split:
    documents, labels_count = manifest["splits"][name]["documents"], manifest["num_labels"]
    inside = folder / name
    labels = read_npz(inside / "labels.npz", rows=documents, cols=labels_count)
    pairs = read_npy(
        inside / "filter.npy",
        kinds="i",
        dtype=np.int64,
        shape=(None, 2),
        expected="int64 pairs [n, 2]",
        mend=PREPARE_AGAIN,
    )
    if pairs.size and (pairs.min() < 0 or (pairs.max(axis=0) >= labels.shape).any()):
        raise InputError(
            str(inside / "filter.npy"),
            f"pairs inside {labels.shape}",
            str(pairs.max(axis=0)),
            PREPARE_AGAIN,
        )
    found: TokenStore | csr_matrix | None = None
    if manifest.get("vocabulary") is not None:
        found = _open_features(inside / FEATURES, (documents, manifest["vocabulary"]))
    elif manifest["tokenizer"] is not None:
        found = _open_tokens(inside / "tokens.bin", documents, manifest)
    return Split(name, inside, found, labels, pairs)
