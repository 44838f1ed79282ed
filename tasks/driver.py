"""What both drivers have in common: a stage's units are followed to the end, with progress, SIGTERM and the results."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

from facediffuser.batch_stage import Counts, Limits, Machines, Results, Stage
from facediffuser.errors import LimitReached, Stopped
from facediffuser.json_log import about
from facediffuser.number_words import counted
from facediffuser.runs import fingerprint_of
from facediffuser.tasks.metrics import STAGES
from facediffuser.tasks.progress import Progress

logger = logging.getLogger(__name__)


class Driver(Machines, Protocol):
    """Runs stages on its machines: `RayDriver` on a cluster, `LocalDriver` in this process."""

    def run(self, stage: Stage) -> Any:
        """Do the units of a stage and finish it; return what its `finish` returns.

        Raises:
            InputError, OSError: what a worker raised; the other units in hand are finished first.
            Stopped: SIGTERM arrived; the units in hand are finished, others were not begun.
            LimitReached: a limit of the stage was reached; likewise.
        """


class Execution(Protocol):
    """Units being done: iterate for (key, counts) of each as it is finished, in any order."""

    stopping: bool

    @property
    def workers(self) -> int:
        """Workers there are at most."""

    def __iter__(self) -> Iterator[tuple[str, Counts]]: ...

    def stop(self) -> None:
        """Begin no more units; those in hand are finished."""

    def describe(self, unfinished: int) -> str:
        """Return a few words on the workers, for the progress line.

        Args:
            unfinished: how many units did not come back yet.
        """


def run_stage(stage: Stage, execution: Execution) -> Any:
    """Follow the units of a stage to the end and finish it; see `Driver.run`."""
    results, started = Results(), time.monotonic()
    rows = {unit.key: unit.rows for unit in stage.units}
    state: dict[str, Any] = {"rows": 0, "progress_at": time.time(), "ended": None}

    def read() -> dict[str, Any]:
        left = len(rows) - len(results.counts)
        return {
            **state,
            "workers": execution.workers,
            "queued": max(0, left - execution.workers),
            "seconds": (state["ended"] or time.monotonic()) - started,
            "totals": dict(results.totals),
            "running": state["ended"] is None,
        }

    STAGES.follow(stage, read)
    with (
        about(run=fingerprint_of(stage.identity)[:12]),
        _ending(state),
        Progress(stage.rows, stage.noun, stage.name) as progress,
        sigterm_calls(execution.stop, stage.limits.grace_s),
        _limited(stage.limits, execution) as limited,
    ):
        progress.skip(stage.finished)
        for key, counts in execution if rows and not execution.stopping else ():
            if results.add(key, counts):
                stage.observe(counts)
                words = (stage.describe(results.totals), execution.describe(len(rows) - len(results.counts)))
                progress.advance(rows[key], ", ".join(filter(None, words)))
                state |= {"rows": state["rows"] + rows[key], "progress_at": time.time()}
    missing = rows.keys() - results.counts.keys()
    if missing and execution.stopping:
        left = f"the units in hand finished, {len(missing)} left; run the same command again to resume"
        if limited.reached:
            raise LimitReached(f"stopped at {limited.reached}, {left}")
        raise Stopped(f"stopped by SIGTERM, {left}")
    if missing:
        raise RuntimeError(f"{counted(len(missing), 'unit')} did not come back, {min(missing)} first")
    results.seconds = time.monotonic() - started
    return stage.finish(results)


@contextmanager
def _ending(state: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    finally:
        state["ended"] = time.monotonic()


class _Limited:
    """Stops an execution when its limit is reached; `reached` names the limit then."""

    def __init__(self, limits: Limits, execution: Execution):
        self.execution, self.reached = execution, ""
        self.timer: threading.Timer | None = None
        if first := limits.first(execution.workers):
            seconds, name = first
            if seconds <= 0:  # by what the run did before
                self._stop(name)
            else:
                self.timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._stop, (name,))

    def _stop(self, name: str) -> None:
        self.reached = name
        self.execution.stop()
        logger.warning("%s is reached: the units in hand are finished, then the run stops", name)


@contextmanager
def _limited(limits: Limits, execution: Execution) -> Iterator[_Limited]:
    limited = _Limited(limits, execution)
    if limited.timer:
        limited.timer.daemon = True
        limited.timer.start()
    try:
        with limits.counted(execution.workers):
            yield limited
    finally:
        if limited.timer:
            limited.timer.cancel()


@contextmanager
def sigterm_calls(stop: Callable[[], None], grace_s: float | None = None) -> Iterator[None]:
    """Within it the first SIGTERM calls `stop`; a second one does what it did before.

    Args:
        stop: ends the work in good order.
        grace_s: seconds after the first SIGTERM until Stopped is raised in the midst of the work: who sent it, a cloud
            that takes the machine back, kills what has not ended by then. None: never.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        logger.warning("SIGTERM: the units in hand are finished, then the run stops; a second one stops it at once")
        if grace_s is not None:
            signal.setitimer(signal.ITIMER_REAL, grace_s)
        stop()

    def abandon(number: int, frame: FrameType | None) -> None:
        raise Stopped(
            f"stopped by SIGTERM; what was in hand did not end within {grace_s:g} s and is abandoned; run the same "
            "command again to resume"
        )

    signal.signal(signal.SIGTERM, handle)
    alarm = signal.signal(signal.SIGALRM, abandon)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGTERM, before)
