"""The Ray Data pool of workers that make shards, and how it is asked to stop."""

import logging
import pickle
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import ray

from facediffuser.errors import InputError, Stopped
from facediffuser.tasks.ray_session import cluster_cpus, cluster_gpus

if TYPE_CHECKING:  # a worker's start is quicker without
    from facediffuser.generation.job import GenerationJob

logger = logging.getLogger(__name__)

MOST_BLOCKS = 10_000
CAUSES = 20


class Foreman:
    """Says to the workers whether to begin a shard, and counts those begun again; one small Ray actor a run."""

    def __init__(self):
        self.stopping, self.again = False, 0
        self._begun: set[int] = set()

    def begin(self, shard: int) -> bool:
        """Return whether a worker may begin a shard, and note that it was begun if so."""
        if not self.stopping:
            self.again += shard in self._begun
            self._begun.add(shard)
        return not self.stopping

    def stop(self) -> None:
        """Let nothing more be begun."""
        self.stopping = True

    def count_again(self) -> int:
        """Return how often a shard was begun that had been begun before, because its worker or its node died."""
        return self.again


class ShardActor:
    """A worker of the pool: one ShardGenerator, handed one shard at a time; only stats go back."""

    def __init__(self, job: "GenerationJob", foreman: Any):
        self.foreman = foreman
        self.generator = self.load(job)

    def load(self, job: "GenerationJob"):
        """Return what makes the shards."""
        import torch

        from facediffuser.generation.shard_generator import ShardGenerator

        if job.device == "cpu":
            torch.set_num_threads(job.made["threads"])
        return ShardGenerator(job)

    def make(self, shard: int) -> dict[str, Any]:
        """Make one shard and return its stats."""
        return self.generator(shard)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = int(row["shard"])
        if not self._may_begin(shard):
            return self._told({"shard": shard, "rows": 0}, skipped=True)
        try:
            return self._told(self.make(shard))
        except (InputError, OSError) as error:
            # Sent as a value: raised, it would reach the driver in Ray Data's words, and the shards in hand be lost.
            return self._told({"shard": shard, "rows": 0}, error=pickle.dumps(error))

    def _may_begin(self, shard: int) -> bool:
        try:
            return ray.get(self.foreman.begin.remote(shard))
        except ray.exceptions.RayError:
            return True  # the foreman's node is gone: nobody can ask for a stop any more, and the work goes on

    @staticmethod
    def _told(stats: dict[str, Any], skipped: bool = False, error: bytes = b"") -> dict[str, Any]:
        return {
            "shard": stats["shard"], "rows": stats["rows"], "skipped": skipped, "error": error, "ok": stats.get("ok", 0),
            "failed": stats.get("failed", 0), "bytes": stats.get("bytes", 0), "sha256": stats.get("sha256", ""),
            "found": stats.get("found", False), "put": stats.get("put", False), "seconds": stats.get("seconds", {}),
            "retries": sum(stats.get("retries", {}).values()),
        }  # fmt: skip


class RepairActor(ShardActor):
    """A worker that makes shards that are there again; `again` holds what `ShardGenerator.again` is told of each."""

    def __init__(self, job: "GenerationJob", foreman: Any, again: dict[int, dict[str, Any]]):
        super().__init__(job, foreman)
        self.again = again

    def make(self, shard: int) -> dict[str, Any]:
        return self.generator.again(shard, **self.again[shard])


class Work:
    """Shards in the hands of Ray's actor pool: iterate over it for the stats of each, once, as it is finished.

    The pool restarts actors that die and hands their shards out again, so a shard may be begun twice: it is put whole,
    with the same bytes. After `stop` the shards in hand are finished and the iteration ends with `Stopped`. When a
    worker meets an InputError or an OSError (StorageError is one), the others finish theirs and it is raised here.
    """

    def __init__(self, job: "GenerationJob", shards: list[int], actor: type[ShardActor] = ShardActor, **given: Any):
        self.job, self.shards, self.actor, self.given = job, shards, actor, given
        self.fewest, self.most = job.pool.size(cluster_gpus() if job.device == "cuda" else 0, max(1, len(shards)))
        self.done: set[int] = set()
        self.skipped: set[int] = set()
        self._foreman = None
        self._asked = False

    @property
    def queued(self) -> int:
        """How many shards wait for a worker, if all workers are at work."""
        return max(0, len(self.shards) - len(self.done) - self.most)

    @property
    def begun_again(self) -> int:
        """How often a shard was begun once more, because a worker or its node died."""
        if self._foreman is None:
            return 0
        try:
            return ray.get(self._foreman.count_again.remote(), timeout=5)
        except ray.exceptions.RayError:
            return 0

    def stop(self) -> None:
        """Ask the workers to begin nothing more."""
        self._asked = True
        if self._foreman is not None:
            self._foreman.stop.remote()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.shards:
            return
        self._foreman = ray.remote(num_cpus=0, max_restarts=-1)(Foreman).remote()
        if self._asked:
            self._foreman.stop.remote()
        failure: Exception | None = None
        try:
            for row in self._rows().iter_rows():
                shard = row["shard"]
                if row["error"]:
                    failure = failure or pickle.loads(row["error"])
                    logger.error("shard %d: %s; the others in hand are finished, then the run ends", shard, failure)
                    self.stop()
                elif row["skipped"]:
                    self.skipped.add(shard)
                elif shard not in self.done:
                    self.done.add(shard)
                    yield row
        except Exception as error:
            cause = workers_error(error)
            if cause is None:
                raise
            raise cause from None
        finally:
            ray.kill(self._foreman)
            self._foreman = None
        if failure is not None:
            raise failure
        if self.skipped - self.done:
            left = len(self.skipped - self.done)
            raise Stopped(f"stopped by SIGTERM, the shards in hand finished, {left} left; run the same command again")
        if self.done != set(self.shards):
            raise RuntimeError(f"shards {sorted(set(self.shards) - self.done)[:10]} did not come back from Ray")

    def _rows(self) -> "ray.data.Dataset":
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        gpu = self.job.device == "cuda"
        threads = self.job.made.get("threads") or 1
        cpus = 1 if gpu else max(1, min(threads, cluster_cpus() // self.fewest))
        return ray.data.from_items(
            [{"shard": shard} for shard in self.shards], override_num_blocks=min(len(self.shards), MOST_BLOCKS)
        ).map(
            self.actor,
            fn_constructor_kwargs={"job": self.job, "foreman": self._foreman, **self.given},
            # One shard in the hands of each: what waits can go to whoever is free, and a stop need not wait for it.
            compute=ray.data.ActorPoolStrategy(
                min_size=self.fewest, max_size=self.most, max_tasks_in_flight_per_actor=1
            ),
            num_cpus=cpus,
            num_gpus=1 if gpu else None,
        )


@contextmanager
def stopped_by_sigterm(work: Work) -> Iterator[None]:
    """Within it SIGTERM stops the work after the shards in hand; a second SIGTERM does what it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        logger.warning("SIGTERM: the shards in hand are finished, then the run stops; a second one stops it at once")
        work.stop()

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def workers_error(error: BaseException | None) -> Exception | None:
    """Return the error of a worker that a user can act on, out of what Ray wraps around it; None for any other."""
    for _ in range(CAUSES):
        if error is None:
            return None
        if isinstance(error, ray.exceptions.RayTaskError):
            error = error.cause
        elif isinstance(error, (InputError, OSError)):
            return error
        else:
            error = error.__cause__
    return None
