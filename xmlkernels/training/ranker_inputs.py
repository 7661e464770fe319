"""What a ranker is trained on: TF-IDF features, embeddings and shortlists of every split."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, identity, vstack

from xmlkernels import InputError
from xmlkernels.data.dataset import Dataset, Split
from xmlkernels.data.formats import iter_lines, read_npz, write_npz
from xmlkernels.data.formats.arrays import read_npy
from xmlkernels.data.inputs import BowInputs, check_dataset
from xmlkernels.data.vectorizer import Vectorizer
from xmlkernels.devices import find_device
from xmlkernels.evaluation import predict_and_embed_split, predict_split, score_matrix
from xmlkernels.files import replacing
from xmlkernels.predict.model import Predictor, checkpoint_identity
from xmlkernels.predict.source import VECTORIZER
from xmlkernels.ranker.features import Features
from xmlkernels.training.folder import read_json, write_json
from xmlkernels.training.ranker_config import RankerConfig

log = logging.getLogger(__name__)

NONE = Features(np.zeros((0, 0), np.float32), csr_matrix((0, 0), dtype=np.float32))


@dataclass
class Documents:
    """A split as the ranker reads it.

    Attributes:
        tfidf: CSR float32 [N, V], or None.
        embedding: float32 [N, D], or None.
        shortlist: CSR float32 [N, L] of the plain model's logits; None where every label is scored.
        features: both blocks of features together.
    """

    split: Split
    tfidf: csr_matrix | None = None
    embedding: np.ndarray | None = None
    shortlist: csr_matrix | None = None
    features: Features = NONE


@dataclass(frozen=True)
class TrainingPart:
    """What classifiers are trained on: documents, and behind them perhaps the labels' own texts.

    Attributes:
        features: of N documents.
        labels: [N, L] sparse; stored non-zeros are positives.
    """

    features: Features
    labels: csr_matrix

    def with_labels(self, own: Features) -> TrainingPart:
        """Append the labels' texts, each a document of its own label alone: [N + L] documents."""
        each = identity(self.labels.shape[1], self.labels.dtype, format="csr")
        sparse = csr_matrix(vstack([self.features.sparse, own.sparse], "csr"))
        dense = np.concatenate([self.features.dense, own.dense])
        labels = csr_matrix(vstack([self.labels, each], "csr"))
        return TrainingPart(Features(dense, sparse), labels)

    def listed(self, shortlist: csr_matrix) -> csr_matrix:
        """Give documents behind those of a shortlist [n, columns] an empty one: [N, columns].

        A label's text is no negative of the labels that a model would list for it: nobody has said
        that it is none of theirs.
        """
        more = self.labels.shape[0] - shortlist.shape[0]
        ends = np.concatenate([shortlist.indptr, np.full(more, shortlist.nnz)])
        shape = (self.labels.shape[0], shortlist.shape[1])
        return csr_matrix((shortlist.data, shortlist.indices, ends), shape)


def label_texts(dataset: Dataset) -> list[str]:
    """Return the labels' texts.

    Raises:
        InputError: the dataset has none.
    """
    if dataset.label_names is None:
        raise InputError(
            "--label-text",
            "a dataset with label texts",
            "one without",
            "prepare it with --label-text",
        )
    return dataset.label_names


def read_features(folder: str, dataset: Dataset) -> dict[str, csr_matrix]:
    """Read {train,val,test}.npz of a folder; without one take the dataset's own bags of words.

    Raises:
        InputError: a file is missing, of other rows than the split, or of other columns than
            train.npz.
    """
    if not folder:
        log.info("the dataset's bags of words are the features, as they are: no TF-IDF is computed")
        return {name: split.features for name, split in dataset.splits.items()}
    columns: int | None = None
    found = {}
    for name, split in dataset.splits.items():
        found[name] = read_npz(Path(folder) / f"{name}.npz", rows=len(split), cols=columns)
        columns = found["train"].shape[1] if "train" in found else None
    return found


