"""How long requests to `xmlkernels serve` take: one client, a full queue, four times as many.

    python benchmarks/serving.py [FOLDER …] [--queue 64] [--requests 50] [-- flags of the server]

Starts a server on a free port, and a generator of load in a process of its own. Prints p50 and p99
of the answered requests, answers per second, how many were told to come again (429), and how many
were lost or wrong: these must be 0. The texts are those of the tiny data of the tests, so FOLDER is
a model of any data whose answers are to be timed; by default the bag of words of tests/fixtures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests", ROOT / "tests" / "serve"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from served import V1, served  # noqa: E402  (after the path)

LOAD = ROOT / "tests" / "serve" / "load.py"


def of(ms: list[float], share: float) -> float:
    """Return a quantile of ascending numbers; 0 of none."""
    return ms[min(len(ms) - 1, int(share * len(ms)))] if ms else 0.0


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status: 1 where a request was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="*", default=[str(V1 / "bow")])
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--requests", type=int, default=50, help="of each client")
    options, more = parser.parse_known_args(words)
    lost = 0
    with tempfile.TemporaryDirectory() as at:
        words = [*options.folder, "--queue", str(options.queue), "--neighbours", "0"]
        with served(Path(at), *words, *[word for word in more if word != "--"]) as server:
            print(f"{'clients':>8}{'p50 ms':>9}{'p99 ms':>9}{'answers/s':>11}{'429':>7}{'lost':>6}")
            for clients in (1, options.queue, 4 * options.queue):
                lost += measured(server.url, clients, options.requests)
            server.stop()
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"load average {load}; the generator shares the machine with the server")
    return 1 if lost else 0


def measured(url: str, clients: int, requests: int) -> int:
    """Print a row; return how many requests had no answer, or a wrong one."""
    done = subprocess.run(
        [sys.executable, str(LOAD), url, str(clients), str(requests)],
        capture_output=True, text=True, timeout=1800, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    statuses = found["statuses"]
    lost = clients * requests - statuses.get("200", 0) - statuses.get("429", 0) + found["wrong"]
    ms = found["ms"]
    print(
        f"{clients:>8}{of(ms, 0.5):>9.1f}{of(ms, 0.99):>9.1f}"
        f"{found['answered'] / found['seconds']:>11.0f}{statuses.get('429', 0):>7}{lost:>6}",
        flush=True,
    )
    return int(lost)


if __name__ == "__main__":
    sys.exit(main())
