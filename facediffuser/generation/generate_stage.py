"""Generation as a stage: the units are shards, a worker holds the models and generates one shard after another."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from facediffuser.batch_stage import Counts, Results, Stage, Unit
from facediffuser.generation.job import GenerationJob
from facediffuser.number_words import counted


class ShardWorker:
    """Generates the shards that are missing; `unit.data` is the shard's number. Returns the shard's stats."""

    def __init__(self, job: GenerationJob):
        job.set_threads()
        self.generator = self.load(job)

    def load(self, job: GenerationJob):
        """Return what generates shards."""
        from facediffuser.generation.shard_generator import ShardGenerator

        return ShardGenerator(job)

    def __call__(self, unit: Unit) -> Counts:
        return self.generator(unit.data)


class ReplacementWorker(ShardWorker):
    """Generates shards that may be there; `unit.data` holds the arguments of `ShardGenerator.replace`."""

    def __call__(self, unit: Unit) -> Counts:
        return self.generator.replace(**unit.data)


def generate_stage(
    job: GenerationJob,
    missing: Iterable[int],
    finish: Callable[[Results], Any],
    worker: type[ShardWorker] = ShardWorker,
    observe: Callable[[Counts], None] = lambda counts: None,
) -> Stage:
    """Return the stage that generates the missing shards of a run.

    Args:
        job: the run.
        missing: numbers of the shards.
        finish: called with the results at the end.
        worker: what generates shards.
        observe: called with each shard's stats as they arrive.
    """
    units = [Unit(job.layout.shard_key(shard), job.layout.shard_rows(shard), shard) for shard in missing]
    finished = job.layout.rows - sum(unit.rows for unit in units)
    return Stage(
        "Generate", "images", job.run, units, functools.partial(worker, job), finish, finished, job.pool,
        limits=job.limits, describe=describe_totals, observe=observe,
    )  # fmt: skip


def replacement_stage(
    job: GenerationJob,
    name: str,
    wanted: Mapping[int, dict[str, Any]],
    observe: Callable[[Counts], None] = lambda counts: None,
) -> Stage:
    """Return the stage that generates some shards of a finished dataset.

    Args:
        job: the dataset's run.
        name: the stage's name, for example "Repair".
        wanted: the arguments of `ShardGenerator.replace` by shard.
        observe: called with each shard's stats as they arrive.
    """
    units = [
        Unit(job.layout.shard_key(shard), job.layout.shard_rows(shard), {"shard": shard, **wanted[shard]})
        for shard in sorted(wanted)
    ]
    return Stage(
        name, "images", job.run, units, functools.partial(ReplacementWorker, job), pool=job.pool,
        limits=job.limits, describe=describe_totals, observe=observe,
    )  # fmt: skip


def denoising_share(totals: Counts) -> float:
    """Return the share of the workers' time in shards that denoising took: what a GPU was busy with, in [0, 1]."""
    seconds = totals.get("seconds", {})
    return seconds.get("denoise", 0.0) / seconds["total"] if seconds.get("total") else 0.0


def describe_totals(totals: Counts) -> str:
    """Return what an operator looks for: how busy workers are, retries and failures."""
    retries = sum(totals.get("retries", {}).values())
    return f"denoising {100 * denoising_share(totals):.0f}%, {counted(retries, 'retry', 'retries')}, {totals.get('failed', 0)} failed"
