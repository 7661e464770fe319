"""A linear ranker: one sparse classifier per label.

Each is trained on the documents whose shortlist holds the label.

ranker = fit(features, labels, shortlist, Settings(loss="squared_hinge"))
margins = ranker.score(test_features, test_shortlist)      # CSR [N, L]: a margin for every pair of
the shortlist ranker.save("ranker.safetensors")

Letters: N documents, L labels, D width of the embedding, V columns of TF-IDF.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
from safetensors.numpy import save
from scipy.sparse import csr_matrix

from xmlkernels.checksums import ALGORITHM, check_seal, seal
from xmlkernels.data.formats.arrays import read_tensors
from xmlkernels.data.formats.matrices import check_shape
from xmlkernels.data.formats.stored_matrix import compressed
from xmlkernels.errors import InputError
from xmlkernels.files import replacing
from xmlkernels.parallel import in_parallel, keep_compiled
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.solve import keep, score, solve
from xmlkernels.records import Count, parse_record
from xmlkernels.ticks import Ticks

log = logging.getLogger(__name__)

FORMAT = "xmlkernels-ranker 1"
_BLOCK_BYTES = 1 << 28  # dense weights of the labels in training at one time
_PAIRS = 1 << 14  # pairs (text, label) whose scores are worth a thread
_TENSORS = {
    "dense": (np.float32, 2),
    "bias": (np.float32, 1),
    "indptr": (np.int64, 1),
    "indices": (np.int32, 1),
    "data": (np.float32, 1),
}


class SettingsValues(TypedDict, total=False):
    """JSON of `Settings`; those that an older ranker lacks are the defaults."""

    loss: str
    cost: float
    positive_weight: float
    bias: float
    tolerance: float
    epochs: Count
    negatives: Count
    prune: float
    seed: Count


class Head(TypedDict):
    """JSON in the header of a ranker's file."""

    columns: Count
    settings: SettingsValues
    facts: dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How each label's classifier is trained.

    Attributes:
        loss: squared_hinge (hinge of the margin, squared) or logistic.
        cost: C, the weight of a document's loss against ½‖w‖².
        positive_weight: of a positive's cost against a negative's.
        bias: the constant feature; 0 does without.
        tolerance: training of a label ends when no document's projected gradient is larger: for the
            squared hinge the spread of them, for the logistic loss the largest.
        epochs: most passes over a label's documents.
        negatives: random documents, up to this many, besides the shortlisted ones.
        prune: TF-IDF weights of this size and smaller become 0. The embedding's weights stay, for
            they are few and dense.
        seed: of the order of visits and of the random documents.

    Raises:
        InputError: a value out of range.
    """

    loss: Literal["squared_hinge", "logistic"] = "squared_hinge"
    cost: float = 1.0
    positive_weight: float = 1.0
    bias: float = 1.0
    tolerance: float = 0.1
    epochs: int = 20
    negatives: int = 0
    prune: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in ("squared_hinge", "logistic"):
            raise InputError(
                "loss", "squared_hinge or logistic", repr(self.loss), "choose one of them"
            )
        for name in ("cost", "positive_weight", "tolerance"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(
                    name, "a finite number above 0", repr(getattr(self, name)), "choose another"
                )
        for name in ("bias", "prune", "negatives"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(
                    name, "a finite number from 0", repr(getattr(self, name)), "choose another"
                )
        if self.epochs < 1:
            raise InputError(
                "epochs", "1 or more", repr(self.epochs), "train for at least one pass"
            )
        if not 0 <= self.seed < 2**63:
            raise InputError(
                "seed", "an integer from 0 to 2**63 - 1", repr(self.seed), "choose another"
            )


@dataclass(frozen=True)
class LinearRanker:
    """Classifiers of L labels; the margin of label l is w_l·x + bias_l.

    Attributes:
        dense: float32 [L, D], weights of the embedding.
        sparse: float32 CSR [L, V], weights of TF-IDF.
        bias: float32 [L].
        settings: what trained it.
        facts: JSON values to keep with the ranker.
    """

    dense: np.ndarray
    sparse: csr_matrix
    bias: np.ndarray
    settings: Settings
    facts: dict[str, Any] = field(default_factory=dict)

    def score(self, features: Features, shortlist: csr_matrix, *, threads: int = 0) -> csr_matrix:
        """Return the margin of every stored pair of a shortlist [N, L], whatever its value.

        float32 CSR of the same pattern.

        Raises:
            InputError: features of other widths than those of the training, or a shortlist of
                another shape.
        """
        labels = len(self.bias)
        check_shape(
            (self.dense.shape[1], self.sparse.shape[1]),
            *features.widths,
            "features: width and TF-IDF columns",
        )
        check_shape(shortlist.shape, len(features), labels, "shortlist")
        pairs = shortlist.tocsr()
        place = csr_matrix((np.arange(pairs.nnz), pairs.indices, pairs.indptr), pairs.shape).tocsc()
        out = np.empty(pairs.nnz, np.float32)
        columns, ordered = self.sparse.shape[1], bool(self.sparse.has_sorted_indices)
        weights = (self.dense, *arrays_of(self.sparse), columns, ordered)
        listed = (place.indptr.astype(np.int64), place.indices.astype(np.int64), place.data)
        # Each piece makes a full row of V zeros: not one for each label, and one for a few texts.
        step = max(1, -(-labels // min(64, 1 + pairs.nnz // _PAIRS)))
        keep_compiled(score)
        in_parallel(
            lambda a, b: score(a, b, weights, self.bias, _inputs(features), listed, out),
            labels,
            step,
            threads,
        )
        return csr_matrix((out, pairs.indices, pairs.indptr), pairs.shape)

    def as_sparse(self) -> csr_matrix:
        """Both blocks of weights as one, float32 CSR [L, D + V]."""
        return Features(self.dense, self.sparse).as_sparse()

    def log_probability(self, margins: np.ndarray) -> np.ndarray:
        """Return the log of the probability of a label for margins of any shape; float64.

        Logistic: ln σ(m). Squared hinge: -max(0, 1 - m)², the loss of a positive (as PECOS has it).
        """
        margins = np.asarray(margins, np.float64)
        if self.settings.loss == "logistic":
            return np.asarray(-np.logaddexp(0, -margins))
        return np.asarray(-np.square(np.maximum(0, 1 - margins)))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all.

        Settings and facts are JSON in its header.
        """
        indptr, indices, data = arrays_of(self.sparse)
        tensors = dict(zip(_TENSORS, (self.dense, self.bias, indptr, indices, data), strict=True))
        told = {
            "format": FORMAT,
            "settings": asdict(self.settings),
            "facts": self.facts,
            "columns": self.sparse.shape[1],
        }
        head = {"ranker": json.dumps(told)}
        with replacing(path) as file:
            file.write(save(tensors, head | {ALGORITHM: seal(tensors, head)}))

    @classmethod
    def load(cls, path: str | Path) -> LinearRanker:
        """Load what `save` wrote.

        Raises:
            InputError: no such file, or not a ranker, or a damaged one.
        """
        name, mend = str(path), "train the ranker again"
        head, found = read_tensors(path, "a ranker's file", mend)
        check_seal(head, found, {"ranker"}, name, mend)
        where = f"{name}, head"
        told: Any = parse_record(
            head.get("ranker", ""), Head, where=where, mend=mend, kind={"format": FORMAT}
        )
        for key, (kind, dimensions) in _TENSORS.items():
            if key not in found or found[key].dtype != kind or found[key].ndim != dimensions:
                got = f"{found[key].dtype} {list(found[key].shape)}" if key in found else "none"
                raise InputError(
                    f"{name}, {key}", f"{np.dtype(kind)} of {dimensions} dimensions", got, mend
                )
            if kind == np.float32 and not np.isfinite(found[key]).all():
                raise InputError(f"{name}, {key}", "finite weights", "a NaN or an infinity", mend)
        shape = (len(found["bias"]), told["columns"])
        if len(found["dense"]) != shape[0]:
            raise InputError(
                f"{name}, dense", f"{shape[0]} rows, as bias has", str(len(found["dense"])), mend
            )
        sparse = compressed(
            {key: found[key] for key in ("data", "indices", "indptr")}, shape, name, mend
        )
        known = {f.name for f in fields(Settings)}
        try:
            settings = Settings(
                **{key: value for key, value in told["settings"].items() if key in known}
            )
        except InputError as error:
            raise InputError(
                f"{where}, settings.{error.where}", error.expected, error.got, mend
            ) from None
        return cls(found["dense"], sparse, found["bias"], settings, told["facts"])


