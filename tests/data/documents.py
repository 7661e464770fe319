"""Documents that know their number."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse import random as sparse_random

from xmlkernels.data.tokens import TokenStore, TokenWriter


@dataclass
class Documents:
    tokens: TokenStore
    labels: csr_matrix


def store(path: Path, rows: int, seed: int = 0, tokenizer_hash: str = "h") -> TokenStore:
    random = np.random.default_rng(seed)
    facts = {"tokenizer_hash": tokenizer_hash, "max_length": 40, "pad_id": 7}
    with TokenWriter(path, rows, vocab_size=500, **facts) as writer:
        writer.append([random.integers(8, 500, random.integers(2, 40)) for _ in range(rows)])
    return TokenStore.open(path)


def documents(tmp_path: Path, rows: int = 103, labels: int = 31) -> Documents:
    matrix = sparse_random(rows, labels, 0.1, "csr", rng=np.random.default_rng(1), dtype=np.float32)
    return Documents(store(tmp_path / "tokens.bin", rows), csr_matrix(matrix))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "xmlkernels-batches"]
