"""What a label tree is built from besides the dataset: features, vectors, an encoder of texts."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
import torch

from xmlkernels import InputError
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.formats.arrays import read_npy
from xmlkernels.data.formats.matrices import read_npz
from xmlkernels.data.tokens import load_tokenizer
from xmlkernels.files import check_file
from xmlkernels.installed import source_of
from xmlkernels.nn.encoder import Encoder
from xmlkernels.ticks import Ticks
from xmlkernels.tree.features import LabelFeatures

log = logging.getLogger(__name__)

# Features of the labels, and for the report features and labels of documents.
Found = tuple[LabelFeatures, scipy.sparse.csr_matrix | None, scipy.sparse.csr_matrix | None]


@dataclass
class SharedFeatures:
    """Features that trees of other seeds and depths have in common, computed for the first."""

    _settings: dict[str, Any] = field(default_factory=dict)
    _found: Found | None = None

    def of(self, settings: dict[str, Any], make: Callable[[], Found]) -> Found:
        """Return the features of a tree of these settings; `make` computes them where needed."""
        apart = {"key", "seed", "clusters"}
        needed = {name: settings[name] for name in settings.keys() - apart}
        if self._found is None or needed != self._settings:
            self._found = None  # before the next are made: never two at a time
            self._settings, self._found = needed, make()
        return self._found


def digest(path: str) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(check_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_features(path: str, documents: int) -> scipy.sparse.csr_matrix:
    """Read document features [N, V] of an .npz that scipy wrote.

    Raises:
        InputError: no such matrix, or not one row for each training document.
    """
    return read_npz(path, rows=documents)


def read_vectors(path: str, labels: int) -> np.ndarray:
    """Read label vectors, floats [labels, D], of an .npy.

    Raises:
        InputError: no such array, not one row for each label, or a value that is not finite.
    """
    expected = f"finite floats [{labels}, width]"
    mend = "pass one vector per label, written with numpy.save"
    return read_npy(
        path, kinds="f", shape=(labels, None), expected=expected, mend=mend, finite=True
    )


class LabelEncoder:
    """An encoder and its tokenizer; `hash` is that of their content."""

    def __init__(self, name: str, tokens: int = 64) -> None:
        source = source_of(name, "--label-text")
        self.tokenizer, self.tokens = load_tokenizer(source), tokens
        self.encoder = Encoder.from_pretrained(source).eval()
        digest = hashlib.sha256(f"{self.tokenizer.hash} {tokens}".encode())
        digest.update(json.dumps(self.encoder.encoder_config(), sort_keys=True).encode())
        for key, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(key.encode() + tensor.numpy().tobytes())
        self.hash = digest.hexdigest()

    def embed(self, texts: list[str], batch: int = 64) -> np.ndarray:
        """Encode texts: fp32 [len(texts), D]; those of like length share a batch."""
        rows = self.tokenizer.encode_batch(texts, self.tokens)
        order = np.argsort([len(row) for row in rows], kind="stable")
        vectors = np.empty((len(rows), self.encoder.width), np.float32)
        ticks = Ticks(log, "label texts encoded", len(rows), "labels")
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            ids = np.full(
                (len(some), max(len(rows[i]) for i in some)), self.tokenizer.pad_id, np.int64
            )
            mask = np.zeros_like(ids)
            for place, i in enumerate(some):
                ids[place, : len(rows[i])], mask[place, : len(rows[i])] = rows[i], 1
            with torch.inference_mode():
                vectors[some] = self.encoder(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
            ticks.add(len(some))
        return vectors


def label_vectors(dataset: Dataset, encoder: LabelEncoder | None, path: str) -> np.ndarray | None:
    """Embed the label texts of a dataset, or read the vectors of a file; None without either.

    Raises:
        InputError: a dataset without label texts, or a file as `read_vectors` refuses it.
    """
    if encoder is None:
        return read_vectors(path, dataset.num_labels) if path else None
    if dataset.label_names is None:
        raise InputError(
            "--label-text",
            "a dataset with label names",
            "none",
            "prepare it with --label-text or --label-names",
        )
    return encoder.embed(dataset.label_names)
