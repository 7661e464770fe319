"""Predict labels of texts with a ranker, or with several as one.

    from xmlkernels import RankedPredictor

    predictor = RankedPredictor.load("runs/ranker", checkpoint="runs/demo")
    for labels in predictor.predict(["open a file and read its lines"], k=5):
        print([(label.name, round(label.probability, 3)) for label in labels])

Letters: N texts, L labels, D width of the embedding, V columns of TF-IDF.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, get_args

import numpy as np
import torch
from scipy.sparse import csr_matrix

from xmlkernels.checksums import check_files
from xmlkernels.data.text_parts import TextParts
from xmlkernels.data.vectorizer import Vectorizer
from xmlkernels.errors import InputError
from xmlkernels.evaluation import score_matrix
from xmlkernels.predict.base import RANKER, Text, TextPredictor, read_names
from xmlkernels.predict.model import Predictor, files_beside
from xmlkernels.ranker.blend import Reranker, best, best_of_all, combine
from xmlkernels.ranker.matcher import ClusterMatcher
from xmlkernels.records import Count, check_record
from xmlkernels.threads import check_threads

VECTORIZER, CLUSTERS = "vectorizer", "clusters"
Shortlist = Literal["model", "tree", "all"]
Words = Literal["same", "own", "features", "none"]
_NO_PAIRS = np.zeros((0, 2), np.int64)
_AGAIN = "train the ranker again"


class SourceValues(TypedDict):
    """JSON of a `Source`."""

    shortlist: str
    words: str
    checkpoint: NotRequired[str]
    listed: NotRequired[Count]
    vectorizer: NotRequired[str]


@dataclass(frozen=True)
class Source:
    """Where a ranker's shortlists and features come from; `source` among the facts of its file.

    Attributes:
        shortlist: the best labels of a trained model, those of a tree's kept clusters, or all.
        words: the texts of TF-IDF: the same as the model's, texts of its own, ready features in
            their place, or no TF-IDF.
        checkpoint: the model's `checkpoint_identity`; "" where there is no model.
        listed: labels that the model lists per text; 0 where there is no model.
        vectorizer: content hash of the vocabulary; "" where there is none.

    Raises:
        InputError: a word that is none of these.
    """

    shortlist: Shortlist
    words: Words
    checkpoint: str = ""
    listed: int = 0
    vectorizer: str = ""

    def __post_init__(self) -> None:
        for name, kind in (("shortlist", Shortlist), ("words", Words)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(
                    name, f"one of {', '.join(get_args(kind))}", repr(getattr(self, name)), _AGAIN
                )


class Ranked(TextPredictor):
    """What one ranker and several have in common: a matrix of scores, of which they give the best.

    Texts are not read ahead.
    """

    @abstractmethod
    def scores(
        self, texts: Sequence[str], words: Sequence[str], k: int, *, batch_size: int = 64
    ) -> csr_matrix:
        """Score the shortlist of each text.

        Args:
            texts: N ≥ 1, for the model.
            words: N, for TF-IDF.
            k: labels kept where every label is scored; a shortlist is given whole.
            batch_size: texts per pass of the model.

        Returns:
            CSR float [N, L] of log-odds.
        """

    def _in_order(
        self, texts: Iterable[Text], k: int, batch_size: int, window: int, prefetch: int
    ) -> Iterator[tuple[np.ndarray, ...]]:
        source, count = iter(texts), 0
        while some := list(islice(source, batch_size * window)):
            read, words = self._apart(some, count)
            values, rows = best(self.scores(read, words, k, batch_size=batch_size), _NO_PAIRS, k)
            yield from zip(values.astype(np.float32), rows, strict=True)
            count += len(some)

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
    ) -> RankedPredictor:
        """Load the output folder of xmlkernels rank.

        Args:
            folder: the output folder.
            checkpoint: what it was made with: a run's output folder or the checkpoint folder in it;
                None where it was made without one.
            which, device: as of `Predictor.load`.
            threads: CPU threads of the ranker and of its model, whatever the rest of the process
                uses; 0 leaves the choice to numba and torch.

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
        source = _source(reranker, path)
        check_files(
            path,
            files_beside(reranker.ranker.facts, f"{path / RANKER}, head, facts"),
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
        return cls(
            reranker,
            source,
            model=model,
            matcher=matcher,
            vectorizer=vectorizer,
            label_names=names,
            threads=threads,
        )

    def scores(
        self, texts: Sequence[str], words: Sequence[str], k: int, *, batch_size: int = 64
    ) -> csr_matrix:
        """Score the shortlist of each text; see `Ranked.scores`."""
        reranker = self.reranker
        logits = embedding = None
        if self.model is not None and reranker.ranker.dense.shape[1]:
            values, rows, embedding = self.model.predict_and_embed(
                texts, self.source.listed, batch_size=batch_size
            )
            logits = score_matrix(values, rows, self.labels)
        elif self.model is not None:
            logits = score_matrix(
                *self.model.predict_arrays(texts, self.source.listed, batch_size=batch_size),
                self.labels,
            )
        tfidf = (
            None
            if self.vectorizer is None
            else self.vectorizer.transform(map(self.parts.words, words))
        )
        features = reranker.features(embedding, tfidf)
        if self.matcher is not None:
            logits = self.matcher.shortlist(features, threads=self.threads)
        if logits is None:
            return best_of_all(reranker.ranker, features, k, threads=self.threads)
        return reranker.mix(logits, reranker.ranker.score(features, logits, threads=self.threads))


class Forest(Ranked):
    """Several rankers as one: the mean of their probabilities, given as log-odds.

    A label that a shortlist lacks has probability 0. Log-odds keep labels apart whose probabilities
    all round to 0 or to 1.

    Source: Prabhu et al., "Parabel" (WWW 2018), section 4: an ensemble of label trees.

    Args:
        rankers: one or more, of the same labels.

    Raises:
        InputError: none, rankers of different labels, or some of single texts and some of pairs.
    """

    def __init__(self, rankers: Sequence[RankedPredictor]) -> None:
        kinds = {(ranker.labels, ranker.takes_pairs) for ranker in rankers}
        if len(kinds) != 1:
            got = " and ".join(
                f"{labels:,} labels of {'pairs' if pairs else 'texts'}"
                for labels, pairs in sorted(kinds)
            )
            raise InputError(
                "rankers",
                "rankers of the same labels and texts",
                got or "none",
                "train them on one dataset",
            )
        self.rankers, self.label_names = tuple(rankers), rankers[0].label_names
        self.labels, self.takes_pairs = rankers[0].labels, rankers[0].takes_pairs
        self.parts = rankers[0].parts

    def scores(
        self, texts: Sequence[str], words: Sequence[str], k: int, *, batch_size: int = 64
    ) -> csr_matrix:
        """Score what is on any ranker's shortlist; see `Ranked.scores`."""
        parts = [ranker.scores(texts, words, k, batch_size=batch_size) for ranker in self.rankers]
        return combine(
            parts,
            [part.data.astype(np.float64) for part in parts],
            [1.0] * len(parts),
            "probability",
        )


def _source(reranker: Reranker, folder: Path) -> Source:
    where, facts = f"{folder / RANKER}, head, facts", reranker.ranker.facts
    if "source" not in facts:
        raise InputError(
            str(folder / RANKER), "a ranker that says what it was made of", "one without it", _AGAIN
        )
    values: Any = check_record(facts["source"], SourceValues, where=f"{where}.source", mend=_AGAIN)
    known = {f.name for f in fields(Source)}
    source = Source(**{key: value for key, value in values.items() if key in known})
    if source.words == "features":
        mend = "train one on texts, or score splits of its dataset with xmlkernels rank"
        raise InputError(
            str(folder),
            "a ranker of texts",
            "one of ready features, which nobody can make of a text",
            mend,
        )
    return source