@dataclass
class Words:
    """TF-IDF that several rankers of one dataset have in common, computed with the first of them.

    Attributes:
        vectorizer: with the vocabulary of the training texts; None before there is one.
        found: CSR float32 [N, V] of each split.
        labels: CSR float32 [L, V] of the label texts; None before they are asked for.
    """

    vectorizer: Vectorizer | None = None
    found: dict[str, csr_matrix] = field(default_factory=dict)
    labels: csr_matrix | None = None


def vectorize(
    texts: dict[str, str],
    dataset: Dataset,
    settings: dict[str, Any],
    folder: Path,
    words: Words,
) -> tuple[dict[str, csr_matrix], str]:
    """Compute TF-IDF of the splits' texts.

    Args:
        texts: a file per split, with one document per line; empty takes the texts kept in the
            dataset.
        settings: of the Vectorizer.
        folder: for the vocabulary of the training texts.
        words: what a ranker of the same texts and settings left, or an empty one to be filled.

    Returns:
        The features by split, and the content hash of the vocabulary.

    Raises:
        InputError: no texts, or not as many as the split has documents.
    """
    if words.vectorizer is None:
        vectorizer = Vectorizer(**settings)
        train = dataset.splits["train"]
        words.found["train"] = _rows(vectorizer.fit(_texts(texts, train)), train, texts)
        for name, split in dataset.splits.items():
            if name != "train":
                found = vectorizer.transform(_texts(texts, split))
                words.found[name] = _rows(found, split, texts)
        words.vectorizer = vectorizer
    words.vectorizer.save(folder)
    return words.found, words.vectorizer.content_hash


def training_part(
    options: RankerConfig, dataset: Dataset, first: Documents, folder: Path, words: Words
) -> TrainingPart:
    """Return what the classifiers are trained on: the documents, and label texts where asked for.

    Raises:
        InputError: the dataset has no label texts, and they are asked for.
    """
    if not options.label_text:
        return TrainingPart(first.features, first.split.labels)
    if dataset.vocabulary is not None:
        words.labels = dataset.label_features
        if words.labels is None:
            where, mend = str(dataset.folder), "leave --label-text out"
            raise InputError(where, "bags of words of the label texts, too", "none", mend)
    if words.labels is None:
        words.labels = Vectorizer.load(folder / VECTORIZER).transform(label_texts(dataset))
    names = words.labels.shape[0]
    own_features = Features.join(None, words.labels, tfidf_weight=options.tfidf_weight)
    log.info(f"{names:,} label texts, each a document of its label")
    return TrainingPart(first.features, first.split.labels).with_labels(own_features)


def _texts(texts: dict[str, str], split: Split) -> Iterable[str]:
    return iter_lines(texts[split.name], documents=True) if texts else split.texts


def _rows(features: csr_matrix, split: Split, texts: dict[str, str]) -> csr_matrix:
    if features.shape[0] != len(split):
        where = texts[split.name]
        raise InputError(
            where,
            f"{len(split)} lines, the documents of {split.name}",
            str(features.shape[0]),
            "name its texts",
        )
    return features


