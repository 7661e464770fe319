"""The JSON of requests and answers, and how a request becomes a job."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from xmlkernels.errors import InputError
from xmlkernels.predict.base import Label, Text, TextPredictor
from xmlkernels.predict.calibration import Chosen
from xmlkernels.predict.limits import LabelNumbers
from xmlkernels.serve.batching import Job

Named = StrictInt | StrictStr  # a label's number or its name
Limit = list[Named] | list[list[Named] | None] | None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Document(BaseModel):
    """A document with parts, in place of one string.

    Where the texts of the training table were kept apart, its columns are keys.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, StrictStr]

    title: StrictStr = ""
    content: StrictStr = ""
    text: StrictStr | None = Field(None, description="in place of title and content")
    ranker_text: StrictStr | None = Field(
        None, description="for a ranker that was trained with --train-text beside a checkpoint"
    )


class Request(_Strict):
    """Texts to label."""

    texts: list[StrictStr | Document] = Field(min_length=1)
    k: StrictInt | None = Field(None, ge=1, description="labels per text; the server has a default")
    allow: Limit = Field(
        None, description="the only labels that may be given: one list, or a list or null per text"
    )
    exclude: Limit = Field(None, description="labels that are never given, likewise")
    threshold: Annotated[float, Field(ge=0, le=1)] | Chosen | None = Field(
        None,
        description="labels of a lower probability are left out; calibrated: below the score of "
        "their band that the calibration stored for its precision; f1: below its probability of "
        "the highest micro-F1",
    )
    order: Literal["score", "probability"] = Field(
        "score", description="probability: the best by score, ranked by calibrated probability"
    )
    propensity: float = Field(
        0.0,
        ge=0,
        le=1,
        description="above 0 rare labels rise: ranked by probability times inverse propensity to "
        "this power",
    )


class Answered(BaseModel):
    """One predicted label."""

    id: int
    name: str
    score: float = Field(description="log-odds")
    probability: float

    @classmethod
    def of(cls, label: Label) -> Answered:
        """Make it of a prediction."""
        return cls(id=label.id, name=label.name, score=label.score, probability=label.probability)


class Result(BaseModel):
    """The labels of one text, the best first."""

    labels: list[Answered]


class Response(BaseModel):
    """The results of a request, in the order of its texts."""

    results: list[Result]


class Mistake(BaseModel):
    """What was wrong, in one sentence."""

    error: str


class NeighboursRequest(_Strict):
    """A text whose nearest training documents are wanted."""

    text: StrictStr
    count: StrictInt = Field(5, ge=1, le=50)


class Neighbour(BaseModel):
    """One training document."""

    text: str = Field(description="its beginning")
    similarity: float = Field(description="cosine of TF-IDF, from 0 to 1")
    labels: list[str]


class NeighboursResponse(BaseModel):
    """The nearest training documents, the most similar first."""

    neighbours: list[Neighbour]
    reason: str = Field(description="why there is no search; empty where there is one")


def job_of(request: Request, predictor: TextPredictor, k: int, most: int, longest: int) -> Job:
    """Check a request and make a job of it.

    Args:
        request: its JSON.
        predictor: what is to answer.
        k: labels per text, where the request does not say.
        most: labels per text at most.
        longest: texts at most.

    Raises:
        InputError: more than that, or labels or texts that the model cannot take.
    """
    if len(request.texts) > longest:
        mend = "send several requests"
        raise InputError("texts", f"{longest} at most", str(len(request.texts)), mend)
    wanted = k if request.k is None else request.k
    if wanted > most:
        raise InputError("k", f"{most} at most", str(wanted), "ask for fewer labels")
    predictor.check_scale(request.threshold, request.order, request.propensity)
    texts = [text_of(x, predictor, f"texts[{n}]") for n, x in enumerate(request.texts)]
    numbers, count = predictor.numbers, len(texts)
    allow = _limits(request.allow, numbers, count, "allow")
    if allow is not None:
        empty = [n for n, own in enumerate(allow) if own is not None and not len(own)]
        if empty:
            mend = "leave it out where every label is allowed"
            raise InputError(f"allow of text {empty[0]}", "at least one label", "none", mend)
    exclude = _limits(request.exclude, numbers, count, "exclude")
    scale = request.threshold, request.order, request.propensity
    return Job(texts, wanted, allow, exclude, *scale)


def text_of(document: str | Document, predictor: TextPredictor, where: str) -> Text:
    """Return what the predictor reads of a document.

    Raises:
        InputError: a second text is missing, or is not read.
    """
    second = None if isinstance(document, str) else document.ranker_text
    columns = predictor.parts.columns
    given = {} if isinstance(document, str) else document.model_dump(exclude_unset=True)
    given = {key: value for key, value in given.items() if key != "ranker_text"}
    if isinstance(document, str):
        first = document
    elif document.model_extra or (columns and set(given) <= set(columns)):
        first = predictor.parts.of_record(given, where)
    elif document.text is not None:
        first = document.text
    else:
        first = predictor.parts.join(document.title, document.content)
    if predictor.takes_pairs != (second is not None):
        got, mend = "none", "give both, equal ones too"
        expected = '"ranker_text", the text of TF-IDF, beside "text"'
        if second is not None:
            expected, got, mend = 'no "ranker_text"', "one", "leave it out: this model reads none"
        raise InputError(where, expected, got, mend)
    return first if second is None else (first, second)


def _limits(
    given: Any, numbers: LabelNumbers, count: int, name: str
) -> list[np.ndarray | None] | None:
    if given is None:
        return None
    each = bool(given) and all(own is None or isinstance(own, list) for own in given)
    if not each:
        return [numbers.of(given, name)] * count
    if len(given) != count:
        mend = "give a list, or null, for each text"
        raise InputError(name, f"{count} lists, one per text", str(len(given)), mend)
    return [
        None if own is None else numbers.of(own, f"{name} of text {n}")
        for n, own in enumerate(given)
    ]
