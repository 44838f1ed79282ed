"""The stages of `generate-dataset` as Prefect tasks."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import ray
from prefect import task

from facediffuser.cards.dataset_card import write_card
from facediffuser.dataset.added_columns import ADDED_PREFIX
from facediffuser.dataset.inputs import class_words_line
from facediffuser.dataset.manifest import (
    MANIFEST_KEY,
    Counts,
    ObjectEntry,
    build_manifest,
    object_entries,
    read_sound_manifest,
    shard_entry,
)
from facediffuser.dataset.other_run import require_same_run
from facediffuser.dataset.seal import seal
from facediffuser.dataset.shards import finished_shards
from facediffuser.errors import InputError, RunError
from facediffuser.evaluation.tables import ScoreRow
from facediffuser.generation.estimate import Rate, estimate, rate_of_dataset, rate_of_sample
from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.generation.job import GenerationJob, Prepared, prepare
from facediffuser.storage import Store, lasting_name
from facediffuser.tasks.pool import ShardActor, Work, stopped_by_sigterm, workers_error
from facediffuser.tasks.progress import Progress
from facediffuser.tasks.ray_session import cluster_cpus, cluster_gpus, connect_ray
from facediffuser.tasks.spending import follow

logger = logging.getLogger(__name__)

READERS = 16
# Names of models and scorers that are no paths, whatever lies in the working folder.
KEPT_NAMES = ("miniature", "paper")


class Finished(NamedTuple):
    """What a finished dataset holds, and its means of IP and PC."""

    counts: Counts
    table: list[ScoreRow]


class FailedRowsError(RunError):
    """More rows failed than the settings allow; the dataset is complete and says which and why."""


@task(name="plan-dataset", cache_policy=None, persist_result=False)
def plan_dataset(settings: GenerateSettings) -> Prepared:
    """Check the input and, unless it is a dry run, write the plan and the references."""
    connect_ray()
    gpu = cluster_gpus() > 0
    threads = max(1, cluster_cpus() // (settings.workers or settings.max_workers or 1))
    prepared = prepare(settings, gpu=gpu, threads=threads)
    layout = prepared.job.layout
    logger.info("%s: %d images of %d subjects and %d prompts in %d shards, fingerprint %s", prepared.job.output,
                layout.rows, len(prepared.plan.subjects), len(prepared.plan.prompts), layout.shards,
                prepared.job.fingerprint[:12])  # fmt: skip
    logger.info("%s", class_words_line(prepared.plan.subjects))
    if not settings.dry_run:
        started = time.monotonic()
        written = prepared.write()
        logger.info("plan: %d objects written in %.1f s", written, time.monotonic() - started)
    return prepared


@task(name="estimate-run", cache_policy=None, persist_result=False)
def estimate_run(settings: GenerateSettings, prepared: Prepared) -> dict[str, Any]:
    """Return what a run would take, from a dataset's rate or from one batch that a worker makes in memory."""
    if settings.measured_by:
        rate = rate_of_dataset(settings.measured_by)
    else:
        job = prepared.job
        rows = next(prepared.plan.tables(job.batch_size)).to_pylist()
        gpu = job.device == "cuda"
        sample = ray.remote(num_cpus=1, num_gpus=1 if gpu else 0)(_sample)
        try:
            rate = ray.get(sample.remote(job, rows, prepared.references))
        except Exception as error:
            cause = workers_error(error)
            if cause is None:
                raise
            raise cause from None
    return estimate(prepared.job.layout.rows, rate, settings.gpu_hour_price)


def _sample(job: GenerationJob, rows: list[dict[str, Any]], references: pa.Table) -> Rate:
    if job.device == "cpu":
        import torch

        torch.set_num_threads(job.made["threads"])
    return rate_of_sample(job, rows, references)


@task(name="generate-shards", cache_policy=None, persist_result=False)
def generate_shards(job: GenerationJob, actor: type[ShardActor] = ShardActor) -> dict[str, Any]:
    """Make the shards that are missing; return how many were kept and made, and what the workers spent.

    Raises Stopped when the process is told to end (SIGTERM), after the shards in hand.
    """
    layout, store = job.layout, job.store()
    finished = finished_shards(store, layout, job.fingerprint)
    missing = [shard for shard in range(layout.shards) if shard not in finished]
    logger.info("%d of %d shards are finished, %d to make", len(finished), layout.shards, len(missing))
    started = time.monotonic()
    kept = sum(layout.shard_rows(shard) for shard in finished)
    work = Work(job, missing, actor)
    with Progress(layout.rows, "images", "Generate") as progress, stopped_by_sigterm(work):
        progress.skip(kept)
        spent = follow(work, progress)
    seconds = time.monotonic() - started
    if missing:
        logger.info("denoising took %.0f%% of the workers' time; %s", 100 * spent.busy, spent.stages())
    return {"kept": len(finished), "made": len(missing), "seconds": round(seconds, 3), "busy": round(spent.busy, 4)}


def _added_before(store: Store) -> list[ObjectEntry]:
    """The entries of columns added to a dataset that is finished once more: later damage to them is still found."""
    if not store.exists(MANIFEST_KEY):
        return []
    try:
        objects = read_sound_manifest(store).objects
    except InputError as error:
        logger.warning("%s; written anew, its digests of scores/ are lost", error)
        return []
    return [entry for entry in objects if entry.key.startswith(ADDED_PREFIX)]


@task(name="finish-dataset", cache_policy=None, persist_result=False)
def finish_dataset(job: GenerationJob) -> Finished:
    """Write the card and, last, the manifest. Raise when shards are missing or too many rows failed."""
    layout, store = job.layout, job.store()
    require_same_run(store, job.fingerprint, job.run)
    finished = finished_shards(store, layout, job.fingerprint)
    missing = sorted(set(range(layout.shards)) - finished.keys())
    if missing:
        raise RuntimeError(f"{store.url}: {len(missing)} shards are missing, {layout.shard_key(missing[0])} first; "
                           "run the same command again")  # fmt: skip
    with ThreadPoolExecutor(READERS) as pool:
        numbers = sorted(finished)
        entries = list(pool.map(lambda shard: shard_entry(store, layout, shard, finished[shard]), numbers))
    places = {name: lasting_name(getattr(job, name), KEPT_NAMES) for name in ("models", "scorers")}
    table = write_card(store)
    objects = [*object_entries(store, layout), *_added_before(store)]
    manifest = seal(store, build_manifest(job.fingerprint, job.run, layout, entries, objects, places))
    counts = manifest.counts
    logger.info("%s: %d rows, %d ok, %d failed, in %d shards", store.url, counts.rows, counts.ok, counts.failed,
                counts.shards)  # fmt: skip
    if counts.failed > job.max_failed * counts.rows:
        raise FailedRowsError(
            f"{store.url}: {counts.failed} of {counts.rows} rows failed, more than --max-failed "
            f"{job.max_failed:g}; their errors are in the column `error`"
        )
    return Finished(counts, table)