def model_inputs(
    checkpoint: str,
    dataset: Dataset,
    documents: dict[str, Documents],
    k: int,
    folder: Path,
    device: str,
    *,
    embedding: bool = True,
    vocabulary: str = "",
) -> str:
    """Compute shortlist and embedding of every split by a trained model, into `documents`.

    They are kept in `folder` (embedding of each split as .npy, shortlist as .npz) and read from
    there when checkpoint, dataset and k are the same.

    Args:
        k: labels of a shortlist.
        embedding: False computes none, and takes none that is kept.
        vocabulary: content hash of the one that the documents' TF-IDF has: a bag of words of the
            same one takes that.

    Returns:
        The checkpoint's identity.

    Raises:
        InputError: no such checkpoint, or one of a model that does not know the dataset.
    """
    key = {"checkpoint": checkpoint_identity(checkpoint), "dataset": dataset.content_hash, "k": k}
    kept = folder / "inputs.json"
    if read_kept(folder, key, dataset, documents, embedding=embedding):
        log.info(f"embeddings and shortlists of this checkpoint are taken from {folder}/")
        return str(key["checkpoint"])
    predictor = Predictor.load(checkpoint, device=find_device(device))
    model, inputs = predictor.model, predictor.inputs
    check_dataset(dataset, predictor.labels, inputs)
    if isinstance(inputs, BowInputs) and vocabulary and inputs.config()["vocabulary"] == vocabulary:
        ready = {name: part.tfidf for name, part in documents.items() if part.tfidf is not None}
        inputs = BowInputs(None, inputs.vectorizer, ready, parts=inputs.parts)
    folder.mkdir(parents=True, exist_ok=True)
    kept.unlink(missing_ok=True)
    for name, part in documents.items():
        vectors = folder / f"embeddings_{name}.npy"
        if embedding:
            values, rows, part.embedding = predict_and_embed_split(
                model, part.split, k, inputs=inputs
            )
            with replacing(vectors) as file:
                np.save(file, part.embedding)
        else:
            vectors.unlink(missing_ok=True)  # of another checkpoint
            values, rows = predict_split(model, part.split, k, inputs=inputs)
        part.shortlist = score_matrix(values, rows, dataset.num_labels)
        write_npz(folder / f"shortlist_{name}.npz", part.shortlist, keep_zeros=True)
        log.info(f"{name}: {len(part.split):,} documents {'embedded' if embedding else 'listed'}")
    # The run may have gone on since it was asked for its checkpoint: what counts is the one that
    # was read.
    write_json(kept, key | {"checkpoint": predictor.identity, "embedding": embedding})
    return predictor.identity


def read_kept(
    folder: Path,
    key: dict[str, Any],
    dataset: Dataset,
    documents: dict[str, Documents],
    *,
    embedding: bool,
) -> bool:
    """Read kept shortlists of this key, and embeddings where asked for, into `documents`.

    They are a cache: damaged ones are logged, and count as none.

    Returns:
        Whether there were any.
    """
    if not (folder / "inputs.json").exists():
        return False
    try:
        told = read_json(folder / "inputs.json")
        whole = told.pop("embedding", True)  # older ones were always kept with embeddings
        if told != key or (embedding and not whole):
            return False
        for name, part in documents.items():
            if embedding:
                part.embedding = read_embedding(folder / f"embeddings_{name}.npy", len(part.split))
            path = folder / f"shortlist_{name}.npz"
            part.shortlist = read_npz(
                path, rows=len(part.split), cols=dataset.num_labels, keep_zeros=True
            )
    except InputError as error:
        log.info(
            f"note: {error.where}: expected {error.expected}, got {error.got}; embeddings and "
            "shortlists are computed anew"
        )
        return False
    return True


def read_embedding(path: Path, rows: int) -> np.ndarray:
    """Read the embeddings of an .npy file: float32 [rows, D].

    Raises:
        InputError: it is missing, damaged, not finite or of another number of rows.
    """
    expected, mend = f"finite float32 embeddings of {rows} documents", "compute them again"
    return read_npy(
        path,
        kinds="f",
        dtype=np.float32,
        shape=(rows, None),
        expected=expected,
        mend=mend,
        finite=True,
    )


def without_pairs(shortlist: csr_matrix, pairs: np.ndarray) -> csr_matrix:
    """Remove from a shortlist the pairs [n, 2] of (document, label) that must not be predicted."""
    if not len(pairs):
        return shortlist
    labels = shortlist.shape[1]
    rows = np.repeat(np.arange(shortlist.shape[0], dtype=np.int64), np.diff(shortlist.indptr))
    left = ~np.isin(rows * labels + shortlist.indices, pairs[:, 0] * labels + pairs[:, 1])
    ends = np.concatenate([[0], np.cumsum(left)])[shortlist.indptr]
    return csr_matrix((shortlist.data[left], shortlist.indices[left], ends), shortlist.shape)
