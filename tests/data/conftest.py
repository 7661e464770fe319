"""Fixtures of the data tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_tokenizer import make_tokenizer
from xmlkernels.data.tokens import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)
