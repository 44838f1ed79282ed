"""The driver that does a stage's units on Ray: a pool of actors, each of which makes its worker once.

Ray Data's actor pool is the scheduler: it starts actors, restarts those that die and hands their units out a second
time. Only counts come back to this process.
"""

import logging
import pickle
from collections.abc import Iterator
from typing import Any

import ray

from facediffuser.batch_stage import Counts, Stage
from facediffuser.errors import InputError
from facediffuser.json_log import json_requested
from facediffuser.runs import fingerprint_of
from facediffuser.tasks.driver import run_stage
from facediffuser.tasks.ray_session import cluster_cpus, cluster_gpus, connect_ray
from facediffuser.tasks.stage_actor import Gate, StageActor, read_units

logger = logging.getLogger(__name__)

MOST_BLOCKS = 10_000
MOST_CAUSES = 20
# No share of the CPUs: on a machine whose cores all belong to actors the one reader would wait for ever.
READER_CPUS = 0
READER_BLOCK_BYTES = 1 << 16


class RayDriver:
    """Runs stages on Ray: the cluster named by RAY_ADDRESS, or one started for this process, once it is needed."""

    @property
    def gpus(self) -> int:
        """GPUs of the cluster now."""
        connect_ray()
        return cluster_gpus()

    @property
    def gpu_gib(self) -> float:
        """Memory of the cluster's smallest GPU, GiB; 0 where there is none."""
        ask = ray.remote(num_cpus=0, num_gpus=1, scheduling_strategy="SPREAD")(_gpu_gib)
        return min(ray.get([ask.remote() for _ in range(self.gpus)]), default=0.0)

    @property
    def cpus(self) -> int:
        """CPU cores of the cluster now."""
        connect_ray()
        return cluster_cpus()

    def run(self, stage: Stage) -> Any:
        """Do the units of a stage and finish it; return what its `finish` returns. See `driver.Driver.run`."""
        return run_stage(stage, _Execution(stage, self.gpus, self.cpus))


def _gpu_gib() -> float:
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30


class _Execution:
    """Units in the hands of Ray's actor pool.

    After `stop`, or when a worker met an InputError or an OSError (StorageError is one), the units in hand are finished
    and no more are begun; the error is raised then.
    """

    def __init__(self, stage: Stage, gpus: int, cpus: int):
        self.stage, self.stopping = stage, False
        self.fewest, self.most = stage.pool.size(gpus, len(stage.units))
        # More cores than the machine has for each worker would never be given.
        self.cpus_each = max(1, min(stage.pool.cpus, cpus // self.fewest))
        self._gate: Any = None

    @property
    def workers(self) -> int:
        return self.most

    def __iter__(self) -> Iterator[tuple[str, Counts]]:
        self._gate = ray.remote(num_cpus=0, max_restarts=-1)(Gate).remote()
        if self.stopping:
            self.stop()
        failure: Exception | None = None
        try:
            for row in self._rows().iter_rows():
                if row["error"]:
                    error = pickle.loads(row["error"])
                    failure = failure or error
                    logger.error("%s: %s; the units in hand are finished, then the run ends", row["key"], error)
                    self._gate.stop.remote()
                elif row["counts"]:
                    yield row["key"], pickle.loads(row["counts"])
        except Exception as error:
            cause = error_of_worker(error)
            if cause is None:
                raise
            failure = failure or cause
        finally:
            ray.kill(self._gate)
            self._gate = None
        if failure is not None:
            raise failure from None

    def stop(self) -> None:
        self.stopping = True
        if self._gate is not None:
            self._gate.stop.remote()

    def describe(self, unfinished: int) -> str:
        return f"{max(0, unfinished - self.most)} queued, {self._count_restarts()} restarted"

    def _count_restarts(self) -> int:
        try:
            return ray.get(self._gate.count_restarts.remote(), timeout=5)
        except ray.exceptions.RayError:
            return 0

    def _rows(self) -> "ray.data.Dataset":
        stage = self.stage
        ray.data.DataContext.get_current().enable_progress_bars = False
        return self._units().map(
            StageActor,
            fn_constructor_kwargs={
                "worker": stage.worker,
                "gate": self._gate,
                "run": fingerprint_of(stage.identity)[:12],
                "json_lines": json_requested(),
            },
            # One unit in the hands of each: what waits can go to whoever is free, and a stop need not wait for it.
            compute=ray.data.ActorPoolStrategy(
                min_size=self.fewest, max_size=self.most, max_tasks_in_flight_per_actor=1
            ),
            num_cpus=self.cpus_each,
            num_gpus=1 if stage.pool.gpu else None,
        )

    def _units(self) -> "ray.data.Dataset":
        stage = self.stage
        if stage.read is None:
            items = [{"unit": pickle.dumps(unit), "error": b""} for unit in stage.units]
            return ray.data.from_items(items, override_num_blocks=min(len(items), MOST_BLOCKS))
        units = ray.data.from_items([0], override_num_blocks=1).map_batches(
            read_units, batch_size=None, num_cpus=READER_CPUS, fn_kwargs={"read": stage.read, "gate": self._gate}
        )
        # Ray Data gathers what a reader yields until a block is this large: a unit by itself must already be enough.
        units.context.target_max_block_size = READER_BLOCK_BYTES
        return units


def error_of_worker(error: BaseException | None) -> Exception | None:
    """Return the InputError or OSError of a worker out of what Ray wraps around it; None for any other error."""
    for _ in range(MOST_CAUSES):
        if error is None:
            return None
        if isinstance(error, ray.exceptions.RayTaskError):
            error = error.cause
        elif isinstance(error, (InputError, OSError)):
            return error
        else:
            error = error.__cause__
    return None
