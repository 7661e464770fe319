"""Texts → TF-IDF bags of words (Salton, Buckley, 1988), by scikit-learn."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from safetensors.numpy import save
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer

from xmlkernels.data.batches.base import at_least
from xmlkernels.data.formats.arrays import read_tensors
from xmlkernels.errors import InputError
from xmlkernels.files import replacing
from xmlkernels.records import Positive, read_record
from xmlkernels.terms import VERSION, Terms
from xmlkernels.ticks import Ticks

log = logging.getLogger(__name__)

FORMAT = "xmlkernels-vocabulary"
_LATIN = r"(?u)\b\w+\b"  # the words of version 1, which split at spaces and signs alone
VOCABULARY, IDF = "vocabulary.json", "idf.safetensors"
MOST_BYTES = 1 << 30  # of vocabulary.json: words are many


class Vectorizer:
    """TF-IDF of words and of neighbouring words, from a vocabulary learnt of the training texts.

    Words of any script are those of `terms.Terms`.

    A value is (1 + ln tf) · (1 + ln((1 + N) / (1 + df))), each row of norm 1. Columns are in the
    order of their words, so equal texts give equal columns.

    Args:
        longest: words of the longest phrase: 2 takes single words and pairs.
        min_df: training texts that a word or phrase must occur in.
        max_features: V at most, the most frequent ones; None keeps all.
        sublinear: 1 + ln tf in place of tf.
        normalize: rows of norm 1; False leaves long texts heavier.

    Raises:
        InputError: a size out of range.
    """

    def __init__(
        self,
        *,
        longest: int = 2,
        min_df: int = 2,
        max_features: int | None = None,
        sublinear: bool = True,
        normalize: bool = True,
    ) -> None:
        at_least("longest", longest, 1)
        at_least("min_df", min_df, 1)
        at_least("max_features", 1 if max_features is None else max_features, 1)
        self.settings: dict[str, Any] = {
            "longest": longest,
            "min_df": min_df,
            "max_features": max_features,
            "sublinear": sublinear,
            "normalize": normalize,
        }
        self._version = VERSION
        self._inner = self._make()
        self._fitted = False

    def _make(self, words: list[str] | None = None) -> TfidfVectorizer:
        settings = self.settings
        choice: dict[str, Any] = (
            {"vocabulary": words}
            if words is not None
            else {key: settings[key] for key in ("min_df", "max_features")}
        )
        longest = settings["longest"]
        choice |= (
            {"token_pattern": _LATIN, "ngram_range": (1, longest)}
            if self._version == 1
            else {"analyzer": Terms(longest)}
        )
        return TfidfVectorizer(
            sublinear_tf=settings["sublinear"],
            norm="l2" if settings["normalize"] else None,
            dtype=np.float32,
            **choice,
        )

    def __len__(self) -> int:
        """V."""
        return len(self.idf)

    @property
    def words(self) -> list[str]:
        """The V words and phrases, in column order."""
        return [str(word) for word in self._ready().get_feature_names_out()]

    @property
    def idf(self) -> np.ndarray:
        """fp32 [V], weight of each column."""
        return np.asarray(self._ready().idf_, np.float32)

    @property
    def content_hash(self) -> str:
        """sha256 of everything that decides what a text becomes."""
        kind = [1, _LATIN] if self._version == 1 else [self._version]
        told = json.dumps([*kind, self.settings, self.words], sort_keys=True)
        return hashlib.sha256(told.encode() + self.idf.tobytes()).hexdigest()

    def _ready(self) -> TfidfVectorizer:
        if not self._fitted:
            raise InputError("vectorizer", "a vocabulary", "none yet", "call fit, or load one")
        return self._inner

    def fit(self, texts: Iterable[str]) -> csr_matrix:
        """Learn the vocabulary of the N training texts; returns their features, CSR fp32 [N, V].

        Raises:
            InputError: no word occurs in min_df texts, or an item is no string.
        """
        self._inner = self._make()
        try:
            found = self._inner.fit_transform(_strings(texts, "TF-IDF, the vocabulary"))
        except ValueError as error:
            mend = "choose a smaller min_df, or check the texts"
            raise InputError(
                "training texts",
                f"words in at least {self.settings['min_df']} texts",
                str(error),
                mend,
            ) from error
        self._fitted = True
        return csr_matrix(found)

    def transform(self, texts: Iterable[str]) -> csr_matrix:
        """Return the features of N texts, CSR fp32 [N, V], columns ascending.

        Words outside the vocabulary are left out.

        Raises:
            InputError: no vocabulary yet, one string instead of many, or an item that is no string.
        """
        inner, rows = self._ready(), list(_strings(texts))
        if not rows:  # scikit-learn refuses them
            return csr_matrix((0, len(self)), dtype=np.float32)
        ticks = Ticks(log, "TF-IDF", len(rows), "texts")
        found = csr_matrix(inner.transform(ticks.over(rows)))
        found.sort_indices()
        return found

    def save(self, folder: str | Path) -> None:
        """Write vocabulary.json and idf.safetensors into `folder`, made where it does not exist."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        head = {
            "format": FORMAT,
            "version": self._version,
            "hash": self.content_hash,
            "settings": self.settings,
            "words": self.words,
        }
        with replacing(folder / VOCABULARY) as file:
            file.write(json.dumps(head, ensure_ascii=False).encode())
        with replacing(folder / IDF) as file:
            file.write(save({"idf": self.idf}))

    @classmethod
    def load(cls, folder: str | Path) -> Vectorizer:
        """Load what `save` wrote; it gives the same features.

        Raises:
            InputError: a file is missing, of another format, damaged, or the two do not belong
                together.
        """
        folder, mend = Path(folder), "save the vocabulary again"
        kind = {"format": FORMAT}
        head: Any = read_record(
            folder / VOCABULARY, Head, mend=mend, kind=kind, most_bytes=MOST_BYTES
        )
        if head["version"] > VERSION:
            where, got = f"{folder / VOCABULARY}, version", str(head["version"])
            raise InputError(where, f"{VERSION} at most", got, "read it with a newer xmlkernels")
        _, found = read_tensors(folder / IDF, "the weights of a vocabulary", mend)
        idf, words = found.get("idf"), head["words"]
        if (
            idf is None
            or idf.dtype != np.float32
            or idf.shape != (len(words),)
            or not np.isfinite(idf).all()
        ):
            got = "none" if idf is None else f"{idf.dtype} {list(idf.shape)}"
            raise InputError(
                str(folder / IDF), f"{len(words)} finite float32, one for each word", got, mend
            )
        out = cls(**{key: head["settings"][key] for key in SettingsValues.__annotations__})
        out._version = head["version"]
        try:
            out._inner = out._make(words)
            out._inner.idf_ = idf
            out._fitted = True
            same = out.content_hash == head["hash"]
        except (TypeError, ValueError) as error:
            raise InputError(
                str(folder), "a vocabulary with its weights", str(error), mend
            ) from error
        if not same:
            raise InputError(
                str(folder), f"the content hash {head['hash']}", out.content_hash, mend
            )
        return out


class SettingsValues(TypedDict):
    """JSON of the settings of a `Vectorizer`."""

    longest: Positive
    min_df: Positive
    max_features: Positive | None
    sublinear: bool
    normalize: bool


class Head(TypedDict):
    """vocabulary.json."""

    version: Positive
    hash: str
    settings: SettingsValues
    words: list[str]


def _strings(texts: Iterable[str], what: str = "") -> Iterator[str]:
    """Yield texts, checked; of work that has a name it is told how far it is."""
    if isinstance(texts, str):
        raise InputError(
            "texts", "a list or other iterable of strings", "one string", "put it into a list"
        )
    if what:
        total = len(texts) if isinstance(texts, Sized) else None
        texts = Ticks(log, what, total, "texts").over(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {number}", "a string", type(text).__name__, "convert it first")
        yield text
