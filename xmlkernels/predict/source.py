"""Where the shortlists and features of a ranker come from, as its file says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, get_args

from xmlkernels.errors import InputError
from xmlkernels.predict.base import RANKER
from xmlkernels.ranker.blend import Reranker
from xmlkernels.records import Count, check_record

VECTORIZER, CLUSTERS = "vectorizer", "clusters"
Shortlist = Literal["model", "tree", "all"]
Words = Literal["same", "own", "features", "none"]
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


def ranker_identity(reranker: Reranker) -> str:
    """Identify a ranker by what it was made of: sha256 of its facts, settings and share."""
    ranker = reranker.ranker
    facts = {key: value for key, value in ranker.facts.items() if key != "weights"}
    told = [facts, asdict(ranker.settings), reranker.share, reranker.how]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def forest_identity(rerankers: Sequence[Reranker]) -> str:
    """Identify several rankers as one, whatever their order."""
    each = sorted(map(ranker_identity, rerankers))
    return hashlib.sha256(" ".join(each).encode()).hexdigest()


def read_source(reranker: Reranker, folder: Path, *, features: bool = False) -> Source:
    """Read the source of a ranker in a folder.

    Args:
        features: whether one of ready features is taken, which cannot be asked for texts.

    Raises:
        InputError: it does not say what it was made of, or it cannot be asked for texts.
    """
    where, facts = f"{folder / RANKER}, head, facts", reranker.ranker.facts
    if "source" not in facts:
        raise InputError(
            str(folder / RANKER), "a ranker that says what it was made of", "one without it", _AGAIN
        )
    values: Any = check_record(facts["source"], SourceValues, where=f"{where}.source", mend=_AGAIN)
    known = {f.name for f in fields(Source)}
    source = Source(**{key: value for key, value in values.items() if key in known})
    if source.words == "features" and not features:
        mend = "train one on texts, or score splits of its dataset with xmlkernels rank"
        raise InputError(
            str(folder),
            "a ranker of texts",
            "one of ready features, which nobody can make of a text",
            mend,
        )
    return source
