"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Measures:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "xmlkernels_requests", "Requests by path and status", ["path", "status"],
            registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "xmlkernels_request_seconds", "From a request's head to its last byte",
            ["path", "status"], buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.batch_texts = Histogram(
            "xmlkernels_batch_texts", "Texts per batch", buckets=_TEXTS, registry=registry
        )
        self.batch_seconds = Histogram(
            "xmlkernels_batch_seconds", "Seconds of the model per batch", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.rejected = Counter(
            "xmlkernels_rejected", "Requests refused, by reason", ["reason"], registry=registry
        )
        self._waiting = Gauge(
            "xmlkernels_queue_requests", "Requests that no batch has taken yet", registry=registry
        )
        self._inside = Gauge(
            "xmlkernels_inside_requests", "Requests that are read, wait or are answered",
            registry=registry,
        )  # fmt: skip

    def watch(self, waiting: Callable[[], float], inside: Callable[[], float]) -> None:
        """Take the depth of the queue, and the number of requests inside, from these."""
        self._waiting.set_function(waiting)
        self._inside.set_function(inside)

    def of_batch(self, texts: int, seconds: float) -> None:
        """Count a batch."""
        self.batch_texts.observe(texts)
        self.batch_seconds.observe(seconds)

    def of_request(self, path: str, status: int, seconds: float) -> None:
        """Count a request that has ended."""
        self.requests.labels(path, str(status)).inc()
        # By status, too: what is refused at once would make answers look faster than they are.
        self.seconds.labels(path, str(status)).observe(seconds)

    def text(self) -> bytes:
        """Give everything in Prometheus's text format."""
        return generate_latest(self.registry)
