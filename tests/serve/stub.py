"""A predictor that waits until it is let go, and the application around it in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
from patience import PATIENCE

from xmlkernels.data.text_parts import TextParts
from xmlkernels.predict.base import Text, TextPredictor
from xmlkernels.predict.limits import Limits
from xmlkernels.serve.app import Settings, application
from xmlkernels.serve.gate import Gate
from xmlkernels.serve.why import Neighbours

NOTHING = Neighbours(None, [], [], "there are none")


class Held(TextPredictor):
    """Answers with label 0, 1 … of score -1, -2 …; "bad" fails.

    Attributes:
        calls: the texts of each call.
        free: set to let it answer.
    """

    def __init__(self, *, free: bool = True) -> None:
        self.labels, self.parts = 30, TextParts()
        self.label_names = [f"w{3 * label}" for label in range(30)]
        self.calls: list[list[Any]] = []
        self.free = threading.Event()
        if free:
            self.free.set()

    def _in_order(
        self,
        texts: Iterable[Text],
        k: int,
        batch_size: int,
        window: int,
        prefetch: int,
        limits: Limits,
    ) -> Iterator[tuple[np.ndarray, ...]]:
        self.calls.append(list(texts))
        assert self.free.wait(PATIENCE)
        if "bad" in self.calls[-1]:
            raise ValueError("a bad text")
        rows = np.arange(k)
        for _ in self.calls[-1]:
            yield -1.0 - rows.astype(np.float32), rows

    def embed(self, texts: Iterable[Text], *, batch_size: int = 64) -> np.ndarray:
        raise NotImplementedError


@asynccontextmanager
async def asking(app: Gate) -> AsyncIterator[httpx.AsyncClient]:
    """Start an application on the running loop, and give a client of it."""
    inner: Any = app.app
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
    async with (
        inner.router.lifespan_context(inner),
        httpx.AsyncClient(transport=transport, base_url="http://here") as client,
    ):
        yield client


def application_of(predictor: TextPredictor, **settings: Any) -> Gate:
    return application(predictor, Settings("stub", **settings), NOTHING)


async def until(true: Any) -> None:
    """Let the loop go on until something holds."""
    async with asyncio.timeout(PATIENCE):
        while not true():
            await asyncio.sleep(0.002)


def ids(answer: httpx.Response) -> list[list[int]]:
    assert answer.status_code == 200, answer.text
    return [[label["id"] for label in result["labels"]] for result in answer.json()["results"]]


def texts_of(calls: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(call) for call in calls]
