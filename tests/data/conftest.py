"""Fixtures of the data tests."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from raw_sets import text_files
from tiny_tokenizer import make_tokenizer
from xmlkernels.data.formats import sparse_python, sparse_text
from xmlkernels.data.prepare import PrepareConfig
from xmlkernels.data.tokens import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def config(tmp_path: Path, tokenizer_folder: Path) -> PrepareConfig:
    files = text_files(tmp_path / "raw")
    return PrepareConfig(tmp_path / "out" / "small", str(tokenizer_folder), 5, **files)  # type: ignore[arg-type]


@pytest.fixture
def write(tmp_path):
    def write_file(content, name="trn_X.txt"):
        path = tmp_path / name
        content = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write_file


@pytest.fixture(params=["native", "python"])
def parser(request, monkeypatch):
    chosen = sparse_python.parse_sparse
    if request.param == "native":
        chosen = pytest.importorskip(
            "xmlkernels._host", reason="the native library is not built"
        ).parse_sparse
    monkeypatch.setattr(sparse_text, "_parser", lambda: chosen)
    return request.param


@pytest.fixture
def write_rows(tmp_path):
    def write_file(content, name="trn_X_Y.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file
