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
from typing import Any

import httpx

TEXTS = [[f"w{(7 * n + j) % 90} w{(11 * n) % 90}" for j in range(1 + n % 4)] for n in range(24)]
BODIES: list[dict[str, Any]] = [
    {"texts": texts, "k": 3 + n % 3, **({"exclude": [n % 30]} if n % 2 else {})}
    for n, texts in enumerate(TEXTS)
]


def labels_of(answer: httpx.Response) -> list[list[tuple[int, float]]]:
    return [[(x["id"], x["score"]) for x in r["labels"]] for r in answer.json()["results"]]


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


async def measured(url: str, clients: int, requests: int) -> dict[str, Any]:
    """Ask, and count."""
    statuses: Counter[int] = Counter()
    taken: list[float] = []
    wrong = 0
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=300) as http:
        expected = [labels_of(await http.post("predict", json=body)) for body in BODIES]

        async def client(number: int) -> None:
            nonlocal wrong
            for turn in range(requests):
                which = (5 * number + turn) % len(BODIES)
                started = time.perf_counter()
                answer = await http.post("predict", json=BODIES[which])
                statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    taken.append((time.perf_counter() - started) * 1e3)
                    wrong += not same(labels_of(answer), expected[which])
                elif answer.status_code == 429:
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
