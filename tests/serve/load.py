"""A load generator: so many clients at once, each with one request after the other.

    python tests/serve/load.py URL CLIENTS REQUESTS

Prints one line of JSON: how many requests had which status, milliseconds of those that were
answered, and how many answers were wrong: not those that the same texts got from the idle server.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

TEXTS = [[f"w{(7 * n + j) % 90} w{(11 * n) % 90}" for j in range(1 + n % 4)] for n in range(24)]
BODIES: list[dict[str, Any]] = [
    {"texts": texts, "k": 3 + n % 3, **({"exclude": [n % 30]} if n % 2 else {})}
    for n, texts in enumerate(TEXTS)
]


@dataclass(frozen=True)
class Answer:
    """What the server sent: the status, its headers by lower-case names, and the body."""

    status: int
    headers: dict[str, str]
    content: bytes


def labels_of(answer: Answer) -> list[list[tuple[int, float]]]:
    results = json.loads(answer.content)["results"]
    return [[(x["id"], x["score"]) for x in r["labels"]] for r in results]


def same(one: list[list[tuple[int, float]]], other: list[list[tuple[int, float]]]) -> bool:
    """Whether two answers are the same, up to the last digits of the scores.

    Labels of all but equal scores may change places.
    """
    for ours, theirs in zip(one, other, strict=True):
        if len(ours) != len(theirs):
            return False
        for (label, score), (expected, value) in zip(ours, theirs, strict=True):
            if abs(score - value) > 1e-4 or (
                label != expected and all(abs(score - v) > 1e-4 for x, v in theirs if x != expected)
            ):
                return False
    return True


class Connection:
    """One standing connection, by hand: an HTTP library is slower here than the server."""

    def __init__(self, url: str) -> None:
        self.place = urlsplit(url)

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(
            self.place.hostname, self.place.port
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def post(self, body: dict[str, Any]) -> Answer:
        """Ask /predict, and wait for the whole answer."""
        data = json.dumps(body).encode()
        head = f"POST /predict HTTP/1.1\r\nhost: {self.place.netloc}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        self._writer.write(head.encode() + data)
        first, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        content = await self._reader.readexactly(int(headers["content-length"]))
        return Answer(int(first.split()[1]), headers, content)


async def measured(url: str, clients: int, requests: int) -> dict[str, Any]:
    """Ask, and count."""
    statuses: Counter[int] = Counter()
    taken: list[float] = []
    wrong = 0
    async with Connection(url) as connection:
        expected = [labels_of(await connection.post(body)) for body in BODIES]

    async def client(number: int) -> None:
        nonlocal wrong
        async with Connection(url) as connection:
            for turn in range(requests):
                which = (5 * number + turn) % len(BODIES)
                started = time.perf_counter()
                answer = await connection.post(BODIES[which])
                statuses[answer.status] += 1
                if answer.status == 200:
                    taken.append((time.perf_counter() - started) * 1e3)
                    wrong += not same(labels_of(answer), expected[which])
                elif answer.status == 429:
                    wrong += not int(answer.headers["retry-after"]) >= 1
                else:
                    wrong += 1

    started = time.perf_counter()
    await asyncio.gather(*map(client, range(clients)))
    seconds = time.perf_counter() - started
    return {
        "statuses": dict(statuses),
        "ms": sorted(taken),
        "wrong": wrong,
        "seconds": seconds,
        "answered": len(taken),
    }


if __name__ == "__main__":
    url, clients, requests = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(asyncio.run(measured(url, clients, requests))))
