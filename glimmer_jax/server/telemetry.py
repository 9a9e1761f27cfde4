"""Counters and histograms of the server in Prometheus' text format."""

from collections.abc import Mapping

import tensorstore as ts
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
STAGES = ("queue", "retrieval", "memory", "read", "decode")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Telemetry:
    """The server's metrics; each server has a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "glimmer_requests", "Requests by path and status.", ["path", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._request_seconds = Histogram(
            "glimmer_request_seconds", "Time from request to response.", ["path"],
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self._stage_seconds = Histogram(
            "glimmer_stage_seconds", "Time of a question in each stage.", ["stage"],
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self._queue = Gauge("glimmer_queue_length", "Questions waiting.", registry=self._registry)
        self._batch_size = Histogram(
            "glimmer_batch_size", "Questions per computed batch.", buckets=_SIZES,
            registry=self._registry,
        )  # fmt: skip
        self._compute_seconds = Counter(
            "glimmer_compute_seconds", "Time spent computing batches.", registry=self._registry
        )
        self._registry.register(_CacheCollector())

    def request(self, path: str, status: int, seconds: float) -> None:
        """One finished request."""
        self._requests.labels(path, str(status)).inc()
        self._request_seconds.labels(path).observe(seconds)

    def timings(self, timings: Mapping[str, float]) -> None:
        """Seconds per stage of one answered question."""
        for stage, seconds in timings.items():
            self._stage_seconds.labels(stage).observe(seconds)

    def queued(self, length: int) -> None:
        """Questions that wait now."""
        self._queue.set(length)

    def computed(self, size: int, seconds: float) -> None:
        """One computed batch."""
        self._batch_size.observe(size)
        self._compute_seconds.inc(seconds)

    def exposition(self) -> bytes:
        """Everything as Prometheus reads it."""
        return generate_latest(self._registry)


class _CacheCollector:
    """TensorStore's own counts of the chunks of memory that its cache held, or did not hold."""

    def collect(self) -> list[CounterMetricFamily]:
        families = []
        for name in ("hit_count", "miss_count"):
            total = 0.0
            for metric in ts.experimental_collect_matching_metrics(f"/tensorstore/cache/{name}"):
                total += sum(value.get("value", 0) for value in metric["values"])
            label = name.removesuffix("_count")
            families.append(
                CounterMetricFamily(
                    f"glimmer_memory_cache_{label}s",
                    f"Chunks of memory: cache {label}s, by TensorStore.",
                    value=total,
                )
            )
        return families
