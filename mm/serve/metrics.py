"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mm.serve.shelf import Shelf

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Of one application: several in one process don't mix."""

    def __init__(self, shelf: Shelf, in_flight: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mm_requests", "Requests by route and status.", ("route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "mm_request_seconds", "From a request's head to the end of its answer.", ("route",),
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        flying = Gauge("mm_requests_in_flight", "Requests that hold a place.", registry=self.registry)
        flying.set_function(in_flight)
        self.registry.register(_Batches(shelf))
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Batches(Collector):
    """Read from the batchers when they are asked for: a pass has better things to do."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def collect(self) -> Iterable[Metric]:
        passes = CounterMetricFamily("mm_passes", "Passes of a model.", labels=["model"])
        rows = CounterMetricFamily("mm_pass_rows", "Rows in all passes of a model together.", labels=["model"])
        running = GaugeMetricFamily("mm_rows_running", "Rows of the batch.", labels=["model"])
        waiting = GaugeMetricFamily("mm_rows_waiting", "Rows that have no place in the batch yet.", labels=["model"])
        for name, served in self.shelf.models.items():
            passes.add_metric([name], served.batcher.passes)
            rows.add_metric([name], served.batcher.fed)
            running.add_metric([name], served.batcher.running)
            waiting.add_metric([name], served.batcher.waiting)
        return [passes, rows, running, waiting]
