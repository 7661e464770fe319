"""Predict labels of texts with a ranker.

    from xmlkernels import RankedPredictor

    predictor = RankedPredictor.load("runs/ranker", checkpoint="runs/demo")
    for labels in predictor.predict(["open a file and read its lines"], k=5):
        print([(label.name, round(label.probability, 3)) for label in labels])

Letters: N texts, L labels, D width of the embedding, V columns of TF-IDF.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from xmlkernels.checksums import check_files
from xmlkernels.data.inputs import read_parts
from xmlkernels.data.text_parts import TextParts
from xmlkernels.data.vectorizer import Vectorizer
from xmlkernels.errors import InputError
from xmlkernels.evaluation import score_matrix
from xmlkernels.predict.base import (
    RANKER,
    Text,
    TextPredictor,
    check_texts,
    read_ids,
    read_names,
)
from xmlkernels.predict.calibration import calibration_beside
from xmlkernels.predict.limits import FREE, Limit, Limits
from xmlkernels.predict.model import Predictor, files_beside
from xmlkernels.predict.source import (
    CLUSTERS,
    VECTORIZER,
    Source,
    ranker_identity,
    read_source,
)
from xmlkernels.ranker.blend import Reranker, best, best_of_all
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.matcher import ClusterMatcher
from xmlkernels.threads import check_threads

_NO_PAIRS = np.zeros((0, 2), np.int64)
_PAIRS = 1 << 22  # pairs (text, label) of an allow-list scored at one time


class Ranked(TextPredictor):
    """What one ranker and several have in common: a matrix of scores, of which they give the best.

    Texts are not read ahead.
    """

    @abstractmethod
    def scores(
        self,
        texts: Sequence[str],
        words: Sequence[str],
        k: int,
        *,
        batch_size: int = 64,
        limit: Limit = FREE,
    ) -> csr_matrix:
        """Score the shortlist of each text or, with an allow-list, every label of that.

        Args:
            texts: N ≥ 1, for the model.
            words: N, for TF-IDF.
            k: labels kept where every label is scored; a shortlist is given whole.
            batch_size: texts per pass of the model.
            limit: the labels that all these texts may have.

        Returns:
            CSR float [N, L] of log-odds.
        """

    def _in_order(
        self,
        texts: Iterable[Text],
        k: int,
        batch_size: int,
        window: int,
        prefetch: int,
        limits: Limits,
    ) -> Iterator[tuple[np.ndarray, ...]]:
        taken: dict[int, Limit] = {}
        source = iter(texts if limits.same is not None else limits.taking(texts, taken))
        count = 0
        while some := list(islice(source, batch_size * window)):
            read, words = self._apart(some, count)
            own = [limits.same or taken.pop(count + place) for place in range(len(some))]
            values = np.full((len(some), k), -np.inf, np.float32)
            rows = np.full((len(some), k), -1, np.int64)
            for limit in dict.fromkeys(own):
                at = np.flatnonzero([other is limit for other in own])
                values[at], rows[at] = self._limited(
                    [read[i] for i in at], [words[i] for i in at], k, batch_size, limit
                )
            yield from zip(values, rows, strict=True)
            count += len(some)

    def _limited(
        self, texts: list[str], words: list[str], k: int, batch_size: int, limit: Limit
    ) -> tuple[np.ndarray, np.ndarray]:
        """Give the k best labels of texts that have the same limit."""
        # Every label of an allow-list is scored: not for too many texts at once.
        each = 0 if limit.allow is None else len(limit.allow)
        step = min(len(texts), max(1, _PAIRS // max(1, each)))
        parts = []
        for first in range(0, len(texts), step):
            some = slice(first, first + step)
            scores = self.scores(texts[some], words[some], k, batch_size=batch_size, limit=limit)
            parts.append(best(scores, _NO_PAIRS, k))
        values, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
        if len(limit.exclude):
            # The shortlist may hold little else than what is excluded.
            short = np.flatnonzero((rows >= 0).sum(1) < min(k, limit.count(self.labels)))
            if len(short):
                values[short], rows[short] = self._limited(
                    [texts[i] for i in short],
                    [words[i] for i in short],
                    k,
                    batch_size,
                    limit.spelled_out(self.labels),
                )
        return values, rows

    def _apart(self, texts: Sequence[Text], first: int) -> tuple[list[str], list[str]]:
        """Separate what the model reads from what TF-IDF is made of.

        Args:
            texts: of one window.
            first: number of the first of them.
        """
        read, words = [], []
        for number, text in enumerate(texts, first):
            pair = isinstance(text, tuple)
            if pair != self.takes_pairs:
                of_two = "a pair of texts, for the model and for TF-IDF"
                expected = of_two if self.takes_pairs else "one text"
                got = "a pair" if pair else "one"
                mend = "give the texts that the ranker was trained on"
                raise InputError(f"text {number}", expected, got, mend)
            read.append(text[0] if isinstance(text, tuple) else text)
            words.append(text[1] if isinstance(text, tuple) else text)
        return read, words


class RankedPredictor(Ranked):
    """A ranker with everything that makes its shortlists and features.

    Args:
        reranker: the classifiers, the weights of their blocks of features and their share in the
            score.
        source: what it was made of; it decides which of the others are needed.
        model: for `source.shortlist` "model".
        matcher: for "tree".
        vectorizer: where there is TF-IDF.
        label_names: L names, or None.
        threads: CPU threads of the ranker; 0 leaves numba's choice. A model has its own number.
    """

    def __init__(
        self,
        reranker: Reranker,
        source: Source,
        *,
        model: Predictor | None = None,
        matcher: ClusterMatcher | None = None,
        vectorizer: Vectorizer | None = None,
        label_names: list[str] | None = None,
        threads: int = 0,
    ) -> None:
        self.reranker, self.source, self.model, self.matcher = reranker, source, model, matcher
        self.vectorizer, self.label_names, self.threads = vectorizer, label_names, threads
        self.labels = len(reranker.ranker.bias)
        self.takes_pairs = model is not None and source.words == "own"
        self.parts = TextParts() if model is None else model.parts

    @classmethod
    def load(
        cls,
        folder: str | Path,
        checkpoint: str | Path | None = None,
        *,
        which: str | None = None,
        device: str | torch.device = "cpu",
        threads: int = 0,
        features: bool = False,
    ) -> RankedPredictor:
        """Load the output folder of xmlkernels rank.

        Args:
            folder: the output folder.
            checkpoint: what it was made with: a run's output folder or the checkpoint folder in it;
                None where it was made without one.
            which, device: as of `Predictor.load`.
            threads: CPU threads of the ranker and of its model, whatever the rest of the process
                uses; 0 leaves the choice to numba and torch.
            features: take one of ready features, which `score_features` asks and texts cannot.

        Raises:
            InputError: no ranker there, a damaged one, one of ready features, another checkpoint
                than the ranker's, or a checkpoint for a ranker without one.
        """
        check_threads(threads)
        path = Path(folder)
        if not (path / RANKER).exists() and (path / "checkpoint").is_dir():
            mend = "give it as --checkpoint; xmlkernels.load takes either"
            raise InputError(str(folder), "the output folder of a ranker", "one of a run", mend)
        reranker = Reranker.load(path / RANKER)
        source = read_source(reranker, path, features=features)
        check_files(
            path,
            files_beside(reranker.ranker.facts, f"{path / RANKER}, head, facts", path),
            "copy the whole folder again",
        )
        vectorizer = matcher = model = None
        if source.words in ("same", "own"):
            vectorizer = Vectorizer.load(path / VECTORIZER)
            if vectorizer.content_hash != source.vectorizer:
                expected = f"the vocabulary {source.vectorizer[:12]} of this ranker"
                raise InputError(
                    str(path / VECTORIZER),
                    expected,
                    vectorizer.content_hash[:12],
                    "copy the whole folder again",
                )
        if source.shortlist == "tree":
            matcher = ClusterMatcher.load(path / CLUSTERS)
        if (source.shortlist == "model") != (checkpoint is not None):
            needs = (
                "the checkpoint that it was made with"
                if checkpoint is None
                else "no checkpoint: it was made without one"
            )
            raise InputError(
                str(path),
                needs,
                str(checkpoint or "none"),
                "name it" if checkpoint is None else "leave it out",
            )
        if checkpoint is not None:
            model = Predictor.load(checkpoint, which=which, device=device, threads=threads)
            if model.identity != source.checkpoint:
                expected = f"the checkpoint {source.checkpoint[:12]}, with which {path} was made"
                raise InputError(
                    str(checkpoint),
                    expected,
                    model.identity[:12],
                    "name that one, or train the ranker again",
                )
        names = read_names(path, len(reranker.ranker.bias))
        found = cls(
            reranker,
            source,
            model=model,
            matcher=matcher,
            vectorizer=vectorizer,
            label_names=names,
            threads=threads,
        )
        if model is None and (kept := reranker.ranker.facts.get("parts")) is not None:
            found.parts = read_parts(
                kept, f"{path / RANKER}, head, facts.parts", "train the ranker again"
            )
        found.folder, found.label_ids = path, read_ids(path, found.labels)
        found.calibration = calibration_beside(path, found.labels, ranker_identity(reranker))
        return found

    def scores(
        self,
        texts: Sequence[str],
        words: Sequence[str],
        k: int,
        *,
        batch_size: int = 64,
        limit: Limit = FREE,
    ) -> csr_matrix:
        """Score the shortlist of each text, or every label of an allow-list; see `Ranked.scores`.

        The labels of an allow-list are all on the shortlist, with the model's or their cluster's
        log-odds.
        """
        reranker = self.reranker
        if limit.allow is not None and not len(limit.allow):
            return csr_matrix((len(texts), self.labels), dtype=np.float32)
        logits = embedding = None
        if self.model is not None:
            listed = self.source.listed if limit.allow is None else len(limit.allow)
            how: dict[str, Any] = {"batch_size": batch_size, "allow": limit.allow}
            how["exclude"] = limit.exclude if len(limit.exclude) else None
            if reranker.ranker.dense.shape[1]:
                values, rows, embedding = self.model.predict_and_embed(texts, listed, **how)
            else:
                values, rows = self.model.predict_arrays(texts, listed, **how)
            logits = score_matrix(values, rows, self.labels)
        tfidf = (
            None
            if self.vectorizer is None
            else self.vectorizer.transform(map(self.parts.words, words))
        )
        return self._score(logits, reranker.features(embedding, tfidf), k, limit)

    def score_features(self, features: csr_matrix, k: int) -> csr_matrix:
        """Score the shortlist of each row of ready features [N, V]; see `Ranked.scores`."""
        return self._score(None, self.reranker.features(None, features), k)

    def _score(
        self, logits: csr_matrix | None, features: Features, k: int, limit: Limit = FREE
    ) -> csr_matrix:
        reranker = self.reranker
        if self.matcher is not None:
            logits = self._listed(self.matcher, features, limit)
        if logits is None:
            among = None if limit is FREE else limit.allowed(self.labels)
            return best_of_all(reranker.ranker, features, k, threads=self.threads, among=among)
        return reranker.mix(logits, reranker.ranker.score(features, logits, threads=self.threads))

    def _listed(self, matcher: ClusterMatcher, features: Features, limit: Limit) -> csr_matrix:
        """List labels by their clusters."""
        if limit.allow is not None:
            return matcher.shortlist_among(features, limit.allow, threads=self.threads)
        logits = matcher.shortlist(features, threads=self.threads)
        if len(limit.exclude):
            kept = np.ones(self.labels, np.bool_)
            kept[limit.exclude] = False
            place = kept[logits.indices]
            ends = np.concatenate([[0], np.cumsum(place)])[logits.indptr]
            logits = csr_matrix((logits.data[place], logits.indices[place], ends), logits.shape)
        return logits

    def embed(self, texts: Iterable[Text], *, batch_size: int = 64) -> np.ndarray:
        """Embed N texts by the model that the ranker was trained beside; see `TextPredictor`."""
        if self.model is None:
            mend = "load the run of a model, or a ranker with its checkpoint"
            raise InputError("embed", "a model", "a linear ranker, which has no embedding", mend)
        check_texts(texts)
        read, _ = self._apart(list(texts), 0)
        return self.model.embed(read, batch_size=batch_size)
