"""What an encoder takes of documents: batches of a split to train, of raw texts to serve."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NotRequired, Protocol, TypedDict

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.data.batches.bags import BagBatch, BagBatches, bag_text_batches
from xmlkernels.data.batches.tokens import Batch, Batches, text_batches
from xmlkernels.data.dataset import Dataset, Split
from xmlkernels.data.text_parts import TextParts
from xmlkernels.data.tokens import Tokenizer, load_tokenizer
from xmlkernels.data.vectorizer import Vectorizer
from xmlkernels.errors import InputError
from xmlkernels.records import Positive, check_record


class Inputs(Protocol):
    """One way of reading documents; the encoder that was trained with it must be served with it."""

    parts: TextParts

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        label_text: bool = False,
        order: np.ndarray | None = None,
        ancestors: Sequence[np.ndarray] = (),
    ) -> Batches | BagBatches:
        """Batches of a split.

        Args:
            seed, shuffle: see `Batches`.
            label_text: add the labels' own texts as documents.
            order: int64 [L], label id of each table row; None where rows are label ids.
            ancestors: the cluster of each table row, int64 [L], one array for each level of
                clusters.
        """

    def text_batches(
        self, texts: Iterable[str], batch_size: int, *, window: int = 1, prefetch: int = 2
    ) -> Iterator[Batch] | Iterator[BagBatch]:
        """Batch raw texts, read as they are used; see `batches.tokens.text_batches`."""

    def check(self, dataset: Dataset) -> None:
        """InputError where the documents of a dataset cannot be read this way."""

    def save(self, folder: Path) -> None:
        """Write next to a checkpoint what `load_inputs` reads."""

    def config(self) -> dict[str, Any]:
        """JSON for the state of a checkpoint."""


class TokenInputs:
    """Tokens of a transformer's tokenizer.

    Args:
        dataset: where the labels' own texts are taken from; None for serving alone.
        tokenizer: the encoder's.
        max_length: tokens per text.
        parts: of its texts; those of the dataset when not given.
    """

    def __init__(
        self,
        dataset: Dataset | None,
        tokenizer: Tokenizer,
        max_length: int,
        *,
        parts: TextParts | None = None,
    ) -> None:
        self.dataset, self.tokenizer, self.max_length = dataset, tokenizer, max_length
        self.parts = TextParts.of(dataset) if parts is None else parts

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        label_text: bool = False,
        order: np.ndarray | None = None,
        ancestors: Sequence[np.ndarray] = (),
    ) -> Batches:
        """Batch the split's tokens; see `Inputs.batches`."""
        label_tokens = (
            self.dataset.label_tokens if label_text and self.dataset is not None else None
        )
        if label_text and label_tokens is None:
            raise InputError(
                "--label-text",
                "a dataset with label texts",
                "one without",
                "prepare it with --label-text",
            )
        arranged: dict[str, Any] = {} if order is None else {"order": order, "ancestors": ancestors}
        return Batches(
            split, batch_size, seed=seed, shuffle=shuffle, label_tokens=label_tokens, **arranged
        )

    def text_batches(
        self, texts: Iterable[str], batch_size: int, *, window: int = 1, prefetch: int = 2
    ) -> Iterator[Batch]:
        """Batch raw texts, tokenised; see `Inputs.text_batches`."""
        return text_batches(
            map(self.parts.plain, texts),
            self.tokenizer,
            self.max_length,
            batch_size,
            bucket_window=window,
            prefetch=prefetch,
        )

    def check(self, dataset: Dataset) -> None:
        """Refuse a dataset made by another tokenizer; see `Inputs.check`."""
        if self.tokenizer.hash != dataset.tokenizer_hash:
            mend = "prepare it with the tokenizer beside the checkpoint"
            raise InputError(
                str(dataset.folder), "tokens of the model's tokenizer", "those of another", mend
            )

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files; see `Inputs.save`."""
        self.tokenizer.save(folder / "tokenizer")

    def config(self) -> dict[str, Any]:
        """Return the settings that a checkpoint keeps; see `Inputs.config`."""
        return {"kind": "tokens", "max_length": self.max_length} | kept_parts(self.parts)


class BowInputs:
    """Bags of words: TF-IDF of a text's words, or a dataset's own features.

    The vocabulary is learnt from the training texts.

    Args:
        dataset: where the labels' own texts (their names) are taken from; None for serving alone.
        vectorizer: fitted; None for a dataset of bags of words, whose columns nobody can make from
            a text.
        features: of splits that are vectorised already, by name; others are vectorised on first use
            and kept.
        columns: V of a model that is served without vectorizer and without dataset.
        parts: of its texts; those of the dataset when not given.
    """

    def __init__(
        self,
        dataset: Dataset | None,
        vectorizer: Vectorizer | None,
        features: Mapping[str, csr_matrix] | None = None,
        *,
        columns: int = 0,
        parts: TextParts | None = None,
    ) -> None:
        self.dataset, self.vectorizer, self._features = dataset, vectorizer, dict(features or {})
        # The texts of a dataset are kept without the separator of its tokenizer.
        self.parts = replace(TextParts.of(dataset), separator=" ") if parts is None else parts
        self._columns = columns

    @property
    def vocabulary(self) -> int:
        """V."""
        if self.vectorizer is not None:
            return len(self.vectorizer)
        return self._columns if self.dataset is None else int(self.dataset.vocabulary or 0)

    @classmethod
    def fitted(cls, dataset: Dataset, vectorizer: Vectorizer) -> BowInputs:
        """Learns the vocabulary of the dataset's training texts.

        Raises:
            InputError: the dataset was prepared without its texts, or no word is frequent enough.
        """
        return cls(dataset, vectorizer, {"train": vectorizer.fit(dataset.splits["train"].texts)})

    def features(self, split: Split) -> csr_matrix:
        """Return the features of a split, CSR fp32 [N, V].

        Raises:
            InputError: Where the dataset was prepared without keeping texts.
        """
        if self.vectorizer is None:
            return split.features
        if split.name not in self._features:
            self._features[split.name] = self.vectorizer.transform(split.texts)
        return self._features[split.name]

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        label_text: bool = False,
        order: np.ndarray | None = None,
        ancestors: Sequence[np.ndarray] = (),
    ) -> BagBatches:
        """Batch the split's features; see `Inputs.batches`."""
        own = self.label_features() if label_text else None
        if label_text and own is None:
            raise InputError(
                "--label-text",
                "a dataset with label texts",
                "one without",
                "prepare it with --label-text",
            )
        return BagBatches(
            self.features(split),
            split.labels,
            batch_size,
            seed=seed,
            shuffle=shuffle,
            order=order,
            ancestors=ancestors,
            label_features=own,
        )

    def label_features(self) -> csr_matrix | None:
        """CSR fp32 [L, V] of the labels' own texts, or None where the dataset has none."""
        if self.dataset is None or self.vectorizer is None:
            return None if self.dataset is None else self.dataset.label_features
        return (
            None
            if self.dataset.label_names is None
            else self.vectorizer.transform(self.dataset.label_names)
        )

    def text_batches(
        self, texts: Iterable[str], batch_size: int, *, window: int = 1, prefetch: int = 2
    ) -> Iterator[BagBatch]:
        """Batch raw texts, vectorised; see `Inputs.text_batches`."""
        if self.vectorizer is None:
            mend = "predict splits of its dataset, or train on a dataset of texts"
            raise InputError(
                "texts", "a model with a vocabulary", "one trained on a bag-of-words file", mend
            )
        return bag_text_batches(
            texts, self.vectorizer, batch_size, window=window, prefetch=prefetch
        )

    def check(self, dataset: Dataset) -> None:
        """Refuse a dataset with other features; see `Inputs.check`."""
        where, found = str(dataset.folder), dataset.vocabulary
        if self.vectorizer is not None and found is not None:
            got = "one of bags of words, which are of another vocabulary"
            raise InputError(
                where,
                "a dataset of texts, for the model's own vocabulary",
                got,
                "prepare it from the texts",
            )
        if self.vectorizer is None and found != self.vocabulary:
            got = "one of texts" if found is None else f"{found:,} columns"
            expected = f"bags of words of {self.vocabulary:,} columns, as the model was trained on"
            raise InputError(
                where, expected, got, "prepare it from the bag-of-words files of that dataset"
            )

    def save(self, folder: Path) -> None:
        """Write the vocabulary; see `Inputs.save`."""
        if self.vectorizer is not None:
            self.vectorizer.save(folder / "vocabulary")

    def config(self) -> dict[str, Any]:
        """Return the settings that a checkpoint keeps; see `Inputs.config`."""
        return {
            "kind": "bow",
            "vocabulary": self.vectorizer and self.vectorizer.content_hash,
        } | kept_parts(self.parts)


