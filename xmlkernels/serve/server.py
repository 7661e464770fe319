"""Run the application until it is asked to stop, and then finish what has been accepted."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from xmlkernels.errors import InputError
from xmlkernels.serve.gate import Gate

_LAST = 60  # seconds that accepted requests have to end
_LATE = 0.3  # seconds for the requests of connections that are made already


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, gate: Gate, asked: Callable[[], int]) -> None:
        super().__init__(config)
        self._gate, self._asked = gate, asked

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the command listens for them

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn closes a connection whose request it has not read yet, without an answer: its
        # sender cannot know that. So first no more are taken, and those that are there may ask.
        self._gate.closing = True
        await asyncio.sleep(0)  # takes what the system has connected for us
        for server in self.servers:
            server.close()
        await asyncio.sleep(_LATE)
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        return bool(self._asked()) or await super().on_tick(counter)


def bound(host: str, port: int) -> socket.socket:
    """Return a socket of that address, which does not listen yet; port 0 is any free one.

    Raises:
        InputError: another program has the port, or there is no such address.
    """
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio switches Nagle's algorithm off where a socket names its protocol: without it each
        # answer waits 40 ms for the client's delayed acknowledgement.
        found = socket.socket(kind, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise InputError("--host", "an address of this machine", host, str(error)) from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as error:
        found.close()
        mend = "choose another with --port; 0 takes a free one"
        got = getattr(error, "strerror", None) or str(error)
        raise InputError(f"--port {port}", f"a free port of {host}", got, mend) from None
    return found


def run(app: Gate, listener: socket.socket, asked: Callable[[], int]) -> None:
    """Serve an ASGI application until `asked()` is not 0.

    Connections are then no longer taken; requests that were, and those that come on standing
    connections within 0.3 s, are answered, for a minute at most.

    Args:
        app: the application.
        listener: of `bound`.
        asked: looked at ten times a second.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST,
    )
    asyncio.run(_Server(config, app, asked).serve(sockets=[listener]))
