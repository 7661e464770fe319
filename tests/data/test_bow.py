"""TF-IDF features against their formula; saving and loading; batches of raw texts."""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xmlkernels.data.batches.bags import bag_text_batches
from xmlkernels.data.vectorizer import IDF, VOCABULARY, Vectorizer
from xmlkernels.errors import InputError

TEXTS = [
    "Vitamin C in fresh fruit",
    "fresh fruit and fresh vegetables",
    "regulation of the fruit market, the market of vegetables",
    "the market regulation: vitamin c",
    "état de l'art",
]


def grams(text: str, longest: int) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return [
        " ".join(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1)
    ]


def expected(
    texts: list[str], longest: int, min_df: int, sublinear: bool, normalize: bool
) -> tuple[list[str], np.ndarray]:
    counts = [Counter(grams(text, longest)) for text in texts]
    df = Counter(word for count in counts for word in count)
    words = sorted(word for word in df if df[word] >= min_df)
    rows = []
    for count in counts:
        tf = [
            (1 + math.log(count[w]) if sublinear else count[w]) if count[w] else 0.0 for w in words
        ]
        row = np.array(
            [
                t * (1 + math.log((1 + len(texts)) / (1 + df[w])))
                for t, w in zip(tf, words, strict=True)
            ]
        )
        rows.append(row / (np.linalg.norm(row) or 1.0) if normalize else row)
    return words, np.array(rows)


@pytest.mark.parametrize("longest", [1, 2, 3])
@pytest.mark.parametrize(
    ("min_df", "sublinear", "normalize"), [(1, True, True), (2, True, False), (2, False, True)]
)
def test_values_of_the_formula(longest: int, min_df: int, sublinear: bool, normalize: bool) -> None:
    vectorizer = Vectorizer(
        longest=longest, min_df=min_df, sublinear=sublinear, normalize=normalize
    )
    found = vectorizer.fit(iter(TEXTS))
    words, values = expected(TEXTS, longest, min_df, sublinear, normalize)
    assert vectorizer.words == words and len(vectorizer) == len(words)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.toarray(), values, rtol=1e-6)
    again = vectorizer.transform(TEXTS)
    np.testing.assert_array_equal(again.toarray(), found.toarray())
    assert again.has_sorted_indices


def test_unknown_words_and_single_letters() -> None:
    vectorizer = Vectorizer()
    vectorizer.fit(TEXTS)
    assert "c" in vectorizer.words
    assert "vitamin c" in vectorizer.words
    assert "état" not in vectorizer.words
    assert vectorizer.transform(["nothing known", ""]).nnz == 0
    assert vectorizer.transform([]).shape == (0, len(vectorizer))


def test_the_most_frequent_words_alone() -> None:
    vectorizer = Vectorizer(max_features=3, min_df=1)
    vectorizer.fit(TEXTS)
    assert vectorizer.words == ["fresh", "fruit", "the"]


def test_saved_and_loaded(tmp_path: Path) -> None:
    vectorizer = Vectorizer(max_features=20)
    vectorizer.fit(TEXTS)
    vectorizer.save(tmp_path / "new" / "words")
    assert sorted(path.name for path in (tmp_path / "new" / "words").iterdir()) == [IDF, VOCABULARY]
    loaded = Vectorizer.load(tmp_path / "new" / "words")
    assert loaded.settings == vectorizer.settings and loaded.words == vectorizer.words
    np.testing.assert_array_equal(loaded.idf, vectorizer.idf)
    texts = [*TEXTS, "fresh vitamin", "état"]
    np.testing.assert_array_equal(
        loaded.transform(texts).toarray(), vectorizer.transform(texts).toarray()
    )
    assert loaded.content_hash == vectorizer.content_hash
    loaded.save(tmp_path / "again")
    for name in (VOCABULARY, IDF):
        assert (tmp_path / "again" / name).read_bytes() == (
            tmp_path / "new" / "words" / name
        ).read_bytes()
    other = Vectorizer(max_features=20)
    other.fit(TEXTS[:4])
    assert other.content_hash != loaded.content_hash


