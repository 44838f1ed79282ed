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

LAST_SCRAPE_S = 20.0
"""Longer than the interval of infra/monitoring (15 s), and short enough for what a stopped pod has left after its notice."""


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


class _RunActive(Collector):
    """Whether the run works: 1 until it comes to an end of its own, whichever that is, then 0.

    A process that is killed, or whose machine is lost, never says 0: that is what the alert DriverGone sees.
    """

    def __init__(self) -> None:
        self._asked, self._ended, self._told = threading.Event(), threading.Event(), threading.Event()

    def collect(self) -> Iterator[Metric]:
        """Yield the metric; prometheus_client calls this."""
        self._asked.set()
        ended = self._ended.is_set()
        yield GaugeMetricFamily(
            "facediffuser_run_active", "1 while the run works, 0 when it has ended by itself", value=float(not ended)
        )
        if ended:
            self._told.set()

    def end(self, within_s: float) -> None:
        """Say 0 from now on, and wait until that was asked for; not where nobody ever asked."""
        self._ended.set()
        if self._asked.is_set():
            self._told.wait(within_s)


@contextmanager
def metrics_served(port: int | None, address: str, last_scrape_s: float = LAST_SCRAPE_S) -> Iterator[None]:
    """Serve the metrics of this process at http://ADDRESS:PORT/metrics within it; nothing where the port is None.

    Args:
        port: 0: a free one.
        address: that of an interface of this machine.
        last_scrape_s: seconds that it waits at its end for whoever scraped it before to see that the run has ended.

    Raises:
        InputError: the address or port cannot be had.
    """
    if port is None:
        yield
        return
    registry, active = CollectorRegistry(), _RunActive()
    registry.register(STAGES)
    registry.register(active)
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
        active.end(last_scrape_s)
        server.shutdown()
        server.server_close()
        thread.join()
