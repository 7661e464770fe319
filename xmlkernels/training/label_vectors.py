"""What a label tree is built from besides the dataset: features, vectors, an encoder of texts."""

import hashlib
import json

import numpy as np
import scipy.sparse
import torch

from xmlkernels.data.formats.arrays import read_npy
from xmlkernels.data.formats.matrices import read_npz
from xmlkernels.data.tokens import load_tokenizer
from xmlkernels.files import check_file
from xmlkernels.installed import source_of
from xmlkernels.nn.encoder import Encoder


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
        return vectors