def damaged(folder: Path, kind: str) -> None:
    path = folder / VOCABULARY
    head: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if kind == "missing":
        (folder / IDF).unlink()
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif kind == "tensors":
        (folder / IDF).write_bytes((folder / IDF).read_bytes()[:-5])
    else:
        change = {
            "version": {"version": 9},
            "words": {"words": [*head["words"][1:], "elsewhere"]},
            "short": {"words": head["words"][1:]},
            "settings": {"settings": {"wrong": 1}},
        }[kind]
        path.write_text(json.dumps(head | change), encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "idf.safetensors: expected a file, got no file of that name"),
        ("cut", "vocabulary.json: expected JSON, got Unterminated string"),
        (
            "tensors",
            "idf.safetensors: expected the weights of a vocabulary, got one that cannot be read",
        ),
        ("version", "vocabulary.json, version: expected 2 at most, got 9; read it with a newer"),
        ("words", "content hash"),
        ("short", r"expected \d+ finite float32, one for each word, got float32"),
        ("settings", r"\$.settings: expected a key 'longest', got none"),
    ],
)
def test_damaged_files(tmp_path: Path, kind: str, message: str) -> None:
    vectorizer = Vectorizer()
    vectorizer.fit(TEXTS)
    vectorizer.save(tmp_path)
    damaged(tmp_path, kind)
    with pytest.raises(InputError, match=message):
        Vectorizer.load(tmp_path)


def test_what_cannot_be_vectorised() -> None:
    with pytest.raises(InputError, match="vectorizer: expected a vocabulary, got none yet"):
        Vectorizer().transform(["a"])
    with pytest.raises(InputError, match="words in at least 2 texts"):
        Vectorizer().fit(["one", "two"])
    with pytest.raises(InputError, match="one string"):
        Vectorizer().fit("one")
    with pytest.raises(InputError, match="text 1: expected a string, got int"):
        Vectorizer(min_df=1).fit(["one", 2])  # type: ignore[list-item]
    for options in ({"longest": 0}, {"min_df": 0}, {"max_features": 0}):
        with pytest.raises(InputError, match="at least 1"):
            Vectorizer(**options)  # type: ignore[arg-type]


@pytest.fixture
def vectorizer() -> Vectorizer:
    out = Vectorizer(min_df=1)
    out.fit(TEXTS)
    return out


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_texts_in_order(vectorizer: Vectorizer, window: int, prefetch: int) -> None:
    texts = [*TEXTS, "", "unknown"] * 3
    found = list(bag_text_batches(iter(texts), vectorizer, 4, window=window, prefetch=prefetch))
    assert [len(batch) for batch in found] == [4] * 5 + [1]
    assert torch.cat([batch.index for batch in found]).tolist() == list(range(21))
    features = vectorizer.transform(texts)
    for batch in found:
        assert batch.labels == 0
        assert batch.levels == ()
        assert batch.pos_row.numel() == batch.pos_sample.numel() == 0
        for place, number in enumerate(batch.index.tolist()):
            here = slice(int(batch.offset[place]), int(batch.offset[place + 1]))
            assert batch.token[here].tolist() == features[number].indices.tolist()
            assert batch.token_weight[here].tolist() == features[number].data.tolist()
    assert [thread for thread in threading.enumerate() if thread.name == "xmlkernels-batches"] == []


def test_texts_that_are_none(vectorizer: Vectorizer) -> None:
    assert list(bag_text_batches([], vectorizer, 4)) == []
    with pytest.raises(InputError, match="one string"):
        bag_text_batches("w1", vectorizer, 4)
    with pytest.raises(InputError, match="text 6: expected a string, got int"):
        list(bag_text_batches(["w1"] * 6 + [3], vectorizer, 4))  # type: ignore[list-item]
    for options in ({"batch_size": 0}, {"window": 0}, {"prefetch": -1}):
        with pytest.raises(InputError, match=next(iter(options))):
            bag_text_batches(["w1"], vectorizer, **({"batch_size": 4} | options))  # type: ignore[arg-type]