def fit(
    features: Features,
    labels: csr_matrix,
    shortlist: csr_matrix | None = None,
    settings: Settings | None = None,
    *,
    threads: int = 0,
    facts: dict[str, Any] | None = None,
) -> LinearRanker:
    """Trains every label on its positives and on the documents whose shortlist holds it.

    A label without a document of either kind gets no weights: its margin is 0.

    Args:
        features: of N training documents.
        labels: [N, L] sparse; stored non-zeros are positives.
        shortlist: [N, L] sparse; every stored pair counts, whatever its value. None trains each
            label on every document (one-vs-all).
        settings: the defaults when not given.
        threads: of numba; 0 leaves its number. The result does not depend on it.
        facts: JSON values to keep with the ranker.

    Raises:
        InputError: matrices of other shapes.
    """
    settings = settings or Settings()
    n = len(features)
    check_shape(labels.shape, n, None, "labels")
    positives = transposed(labels, drop_zeros=True)
    listed = (np.zeros(0, np.int64), np.zeros(0, np.int32))
    if shortlist is not None:
        check_shape(shortlist.shape, n, labels.shape[1], "shortlist")
        listed = transposed(shortlist)
    dense, sparse, bias = _blocks(features, positives, listed, settings, threads)
    return LinearRanker(dense, sparse, bias, settings, facts or {})


