"""A baseline for every model: nearest neighbours of TF-IDF vectors."""

import logging
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer

from xmlkernels.errors import InputError
from xmlkernels.terms import Terms
from xmlkernels.ticks import Ticks

log = logging.getLogger(__name__)

_BLOCK = 256  # texts whose similarities to all N training texts are held at once, sparse


class KNNBaseline:
    """Labels of the most similar training texts; N training texts, L labels.

    Features: words of letters and digits (`snake_case` is two), lower case, 1 + ln(tf), smoothed
    idf, unit length. A label's score is the sum of cosine similarity to the power `power` over
    those of the nearest training texts that carry it. The settings were chosen on the validation
    split of the built-in corpus.

    Args:
        train_texts: N texts.
        train_labels: [N, L]; non-zero is positive.

    Raises:
        InputError: texts and labels of different number, or not a word in all the texts.
    """

    def __init__(self, train_texts: Sequence[str], train_labels: csr_matrix) -> None:
        if len(train_texts) != train_labels.shape[0]:
            raise InputError(
                "train_labels",
                f"{len(train_texts)} rows, one per text",
                str(train_labels.shape[0]),
                "pass one split's",
            )
        self._vectorizer = TfidfVectorizer(
            analyzer=Terms(underscores=False), sublinear_tf=True, dtype=np.float32
        )
        try:
            ticks = Ticks(log, "neighbours, words of the training texts", len(train_texts), "texts")
            vectors = self._vectorizer.fit_transform(ticks.over(train_texts))
        except ValueError as error:
            raise InputError(
                "train_texts", "at least one word", "none", "pass texts with words"
            ) from error
        self._by_word = vectors.T.tocsr()
        self._labels = csr_matrix(train_labels != 0, dtype=np.float32)

    def nearest(self, texts: Sequence[str], count: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the most similar training texts of each text, the most similar first.

        Equally similar ones: the earlier first.

        Args:
            texts: B texts.
            count: training texts per text.

        Returns:
            similarity float32 [B, count], the cosine, and rows int64 [B, count]; 0 and -1 where
            fewer have a word of the text.
        """
        found = _largest((self._vectorizer.transform(texts) @ self._by_word).tocsr(), count)
        values = np.zeros((len(texts), count), np.float32)
        rows = np.full((len(texts), count), -1, np.int64)
        point, place = _places(found)
        rows[point, place], values[point, place] = found.indices, found.data
        return values, rows

    def predict(
        self,
        texts: Sequence[str],
        k: int,
        *,
        neighbours: int = 200,
        power: float = 3.0,
        apart: np.ndarray | None = None,
        share: bool = False,
        allow: np.ndarray | Sequence[np.ndarray | None] | None = None,
        exclude: np.ndarray | Sequence[np.ndarray | None] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the k best labels of each text, best first.

        Equally similar training texts: the earlier one is nearer. Equal scores: the lower label
        first. A text none of whose words the training texts have gets no label.

        Args:
            texts: B texts.
            k: labels per text.
            neighbours: training texts that vote.
            power: of the similarity that a neighbour votes with.
            apart: int64 [n, 2], pairs (text, training text) that are never neighbours: a text and
                itself.
            share: give each label's share of all votes, from 0 to 1, in place of their sum.
            allow: labels that may be given, int64 [A] of all texts, or an array or None for each;
                left out before the cut to k.
            exclude: labels that are never given, likewise.

        Returns:
            values float32 [B, k] and rows int64 [B, k]; -inf and -1 where fewer than k labels have
            a score.

        Raises:
            InputError: k, neighbours or power not above 0.
        """
        for name, value in (("k", k), ("neighbours", neighbours), ("power", power)):
            if not value > 0:
                raise InputError(name, "a number above 0", str(value), "ask for at least one")
        queries = self._vectorizer.transform(texts)
        barred = _pattern(apart, (len(texts), self._labels.shape[0]))
        values = np.full((len(texts), k), -np.inf, np.float32)
        rows = np.full((len(texts), k), -1, np.int64)
        ticks = Ticks(log, "neighbours", len(texts), "texts")
        for start in range(0, len(texts), _BLOCK):
            similar = (queries[start : start + _BLOCK] @ self._by_word).tocsr()
            if barred.nnz:
                similar -= similar.multiply(barred[start : start + _BLOCK])
                similar.eliminate_zeros()
            nearest = _largest(similar, neighbours)
            nearest.data **= power
            if share:
                of_row = np.asarray(nearest.sum(1)).ravel()
                nearest.data /= np.repeat(of_row, np.diff(nearest.indptr))
            votes = (nearest @ self._labels).tocsr()
            if allow is not None or exclude is not None:
                votes = _only(votes, start, allow, exclude)
            best = _largest(votes, k)
            point, place = _places(best)
            rows[start + point, place], values[start + point, place] = best.indices, best.data
            ticks.add(_BLOCK)
        return values, rows


def _only(
    votes: csr_matrix,
    first: int,
    allow: np.ndarray | Sequence[np.ndarray | None] | None,
    exclude: np.ndarray | Sequence[np.ndarray | None] | None,
) -> csr_matrix:
    """Leave the entries of [n, L] that may be given to the texts from number `first` on."""
    kept = np.ones(votes.nnz, np.bool_)
    for given, wanted in ((allow, True), (exclude, False)):
        for row in range(votes.shape[0]) if given is not None else ():
            own = given if isinstance(given, np.ndarray) else given[first + row]  # type: ignore[index]
            part = slice(votes.indptr[row], votes.indptr[row + 1])
            if own is not None:
                kept[part] &= np.isin(votes.indices[part], own) == wanted
    ends = np.concatenate([[0], np.cumsum(kept)])[votes.indptr]
    return csr_matrix((votes.data[kept], votes.indices[kept], ends), votes.shape)


def _pattern(pairs: np.ndarray | None, shape: tuple[int, int]) -> csr_matrix:
    """Matrix [B, N] with a 1 for each of the pairs [n, 2]."""
    if pairs is None:
        return csr_matrix(shape, dtype=np.float32)
    return csr_matrix((np.ones(len(pairs), np.float32), (pairs[:, 0], pairs[:, 1])), shape)


def _places(matrix: csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Row, and number within the row, of each stored entry."""
    count = np.diff(matrix.indptr)
    return np.repeat(np.arange(len(count)), count), np.arange(matrix.nnz) - np.repeat(
        matrix.indptr[:-1], count
    )


def _largest(matrix: csr_matrix, k: int) -> csr_matrix:
    """Return the k largest entries of each row, descending; of equals the lower column first."""
    kept: list[np.ndarray] = []
    for start, end in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
        data = matrix.data[start:end]
        # A common word makes a row nearly dense: the threshold first, then a sort of the few above
        # it and at it.
        above = (
            np.arange(len(data))
            if len(data) <= k
            else np.flatnonzero(data >= np.partition(data, -k)[-k])
        )
        kept.append(start + above[np.lexsort((matrix.indices[start + above], -data[above]))[:k]])
    order = np.concatenate([np.zeros(0, np.int64), *kept])
    ends = np.cumsum([0, *map(len, kept)])
    return csr_matrix((matrix.data[order], matrix.indices[order], ends), shape=matrix.shape)
