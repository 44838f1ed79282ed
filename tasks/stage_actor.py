"""What runs in Ray's processes for a stage: the actor of the pool, the reader, and the gate they ask.

Prefect is not imported here: a worker starts seconds earlier without.
"""

import logging
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray

from facediffuser.batch_stage import Counts, Unit
from facediffuser.errors import InputError
from facediffuser.json_log import about, json_requested, log_json

logger = logging.getLogger(__name__)


class Gate:
    """Says to workers whether they may begin a unit, and counts units that are begun twice; one Ray actor a run."""

    def __init__(self):
        self.stopping, self.restarts = False, 0
        self._begun: set[str] = set()

    def begin(self, key: str) -> bool:
        """Return whether a unit may begin; one that began before counts as a restart."""
        if not self.stopping:
            self.restarts += key in self._begun
            self._begun.add(key)
        return not self.stopping

    def stop(self) -> None:
        """Let no further unit begin."""
        self.stopping = True

    def is_open(self) -> bool:
        """Return whether further units may begin."""
        return not self.stopping

    def count_restarts(self) -> int:
        """Return how many units began more than once, because their worker was lost."""
        return self.restarts


class StageActor:
    """A worker of the pool. What it returns is one row of Ray Data: the unit's key, its counts or an error."""

    def __init__(
        self, worker: Callable[[], Callable[[Unit], Counts]], gate: Any, run: str = "", json_lines: bool = False
    ):
        self.gate = gate
        self.names = {"run": run, "worker": ray.get_runtime_context().get_actor_id()[:12]}
        if json_lines or json_requested():  # the node was started without a word of it
            log_json(logging.getLogger("facediffuser"))
        self.error: Exception | None = None
        try:
            self.worker = worker()
        except (InputError, OSError) as error:
            # Raised, it would reach the driver in Ray's words, after many restarts of this actor.
            self.error = error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["error"]:
            return _row("the source", error=row["error"])
        unit = pickle.loads(row["unit"])
        if not _ask(self.gate.begin, unit.key):
            return _row(unit.key)
        if self.error is not None:
            return _row(unit.key, error=_portable(self.error))
        try:
            with about(**self.names, shard=unit.key):
                counts = self.worker(unit)
                logger.info("%s: done", unit.key)
            return _row(unit.key, counts=pickle.dumps(counts))
        except (InputError, OSError) as error:
            return _row(unit.key, error=_portable(error))


def _row(key: str, counts: bytes = b"", error: bytes = b"") -> dict[str, Any]:
    return {"key": key, "counts": counts, "error": error}


def _ask(method: Any, *arguments: Any) -> bool:
    try:
        return ray.get(method.remote(*arguments))
    except ray.exceptions.RayError:
        return True  # the gate's node is gone: nobody can ask for a stop any more, and the work goes on


def _portable(error: Exception) -> bytes:
    """Return an error pickled; one that cannot be read back as the same kind with the same text."""
    data = pickle.dumps(error)
    try:
        pickle.loads(data)
    except Exception:
        return pickle.dumps((InputError if isinstance(error, InputError) else OSError)(str(error)))
    return data


def read_units(batch: dict[str, Any], read: Callable[[], Iterable[Unit]], gate: Any) -> Iterator[dict[str, list]]:
    """Yield the units of a source that is read from beginning to end, as blocks of one."""
    try:
        for unit in read():
            if not _ask(gate.is_open):
                return
            yield {"unit": [pickle.dumps(unit)], "error": [b""]}
    except (InputError, OSError) as error:
        # Sent as a value: raised, the units in hand would be lost.
        yield {"unit": [b""], "error": [_portable(error)]}
