"""What every request passes: how many are inside, how large a body is, how long it took."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any

from xmlkernels.serve.measures import Measures

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_PATIENCE = 30.0  # seconds for a body to come
_DISCARDED = 16 << 20  # bytes of a refused body that are read, so that its sender reads the answer


class _TooLarge(Exception):
    pass


class Gate:
    """An ASGI application around another one.

    A request that is refused here is refused before its body is kept: memory is bounded by
    `queue` times `max_bytes`.

    Args:
        app: the application inside.
        measures: what counts requests.
        queue: POST requests inside at once; others get 429.
        max_bytes: of a body; larger ones get 413.
        pace: seconds that a request takes in the mean, for Retry-After.

    Attributes:
        inside: POST requests that are being read or answered.
        closing: whether answers end their connection, before the server ends.
    """

    def __init__(
        self, app: App, measures: Measures, *, queue: int, max_bytes: int, pace: Callable[[], float]
    ) -> None:
        self.app, self.queue, self.max_bytes, self.pace = app, queue, max_bytes, pace
        self.measures, self.inside, self.closing = measures, 0, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = perf_counter(), 500

        async def watched(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.closing:
                    message = message | {
                        "headers": [*message.get("headers", ()), (b"connection", b"close")]
                    }
            await send(message)

        try:
            if scope["method"] == "POST":
                await self._posted(scope, receive, watched)
            else:
                await self.app(scope, receive, watched)
        finally:
            # The pattern of the path, not the path: there are few.
            route = getattr(scope.get("route"), "path", "other")
            self.measures.of_request(route, status, perf_counter() - started)

    async def _posted(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.inside >= self.queue:
            await self._discard(receive)
            seconds = max(1, math.ceil(self.inside * self.pace()))
            sentence = f"{self.inside} requests are inside, as many as --queue allows; try later"
            await self._refuse(send, 429, "queue", sentence, {"retry-after": str(seconds)})
            return
        self.inside += 1
        try:
            try:
                body = await asyncio.wait_for(self._body(scope, receive), _PATIENCE)
            except _TooLarge:
                await self._discard(receive)
                sentence = f"the body has more than {self.max_bytes:,} bytes; send fewer texts"
                await self._refuse(send, 413, "bytes", sentence, {"connection": "close"})
                return
            except TimeoutError:
                sentence = f"the body did not come within {_PATIENCE:g} s; send it again"
                await self._refuse(send, 408, "slow", sentence, {"connection": "close"})
                return
            if body is None:
                return  # the client has left
            given = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def replayed() -> dict[str, Any]:
                return next(given, None) or await receive()

            await self.app(scope, replayed, send)
        finally:
            self.inside -= 1

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told) > self.max_bytes:
            raise _TooLarge
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self.max_bytes:
                raise _TooLarge
            parts.append(part)
            more = message.get("more_body", False)
        return b"".join(parts)

    async def _discard(self, receive: Receive) -> None:
        """Read what a refused client sends, for a while: else it may never read the answer."""

        async def read() -> None:
            size = 0
            while size < _DISCARDED:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return

        try:
            await asyncio.wait_for(read(), 1.0)
        except TimeoutError:
            return

    async def _refuse(
        self, send: Send, status: int, reason: str, sentence: str, more: dict[str, str]
    ) -> None:
        self.measures.rejected.labels(reason).inc()
        body = json.dumps({"error": sentence}).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **more}
        start: dict[str, Any] = {"type": "http.response.start", "status": status}
        start["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send(start)
        await send({"type": "http.response.body", "body": body})
