"""A real server in a process of its own: what load does to it, and how it ends."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from load import BODIES
from patience import PATIENCE, until
from prometheus_client.parser import text_string_to_metric_families
from served import ROOT, V1, Served, served

from benchmarks import serving

QUEUE = 8
LOAD = Path(__file__).with_name("load.py")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A short queue before a bag of words."""
    folder = tmp_path_factory.mktemp("server")
    with served(folder, V1 / "bow", "--queue", QUEUE, "--threads", 1) as found:
        yield found
        assert "Traceback" not in found.errors


def loaded(server: Served, clients: int, requests: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(LOAD), server.url, str(clients), str(requests)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_within_its_queue_every_request_is_answered(
    server: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    """The row that benchmarks/serving.py prints of it."""
    assert serving.measured(server.url, QUEUE, 12) == 0
    clients, p50, p99, rate, again, lost = map(float, capsys.readouterr().out.split())
    assert (clients, again, lost) == (QUEUE, 0, 0)
    assert 0 < p50 <= p99 and rate > 0


@dataclass
class Latencies:
    """What Prometheus would know of the seconds of answers.

    Attributes:
        below: how many took at most so long, by the upper bounds of the buckets, ascending.
        total: their seconds together.
    """

    below: dict[float, float]
    total: float

    def since(self, before: Latencies) -> Latencies:
        """What has come since then."""
        below = {bound: n - before.below.get(bound, 0.0) for bound, n in self.below.items()}
        return Latencies(below, self.total - before.total)

    def quantile(self, share: float) -> float:
        """As `histogram_quantile`: on a straight line inside of its bucket."""
        low, under = 0.0, 0.0
        for bound, count in self.below.items():
            if count >= share * self.below[math.inf]:
                inside = (share * self.below[math.inf] - under) / max(count - under, 1e-9)
                return low if math.isinf(bound) else low + inside * (bound - low)
            low, under = bound, count
        raise AssertionError("no answers")


def latencies(server: Served) -> Latencies:
    """Read /metrics as Prometheus does."""
    families = text_string_to_metric_families(httpx.get(f"{server.url}metrics").text)
    (family,) = (one for one in families if one.name == "xmlkernels_request_seconds")
    assert family.type == "histogram"
    wanted = {"path": "/predict", "status": "200"}
    own = [one for one in family.samples if wanted.items() <= one.labels.items()]
    below = {float(one.labels["le"]): one.value for one in own if one.name.endswith("_bucket")}
    sums = [one.value for one in own if one.name.endswith("_sum")]
    return Latencies(dict(sorted(below.items())), sum(sums))


def test_nothing_is_lost_at_four_times_as_many(server: Served) -> None:
    """Each request gets its answer, the right one, or is told to come again.

    Who is let in waits for no more than the queue holds, and /metrics has p50 and p99 of it.
    """
    clients, requests, end = 4 * QUEUE, 8, time.monotonic() + PATIENCE
    before = latencies(server)
    found = loaded(server, clients, requests)
    # Clients on a busy machine may ask more slowly than the server answers: then more of them.
    while "429" not in found["statuses"] and time.monotonic() < end:
        clients, before = 2 * clients, latencies(server)
        found = loaded(server, clients, requests)
    seen = latencies(server).since(before)
    taken = found["ms"]
    assert seen.below[math.inf] == len(taken) + len(BODIES)  # those before the load, one by one
    p50, p99 = seen.quantile(0.5), seen.quantile(0.99)
    assert 0 < p50 <= p99
    # A client waits longer than the server takes; a bucket is up to 2.5 times as long as the last.
    assert p99 <= 2.5 * max(taken[-1] / 1e3, 0.001)
    # Little's law: all seconds over those of the clock are the requests inside at one time.
    assert seen.total / found["seconds"] <= 2 * QUEUE < clients
    assert set(found["statuses"]) == {"200", "429"} and found["wrong"] == 0
    assert sum(found["statuses"].values()) == clients * requests
    told = httpx.get(f"{server.url}metrics").text
    for status, count in found["statuses"].items():
        line = f'xmlkernels_requests_total{{path="/predict",status="{status}"}} '
        counted = float(told.split(line)[1].split("\n")[0]) if line in told else 0.0
        assert status == "429" or counted >= count
    assert f'xmlkernels_rejected_total{{reason="queue"}} {found["statuses"]["429"]}.0' in told
    assert httpx.get(f"{server.url}healthz").json()["status"] == "ok"


def shape(value: Any) -> Any:
    """The keys of JSON, at every level."""
    if isinstance(value, dict):
        return {name: shape(part) for name, part in value.items()}
    return [shape(part) for part in value[:1]] if isinstance(value, list) else None


@pytest.mark.skipif(shutil.which("curl") is None, reason="the page's commands need curl")
def test_the_commands_of_the_page_work(server: Served, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "serving.md").read_text("utf-8")
    blocks = re.findall(r"^```(bash|json)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    asked = 0
    answer = ""
    for kind, body in blocks:
        if kind == "json":
            assert shape(json.loads(answer)) == shape(json.loads(body)), answer
            continue
        for line in re.sub(r" *\\\n *", " ", body).splitlines():
            program, *words = shlex.split(line)
            if program != "curl":
                continue
            here = [word.replace("localhost:8000/", server.url) for word in words]
            done = subprocess.run(
                ["curl", "--fail-with-body", *here],
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                cwd=tmp_path,
            )
            answer = done.stdout
            assert done.returncode == 0, f"{line}: {answer}"
            asked += 1
    assert asked >= 7 and len((tmp_path / "mine.tsv").read_text().splitlines()) == 30


def test_a_stop_under_load_loses_nothing(server: Served) -> None:
    """Whoever was let in gets a whole and right answer; the others are told, or not connected.

    An idle connection does not hold the end up.
    """
    body = BODIES[1]
    right = httpx.post(f"{server.url}predict", json=body).json()["results"]
    outcomes: Counter[str] = Counter()
    begun = threading.Event()

    def client() -> None:
        while True:
            try:  # a connection for each: one that is kept may be closed before it is used
                answer = httpx.post(f"{server.url}predict", json=body, timeout=PATIENCE)
            except (httpx.ConnectError, httpx.ReadError, httpx.WriteError) as error:
                # Connected by the system while the port was closed: reset, nobody has read it.
                kind = "not connected" if isinstance(error, httpx.ConnectError) else "reset"
                outcomes[kind] += 1
                return
            except httpx.HTTPError as error:
                outcomes[f"lost: {error!r}"] += 1
                return
            same = answer.status_code != 200 or answer.json()["results"] == right
            outcomes[str(answer.status_code) if same else "wrong"] += 1
            if outcomes["200"] > 20:
                begun.set()

    clients = [threading.Thread(target=client) for _ in range(2 * QUEUE)]
    with httpx.Client(base_url=server.url) as idle:
        assert idle.get("healthz").status_code == 200
        for one in clients:
            one.start()
        assert begun.wait(PATIENCE), outcomes
        assert server.stop() == 0
    for one in clients:
        one.join(PATIENCE)
    assert set(outcomes) <= {"200", "429", "not connected", "reset"}, outcomes
    assert outcomes["not connected"] + outcomes["reset"] == 2 * QUEUE
    assert "ended in order" in server.told
    assert server.errors.startswith("SIGTERM: ends when what was accepted is answered")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_accepted_is_answered_before_it_ends(number: int, tmp_path: Path) -> None:
    """The signal comes while three requests wait for others to share a batch."""
    answers: list[int] = []
    with served(tmp_path, V1 / "bow", "--max-wait-ms", 4000, "--threads", 1) as found:

        def ask() -> None:
            body = {"texts": ["w3", "w4"]}
            answers.append(httpx.post(f"{found.url}predict", json=body, timeout=60).status_code)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: "xmlkernels_inside_requests 3.0" in httpx.get(f"{found.url}metrics").text)
        assert found.stop(number) == 0
        for thread in threads:
            thread.join(PATIENCE)
        assert answers == [200] * 3 and "ended in order" in found.told
        with pytest.raises(httpx.ConnectError):
            httpx.get(found.url)
