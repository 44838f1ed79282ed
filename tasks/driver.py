"""What both drivers have in common: a stage's units are followed to the end, with progress, SIGTERM and the results."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

from facediffuser.batch_stage import Counts, Results, Stage
from facediffuser.errors import Stopped
from facediffuser.tasks.progress import Progress

logger = logging.getLogger(__name__)


class Driver(Protocol):
    """Runs stages: `RayDriver` on a cluster, `LocalDriver` in this process."""

    @property
    def gpus(self) -> int:
        """GPUs there are for workers."""

    @property
    def cpus(self) -> int:
        """CPU cores there are for workers."""

    @property
    def gpu_gib(self) -> float:
        """Memory of the smallest GPU there is for workers, GiB; 0 where there is none."""

    def run(self, stage: Stage) -> Any:
        """Do the units of a stage and finish it; return what its `finish` returns.

        Raises:
            InputError, OSError: what a worker raised; the other units in hand are finished first.
            Stopped: SIGTERM arrived; the units in hand are finished, others were not begun.
        """


class Execution(Protocol):
    """Units being done: iterate for (key, counts) of each as it is finished, in any order."""

    stopping: bool

    def __iter__(self) -> Iterator[tuple[str, Counts]]: ...

    def stop(self) -> None:
        """Begin no more units; those in hand are finished."""

    def describe(self, unfinished: int) -> str:
        """Return a few words on the workers, for the progress line; `unfinished`: units that did not come back yet."""


def run_stage(stage: Stage, execution: Execution) -> Any:
    """Follow the units of a stage to the end and finish it; see `Driver.run`."""
    results, started = Results(), time.monotonic()
    rows = {unit.key: unit.rows for unit in stage.units}
    with Progress(stage.rows, stage.noun, stage.name) as progress, sigterm_calls(execution.stop):
        progress.skip(stage.finished)
        for key, counts in execution if rows else ():
            if results.add(key, counts):
                words = (stage.describe(results.totals), execution.describe(len(rows) - len(results.counts)))
                progress.advance(rows[key], ", ".join(filter(None, words)))
    missing = rows.keys() - results.counts.keys()
    if missing and execution.stopping:
        raise Stopped(
            f"stopped by SIGTERM, the units in hand finished, {len(missing)} left; run the same command again to resume"
        )
    if missing:
        raise RuntimeError(f"{len(missing)} units did not come back, {min(missing)} first")
    results.seconds = time.monotonic() - started
    return stage.finish(results)


@contextmanager
def sigterm_calls(stop: Callable[[], None]) -> Iterator[None]:
    """Within it the first SIGTERM calls `stop`; a second one does what it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        logger.warning("SIGTERM: the units in hand are finished, then the run stops; a second one stops it at once")
        stop()

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