Arrays = tuple[np.ndarray, np.ndarray]


def _blocks(
    features: Features, positives: Arrays, listed: Arrays, settings: Settings, threads: int
) -> tuple[np.ndarray, csr_matrix, np.ndarray]:
    """Weights of all labels, trained a block at a time so that few full rows of V weights exist."""
    count, (width, columns) = len(positives[0]) - 1, features.widths
    squares = np.einsum("nd,nd->n", features.dense, features.dense)
    squares += np.asarray(features.sparse.multiply(features.sparse).sum(1)).ravel()
    how = (
        settings.loss == "logistic",
        float(settings.cost),
        float(settings.positive_weight),
        float(settings.bias),
        float(settings.tolerance),
        settings.epochs,
        settings.negatives,
    )
    x = _inputs(features)
    dense, bias = np.zeros((count, width), np.float32), np.zeros(count, np.float32)
    # The heaviest labels first, so that no thread is left with one at the end.
    work = np.diff(positives[0]) + (np.diff(listed[0]) if len(listed[0]) else 0)
    order = np.argsort(-work, kind="stable")
    size = max(1, min(1024, _BLOCK_BYTES // (8 * max(1, width + columns))))
    kept, rows = np.zeros(count, np.int64), []
    keep_compiled(solve, keep)
    ticks = Ticks(log, "classifiers", count, "labels")
    for first in range(0, count, size):
        part = order[first : first + size]
        block = np.zeros((len(part), width + columns), np.float32)
        places = np.empty((len(part), columns), np.int32)
        constant = np.zeros(len(part))
        passes = np.zeros(len(part), np.int64)
        held = np.zeros(len(part), np.int64)

        def train(a: int, b: int) -> None:
            solve(
                a,
                b,
                part,
                listed,
                positives,
                squares,
                x,
                how,
                settings.seed,
                block,
                constant,
                passes,
            )
            keep(a, b, block, width, settings.prune, held, places)

        in_parallel(train, len(part), 4, threads)
        dense[part], bias[part], kept[part] = block[:, :width], constant * settings.bias, held
        chosen = np.arange(columns) < held[:, None]
        rows.append((places[chosen], block[:, width:][chosen]))
        ticks.add(len(part))
    return dense, _in_label_order(order, kept, rows, columns), bias


def _in_label_order(
    order: np.ndarray, kept: np.ndarray, rows: list[Arrays], columns: int
) -> csr_matrix:
    """Build CSR [L, V] from the blocks' columns and weights, which are in training order."""
    parts = [
        np.concatenate([np.zeros(0, kind), *(row[n] for row in rows)])
        for n, kind in ((0, np.int32), (1, np.float32))
    ]
    pointers = np.concatenate([[0], np.cumsum(kept[order])])
    stacked = csr_matrix((parts[1], parts[0], pointers), (len(order), columns))
    return stacked[np.argsort(order)] if len(order) else stacked


def transposed(matrix: csr_matrix, *, drop_zeros: bool = False) -> Arrays:
    """Return (indptr, indices) of the pattern of matrix.T in CSR, indices ascending."""
    csr = matrix.tocsr()
    pattern = csr_matrix((np.ones(csr.nnz, np.int8), csr.indices, csr.indptr), csr.shape)
    if drop_zeros:
        pattern.data = (csr.data != 0).astype(np.int8)
        pattern = pattern.copy()
        pattern.eliminate_zeros()
    turned = pattern.tocsc()
    turned.sort_indices()
    return turned.indptr.astype(np.int64), turned.indices.astype(np.int32, copy=False)


def arrays_of(matrix: csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return indptr int64, indices int32, data float32: one set of types, compiled once."""
    return (
        matrix.indptr.astype(np.int64, copy=False),
        matrix.indices.astype(np.int32, copy=False),
        matrix.data.astype(np.float32, copy=False),
    )


def _inputs(features: Features) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return (features.dense, *arrays_of(features.sparse))