def kept_parts(parts: TextParts) -> dict[str, Any]:
    """Return what a checkpoint says of text parts.

    Nothing where they are the usual ones, as before there were others.
    """
    if parts == TextParts():
        return {}
    # Older versions read what has no columns.
    return {"parts": {k: v for k, v in asdict(parts).items() if k != "columns" or v}}


def check_dataset(dataset: Dataset, labels: int, inputs: Inputs) -> None:
    """Refuses a dataset that a trained model does not know.

    Args:
        labels: L of the model.
        inputs: of the model, as `load_inputs` gives them. Of bags of words without a vocabulary the
            number of columns is all that is known.

    Raises:
        InputError: another number of labels, another tokenizer, or words that are not the model's.
    """
    if dataset.num_labels != labels:
        got, mend = f"{dataset.num_labels:,}", "name the dataset that the model was trained on"
        raise InputError(str(dataset.folder), f"{labels:,} labels, as the model has", got, mend)
    inputs.check(dataset)


class _Kind(TypedDict):
    kind: str


class _Tokens(TypedDict):
    max_length: Positive


class _Words(TypedDict):
    vocabulary: str | None


class _Parts(TypedDict):
    fields: NotRequired[Literal["all", "title", "body"]]
    separator: NotRequired[str]
    marked: NotRequired[bool]
    columns: NotRequired[list[str]]


