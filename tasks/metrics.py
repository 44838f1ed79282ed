"""Metrics for Prometheus: what the stage that runs in this process has done, read from its results at each scrape.

Ray has metrics of its own (nodes, GPUs, memory), on its own port; infra/monitoring has a dashboard and alerts for both.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from facediffuser.batch_stage import Counts, Stage
from facediffuser.errors import InputError

logger = logging.getLogger(__name__)


class StageMetrics(Collector):
    """The metrics of the stages of this process: of the one that runs, or of the last one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stage: Stage | None = None
        self._read: Callable[[], dict[str, Any]] = dict

    def follow(self, stage: Stage, read: Callable[[], dict[str, Any]]) -> None:
        """Show this stage from now on.

        Args:
            stage: the stage.
            read: returns its state: `rows` done now, `workers`, `queued` units, `seconds` since it began, `progress_at`
                (Unix time of the last unit), `totals` (the sums of the units' counts), `running`.
        """
        with self._lock:
            self._stage, self._read = stage, read

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; prometheus_client calls this."""
        with self._lock:
            stage, state = self._stage, self._read()
        if stage is None:
            return
        name = [stage.name.lower()]

        def gauge(metric: str, text: str, value: float | None) -> Iterator[Metric]:
            if value is not None:
                family = GaugeMetricFamily(f"facediffuser_{metric}", text, labels=["stage"])
                family.add_metric(name, value)
                yield family

        def counter(metric: str, text: str, values: dict[str, float], label: str | None = None) -> Metric:
            family = CounterMetricFamily(
                f"facediffuser_{metric}", text, labels=["stage", label] if label else ["stage"]
            )
            for key, value in values.items():
                family.add_metric([*name, key] if label else name, value)
            return family

        totals: Counts = state["totals"]
        done, seconds = state["rows"], state["seconds"]
        left = stage.rows - stage.finished - done
        yield from gauge("running", "1 while the stage runs, 0 when it has ended", state["running"])
        yield from gauge("rows_planned", "Rows of the whole, those of earlier runs included", stage.rows)
        yield from gauge(
            "rows_finished", "Rows that are finished, those of earlier runs included", stage.finished + done
        )
        yield from gauge("workers", "Workers there are at most", state["workers"])
        yield from gauge("units_queued", "Units of work that no worker has begun", state["queued"])
        yield from gauge("last_progress_timestamp_seconds", "When the last unit was finished", state["progress_at"])
        yield from gauge(
            "seconds_left", "Seconds until the end at the mean rate so far", left * seconds / done if done else None
        )
        price = stage.limits.hour_price
        yield from gauge(
            "cost",
            "What the workers have cost in this run, by --gpu-hour-price",
            None if price is None else price * state["workers"] * seconds / 3600,
        )
        yield counter("rows", "Rows finished in this run", {"": done})
        yield counter("failed_rows", "Rows finished in this run that failed", {"": totals.get("failed", 0)})
        yield counter("bytes", "Bytes written in this run", {"": totals.get("bytes", 0)})
        yield counter("joules", "Energy that the GPUs' meters counted", {"": totals.get("joules", 0)})
        yield counter("retries", "Batches done once more, by what failed", totals.get("retries", {}), "kind")
        yield counter("worker_seconds", "Seconds of workers by part of the work", totals.get("seconds", {}), "part")


STAGES = StageMetrics()
"""The metrics of this process."""


@contextmanager
def metrics_served(port: int | None, address: str) -> Iterator[None]:
    """Serve the metrics of this process at http://ADDRESS:PORT/metrics within it; nothing where the port is None.

    Raises:
        InputError: the address or port cannot be had.
    """
    if port is None:
        yield
        return
    registry = CollectorRegistry()
    registry.register(STAGES)
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        raise InputError(
            f"--metrics-port {port}: cannot be served at {address} ({error.strerror or error}); give another port"
        ) from None
    logger.info("metrics at http://%s:%d/metrics", address, server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
