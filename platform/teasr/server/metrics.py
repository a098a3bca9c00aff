"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from teasr.server.models import Outcome, Served

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server; those of the process (memory, processor time) are among them.

    Args:
        queue: gives the number of pictures that are waiting or worked on.
        current: gives what is served.
        failing: whether the last look for a new version failed.
    """

    def __init__(
        self, queue: Callable[[], int], current: Callable[[], Served], failing: Callable[[], bool]
    ) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._current = current
        self._requests = Counter(
            "teasr_requests", "Requests answered.", ["path", "status"], registry=registry
        )
        self._seconds = Histogram(
            "teasr_request_seconds",
            "From a request's header to its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._batches = Histogram(
            "teasr_batch_tiles",
            "Tiles that went through the network together.",
            buckets=(1, 2, 3, 4, 6, 8, 12, 16),
            registry=registry,
        )
        self._pixels = Counter("teasr_pixels", "Pixels of restored pictures.", registry=registry)
        self._reloads = Counter(
            "teasr_reloads", "Looks for another version.", ["outcome"], registry=registry
        )
        self._served = Gauge(
            "teasr_served", "1 for the version in use.", ["version", "alias"], registry=registry
        )
        Gauge("teasr_queue", "Pictures waiting or worked on.", registry=registry).set_function(
            queue
        )
        Gauge(
            "teasr_reload_failing",
            "1 while the last look for a new version failed.",
            registry=registry,
        ).set_function(failing)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request; `path` is one of the server's own, or `other`."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, tiles: int) -> None:
        """Count a batch."""
        self._batches.observe(tiles)

    def restored(self, pixels: int) -> None:
        """Count the pixels of a result."""
        self._pixels.inc(pixels)

    def reload(self, outcome: Outcome) -> None:
        """Count what became of a look for a new version."""
        self._reloads.labels(outcome).inc()

    def text(self) -> bytes:
        """The text that Prometheus reads."""
        self._served.clear()
        served = self._current()
        self._served.labels(served.version, served.alias or "").set(1)
        return generate_latest(self._registry)
