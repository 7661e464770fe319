"""Annif's protocol: what its backend `http` asks, https://github.com/NatLibFi/Annif.

It asks `GET /annif` whether the project is trained, and posts the form fields `text` and `limit` to
`/annif/suggest`; the answer holds URIs, which Annif looks up in its own vocabulary, and scores in
(0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from xmlkernels.errors import InputError
from xmlkernels.predict.base import Label, TextPredictor
from xmlkernels.serve.batching import Answers, Job

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s<>\"]+")
_LIMIT = 10  # suggestions, where the request does not say; Annif's own default


class Uris:
    """The URIs of labels: their ids or names, where these are URIs, else a prefix and numbers.

    Args:
        predictor: whose labels.
        prefix: of the URIs that are made.
    """

    def __init__(self, predictor: TextPredictor, prefix: str) -> None:
        self.names, self.labels, self.prefix = predictor.label_names, predictor.labels, prefix
        self.ids = predictor.label_ids or self.names

    def of(self, label: int) -> str:
        """Return the URI of a label."""
        known = self.ids[label] if self.ids else ""
        return known if _URI.fullmatch(known) else f"{self.prefix}{label}"

    def vocabulary(self) -> Iterator[str]:
        """Yield lines of a vocabulary for `annif load-vocab`: a URI, a tab, a label."""
        for label in range(self.labels):
            name = self.names[label] if self.names else str(label)
            yield f"<{self.of(label)}>\t{' '.join(name.split())}\n"


def annif_router(
    predictor: TextPredictor,
    ask: Callable[[Job], Awaitable[Answers]],
    *,
    name: str,
    prefix: str,
    changed: float,
    most: int,
) -> APIRouter:
    """Make the routes of the protocol.

    Args:
        predictor: what answers.
        ask: answers a job.
        name: of the project.
        prefix: of the URIs of labels whose names are no URIs.
        changed: seconds since the epoch, when the model was written.
        most: suggestions per text at most.
    """
    router, uris = APIRouter(tags=["annif"]), Uris(predictor, prefix)
    when = datetime.fromtimestamp(changed, UTC).isoformat()
    status = {
        "project_id": name,
        "name": name,
        "backend": {"backend_id": "xmlkernels"},
        "is_trained": True,
        "modification_time": when,
    }

    @router.get("/annif")
    async def project() -> dict[str, Any]:
        """Say that the model is trained, and when it was written."""
        return status

    @router.get("/annif/projects")
    async def projects() -> dict[str, Any]:
        """List the projects: there is one."""
        return {"projects": [status]}

    @router.get("/annif/projects/{project}")
    async def one_project(project: str) -> dict[str, Any]:
        """Say that a project is trained, and when it was written."""
        _check_project(project, name)
        return status

    @router.get("/annif/vocabulary.tsv")
    async def vocabulary() -> StreamingResponse:
        """List the labels for `annif load-vocab`."""
        kind = "text/tab-separated-values; charset=utf-8"
        return StreamingResponse(uris.vocabulary(), media_type=kind)

    @router.post("/annif/suggest", openapi_extra=_FORM)
    async def suggest(request: Request) -> dict[str, Any]:
        """Suggest subjects for the form field `text`."""
        return await _suggested(await request.body(), None)

    @router.post("/annif/projects/{project}/suggest", openapi_extra=_FORM)
    async def suggest_of(project: str, request: Request) -> dict[str, Any]:
        """Suggest subjects for the form field `text`, by a project's name."""
        return await _suggested(await request.body(), project)

    async def _suggested(body: bytes, project: str | None) -> dict[str, Any]:
        fields = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True)
        _check_project(project or fields.get("project", [name])[0], name)
        if "text" not in fields:
            mend = "post text=… as application/x-www-form-urlencoded"
            raise InputError("text", "a form field of that name", "none", mend)
        text = fields["text"][0]
        limit = _limit(fields.get("limit", [str(_LIMIT)])[0])
        k = min(limit, most, predictor.labels)
        (labels,) = await ask(Job([(text, text) if predictor.takes_pairs else text], k))
        found = [_hit(label, uris) for label in labels if label.probability > 0]
        # Calibrated probabilities of rare and frequent labels are in another order than scores.
        return {"results": sorted(found, key=lambda hit: -hit["score"])}

    return router


_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-www-form-urlencoded": {
                "schema": {
                    "type": "object",
                    "required": ["text"],
                    "properties": {
                        "text": {"type": "string"},
                        "limit": {"type": "integer", "default": _LIMIT},
                    },
                }
            }
        },
    }
}


def _hit(label: Label, uris: Uris) -> dict[str, Any]:
    return {
        "uri": uris.of(label.id),
        "label": label.name,
        "notation": None,
        "score": label.probability,
    }


class NoProject(Exception):
    """A project that is not served: one sentence, status 404."""


def _check_project(asked: str, name: str) -> None:
    if asked != name:
        raise NoProject(f"project: expected {name!r}, got {asked!r}; ask for that one")


def _limit(given: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", given) or int(given) < 1:
        mend = "leave it out, or ask for one suggestion at least"
        raise InputError("limit", "a whole number from 1", repr(given[:20]), mend)
    return int(given)
