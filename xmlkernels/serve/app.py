"""The application: its routes, its mistakes in one sentence, its pages."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from xmlkernels import __version__
from xmlkernels.errors import InputError
from xmlkernels.predict.base import TextPredictor
from xmlkernels.serve import messages
from xmlkernels.serve.annif import NoProject, annif_router
from xmlkernels.serve.batching import Batcher, ModelFailed
from xmlkernels.serve.gate import Gate
from xmlkernels.serve.measures import Measures
from xmlkernels.serve.why import Neighbours


@dataclass(frozen=True)
class Settings:
    """What a server is started with.

    Attributes:
        name: of the model, and of its Annif project.
        k, max_k: labels per text where a request does not say, and at most.
        max_batch: texts per batch.
        max_wait: seconds that a batch waits for more requests.
        queue: POST requests inside at once; others get 429.
        max_texts: per request.
        max_bytes: of a request's body.
        uri_prefix: of the URIs of labels whose names are no URIs.
        changed: seconds since the epoch, when the model was written.
    """

    name: str
    k: int = 10
    max_k: int = 1000
    max_batch: int = 64
    max_wait: float = 0.0
    queue: int = 256
    max_texts: int = 256
    max_bytes: int = 4 << 20
    uri_prefix: str = "urn:xmlkernels:label:"
    changed: float = 0.0


_KINDS = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value"}
_SAID = {  # what starlette says in its own words
    400: "the body is no JSON in UTF-8",
    404: "no such path",
    405: "another method than this path takes",
}
_MISTAKES: dict[int | str, dict[str, Any]] = {
    413: {"model": messages.Mistake, "description": "the body is too large"},
    422: {"model": messages.Mistake, "description": "the request cannot be answered"},
    429: {"model": messages.Mistake, "description": "too many requests; see Retry-After"},
}


def application(predictor: TextPredictor, settings: Settings, near: Neighbours) -> Gate:
    """Make the ASGI application that serves a model.

    Args:
        predictor: what answers.
        settings: of the server.
        near: the training documents, for the page.
    """
    measures = Measures()
    batcher = Batcher(
        predictor,
        max_batch=settings.max_batch,
        max_wait=settings.max_wait,
        observe=measures.of_batch,
    )

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(
        title="xmlkernels",
        version=__version__,
        description=f"Labels of texts by the model {settings.name}.",
        docs_url=None,  # its page loads programs from another host
        redoc_url=None,
        lifespan=running,
    )
    _say_mistakes(app)

    @app.post("/predict", responses=_MISTAKES, response_model=messages.Response)
    async def predict(request: messages.Request) -> Response:
        """Label texts: the best k labels of each, the best first."""
        job = messages.job_of(request, predictor, settings.k, settings.max_k, settings.max_texts)
        answers = await batcher.ask(job)
        results = [
            messages.Result(labels=[messages.Answered.of(label) for label in labels])
            for labels in answers
        ]
        body = messages.Response(results=results).model_dump_json()
        return Response(body, media_type="application/json")

    @app.post("/neighbours", responses=_MISTAKES)
    async def neighbours(request: messages.NeighboursRequest) -> messages.NeighboursResponse:
        """Find the training documents whose words are most like a text's."""
        found = await batcher.apart(lambda: near.nearest(request.text, request.count))
        names = predictor.label_names
        shown = [
            messages.Neighbour(
                text=document["text"],
                similarity=document["similarity"],
                labels=[names[x] if names else str(x) for x in document["labels"]],
            )
            for document in found
        ]
        return messages.NeighboursResponse(neighbours=shown, reason=near.reason)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Say that the server answers, and with which model."""
        return {
            "status": "ok",
            "model": settings.name,
            "labels": predictor.labels,
            "version": __version__,
        }

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(measures.text(), media_type=CONTENT_TYPE_LATEST)

    for path, file in (("/", "page.html"), ("/docs", "docs.html")):
        _add_page(app, path, file)
    app.include_router(
        annif_router(
            predictor,
            batcher.ask,
            name=settings.name,
            prefix=settings.uri_prefix,
            changed=settings.changed,
            most=settings.max_k,
        )
    )
    inner: Any = app
    gate = Gate(
        inner,
        measures,
        queue=settings.queue,
        max_bytes=settings.max_bytes,
        pace=lambda: batcher.pace,
    )
    measures.watch(lambda: len(batcher.waiting), lambda: gate.inside)
    return gate


def _add_page(app: FastAPI, path: str, file: str) -> None:
    """Serve a page that fetches nothing from elsewhere, and that a browser holds to it."""
    text = files("xmlkernels.serve").joinpath(file).read_text("utf-8")
    allowed = {}
    for kind in ("style", "script"):
        (inside,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        allowed[kind] = f"{kind}-src 'sha256-{digest}'"
    policy = (
        f"default-src 'none'; {allowed['style']}; {allowed['script']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

    @app.get(path, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers={"content-security-policy": policy})


def _say_mistakes(app: FastAPI) -> None:
    """Answer every mistake with {"error": one sentence}."""

    def said(status: int, sentence: str, **more: Any) -> JSONResponse:
        return JSONResponse({"error": sentence}, status, **more)

    known = {
        name
        for kind in (messages.Request, messages.Document, messages.NeighboursRequest)
        for name in kind.model_fields
    }

    @app.exception_handler(InputError)
    async def of_input(_: Any, error: InputError) -> JSONResponse:
        return said(422, str(error))

    @app.exception_handler(NoProject)
    async def of_project(_: Any, error: NoProject) -> JSONResponse:
        return said(404, str(error))

    @app.exception_handler(RequestValidationError)
    async def of_shape(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["loc"] == ("body",):  # none at all, no object, or not said to be JSON
            kind = request.headers.get("content-type", "none")
            given = first["input"]
            got = (
                f"the content-type {kind}" if isinstance(given, bytes) else _KINDS.get(type(given))
            )
            got = got or "none"
            sentence = f"expected a JSON object (content-type: application/json), got {got}"
            return said(422, f"the body: {sentence}; see /docs")
        if first["type"] == "json_invalid":
            return said(422, f"the body: no JSON ({first['ctx']['error']}); see /docs")
        *inner, last = first["loc"][1:]
        # Without the names of the kinds that a value may be of.
        place = [part for part in inner if isinstance(part, int) or part in known]
        if isinstance(last, int) or last in known or first["type"] == "extra_forbidden":
            place.append(last)
        named = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in place).lstrip(".")
        sentence = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
        return said(422, f"{named or 'the body'}: {sentence}; see /docs")

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        what = _SAID.get(error.status_code, f"{error.detail[:1].lower()}{error.detail[1:]}")
        sentence = f"{request.method} {request.url.path}: {what}; /docs lists all requests"
        return said(error.status_code, sentence, headers=error.headers)

    @app.exception_handler(ModelFailed)
    async def of_model(_: Any, error: ModelFailed) -> JSONResponse:
        return said(500, f"the model failed: {error}; the server's log says more")
