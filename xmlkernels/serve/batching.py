"""Answer concurrent requests together: a queue, and one thread that asks the model."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from time import perf_counter
from typing import Any, Literal

import numpy as np

from xmlkernels.predict.base import Label, Text, TextPredictor
from xmlkernels.predict.calibration import Chosen

log = logging.getLogger(__name__)

Answers = list[list[Label]]  # of each text of a request


@dataclass(frozen=True, eq=False)
class Job:
    """The texts of one request.

    Attributes:
        texts: one or more, as the predictor takes them.
        k: labels per text.
        allow, exclude: of each text the numbers of labels, int64, or None; None: no such limit.
        threshold, order, propensity: as of `TextPredictor.predict`.
    """

    texts: list[Text]
    k: int
    allow: list[np.ndarray | None] | None = None
    exclude: list[np.ndarray | None] | None = None
    threshold: float | Chosen | None = None
    order: Literal["score", "probability"] = "score"
    propensity: float = 0.0

    @property
    def way(self) -> tuple[Any, ...]:
        """What is the same for all texts of a call of `predict`."""
        return self.k, self.threshold, self.order, self.propensity


def answer(predictor: TextPredictor, jobs: Sequence[Job], batch_size: int) -> list[Answers]:
    """Answer several requests; those that ask for as many labels share passes of the model.

    Each gets what it would get alone, up to the last digits of scores: a shortlist is filled up
    for the labels that the request itself asks for.
    """
    found: dict[int, Answers] = {}
    for way in dict.fromkeys(job.way for job in jobs):
        some = [job for job in jobs if job.way == way]
        k, *rest = way
        limits: dict[str, Any] = dict(zip(("threshold", "order", "propensity"), rest, strict=True))
        for name in ("allow", "exclude"):
            if any(getattr(job, name) is not None for job in some):
                limits[name] = [
                    own for job in some for own in (getattr(job, name) or [None] * len(job.texts))
                ]
        texts = [text for job in some for text in job.texts]
        answers = predictor.predict(texts, k, batch_size=batch_size, prefetch=0, **limits)
        found |= {id(job): list(islice(answers, len(job.texts))) for job in some}
    return [found[id(job)] for job in jobs]


class ModelFailed(Exception):
    """A request that was right and could not be answered; the log says why."""


class Batcher:
    """The queue before a model. All but the model's own work happens on the event loop.

    A batch is what has come while the last one was computed, and what comes in `max_wait` after
    its first request.

    Args:
        predictor: what answers.
        max_batch: texts per batch; a request with more is a batch by itself.
        max_wait: seconds that a batch waits for more requests.
        observe: told the number of texts of each batch, and its seconds.

    Attributes:
        waiting: requests that no batch has taken yet.
        pace: seconds per request, the mean over the last ones.
    """

    def __init__(
        self,
        predictor: TextPredictor,
        *,
        max_batch: int,
        max_wait: float,
        observe: Callable[[int, float], None] = lambda texts, seconds: None,
    ) -> None:
        self.predictor, self.max_batch, self.max_wait = predictor, max_batch, max_wait
        self.waiting: deque[tuple[Job, asyncio.Future[Answers]]] = deque()
        self.pace = 0.0
        self._observe = observe
        self._come = asyncio.Event()
        self._pool = ThreadPoolExecutor(1, "model")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to answer; on the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._serve())

    async def stop(self) -> None:
        """End the thread. Call it when nothing waits any more."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._pool.shutdown()

    async def ask(self, job: Job) -> Answers:
        """Answer one request, in a batch with others."""
        future: asyncio.Future[Answers] = asyncio.get_running_loop().create_future()
        self.waiting.append((job, future))
        self._come.set()
        return await future

    async def apart(self, work: Callable[[], Any]) -> Any:
        """Run other work in the model's thread: between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._more(None)
            end = loop.time() + self.max_wait
            while self._texts() < self.max_batch and (left := end - loop.time()) > 0:
                await self._more(left)
            taken = self._take()
            if not taken:
                continue
            jobs, started = [job for job, _ in taken], perf_counter()
            try:
                found = await self.apart(partial(self._answer, jobs))
            except RuntimeError as error:  # the thread has ended
                found = [ModelFailed(str(error))] * len(jobs)
            seconds = perf_counter() - started
            self.pace += (seconds / len(jobs) - self.pace) * 0.1
            self._observe(sum(len(job.texts) for job in jobs), seconds)
            for (_, future), own in zip(taken, found, strict=True):
                if future.done():
                    continue
                if isinstance(own, Exception):
                    future.set_exception(own)
                else:
                    future.set_result(own)

    async def _more(self, seconds: float | None) -> None:
        """Wait for a request that has come since the last look."""
        if seconds is None and self.waiting:
            return
        self._come.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._come.wait(), seconds)

    def _texts(self) -> int:
        return sum(len(job.texts) for job, _ in self.waiting)

    def _take(self) -> list[tuple[Job, asyncio.Future[Answers]]]:
        taken: list[tuple[Job, asyncio.Future[Answers]]] = []
        room = self.max_batch
        while self.waiting and (not taken or len(self.waiting[0][0].texts) <= room):
            job, future = self.waiting.popleft()
            if not future.done():  # its client may have left
                taken.append((job, future))
                room -= len(job.texts)
        return taken

    def _answer(self, jobs: Sequence[Job]) -> list[Answers | Exception]:
        """Answer together; where that fails, one by one, so that one request fails alone."""
        try:
            return [*answer(self.predictor, jobs, self.max_batch)]
        except Exception as error:
            if len(jobs) == 1:
                log.exception("a request could not be answered")
                return [ModelFailed(str(error) or type(error).__name__)]
            return [own for job in jobs for own in self._answer([job])]