def read_parts(value: Any, where: str, mend: str) -> TextParts:
    """Return the text parts that `kept_parts` has kept."""
    check_record(value, _Parts, where=where, mend=mend)
    if more := sorted(value.keys() - _Parts.__annotations__.keys()):
        raise InputError(where, "keys that this version knows", repr(more[0]), mend)
    return TextParts(**value | {"columns": tuple(value.get("columns", ()))})


def load_inputs(folder: Path, state: Mapping[str, Any]) -> Inputs:
    """Load the inputs of a trained model, for serving.

    Args:
        folder: where `save` wrote.
        state: of a checkpoint, with `config()` as its `inputs`; older ones hold `max_length` alone.

    Raises:
        InputError: a kind that this version does not know, files missing, or a vocabulary of
            another model.
    """
    config: Any = state.get("inputs") or {"kind": "tokens", "max_length": state.get("max_length")}
    where = "checkpoint, $.inputs"
    mend = "read it with a newer xmlkernels, or use another checkpoint"
    kind = check_record(config, _Kind, where=where, mend=mend)["kind"]
    parts = read_parts(config.get("parts", {}), f"{where}.parts", mend)
    if kind == "tokens":
        longest = check_record(config, _Tokens, where=where, mend=mend)["max_length"]
        return TokenInputs(None, load_tokenizer(folder / "tokenizer"), longest, parts=parts)
    if kind != "bow":
        raise InputError(
            "checkpoint",
            "inputs of kind tokens or bow",
            repr(kind),
            "read it with a newer xmlkernels",
        )
    if check_record(config, _Words, where=where, mend=mend)["vocabulary"] is None:
        return BowInputs(None, None, columns=state["model"]["encoder"]["vocabulary"])
    vectorizer = Vectorizer.load(folder / "vocabulary")
    if vectorizer.content_hash != config["vocabulary"]:
        expected = f"the vocabulary {config['vocabulary'][:12]} of this checkpoint"
        raise InputError(
            str(folder / "vocabulary"),
            expected,
            vectorizer.content_hash[:12],
            "copy the whole folder again",
        )
    return BowInputs(None, vectorizer, parts=parts)
