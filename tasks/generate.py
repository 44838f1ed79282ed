"""The stages of `generate-dataset` as Prefect tasks, and the Ray Data pool that makes the shards."""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from prefect import task

from facediffuser.dataset.card import write_card
from facediffuser.dataset.manifest import Manifest, build_manifest, shard_entry, write_manifest
from facediffuser.dataset.shards import finished_shards
from facediffuser.errors import InputError
from facediffuser.generation import GenerateSettings, GenerationJob
from facediffuser.generation.job import Prepared, prepare
from tasks.progress import Progress
from tasks.ray_session import cluster_cpus, cluster_gpus, connect_ray

logger = logging.getLogger(__name__)

MOST_BLOCKS = 10_000
READERS = 16


class FailedRowsError(RuntimeError):
    """More rows failed than the settings allow; the dataset is complete and says which and why."""


class ShardActor:
    """A worker of the pool: one ShardGenerator, handed one shard at a time; only stats go back."""

    def __init__(self, job: GenerationJob, threads: int):
        import torch

        from facediffuser.generation.worker import ShardGenerator

        if job.device == "cpu":
            torch.set_num_threads(threads)
        self.generator = ShardGenerator(job)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        stats = self.generator(int(row["shard"]))
        return {"shard": stats["shard"], "rows": stats["rows"], "failed": stats.get("failed", 0),
                "found": stats.get("found", False), "seconds": stats.get("seconds", {}),
                "retries": sum(stats.get("retries", {}).values())}  # fmt: skip


@task(name="plan-dataset", cache_policy=None, persist_result=False)
def plan_dataset(settings: GenerateSettings) -> Prepared:
    """Check the input and, unless it is a dry run, write the plan and the references."""
    connect_ray()
    prepared = prepare(settings, gpu=cluster_gpus() > 0)
    layout = prepared.job.layout
    logger.info("%s: %d images of %d subjects and %d prompts in %d shards, fingerprint %s", prepared.job.output,
                layout.rows, len(prepared.plan.subjects), len(prepared.plan.prompts), layout.shards,
                prepared.job.fingerprint[:12])  # fmt: skip
    if not settings.dry_run:
        started = time.monotonic()
        written = prepared.write()
        logger.info("plan: %d objects written in %.1f s", written, time.monotonic() - started)
    return prepared


@task(name="generate-shards", cache_policy=None, persist_result=False)
def generate_shards(job: GenerationJob) -> dict[str, Any]:
    """Make the shards that are missing; return how many were kept and made, and what the workers spent."""
    layout, store = job.layout, job.store()
    finished = finished_shards(store, layout, job.fingerprint)
    missing = [shard for shard in range(layout.shards) if shard not in finished]
    logger.info("%d of %d shards are finished, %d to make", len(finished), layout.shards, len(missing))
    failed, retries, started = 0, 0, time.monotonic()
    spent: dict[str, float] = {}
    with Progress(layout.rows, "images", "Generate") as progress:
        progress.advance(sum(layout.shard_rows(shard) for shard in finished))
        for stats in drive(job, missing):
            failed += stats["failed"]
            retries += stats["retries"]
            for stage, seconds in stats["seconds"].items():
                spent[stage] = spent.get(stage, 0.0) + (seconds or 0.0)
            progress.advance(stats["rows"], f"{failed} failed, {retries} retries")
    seconds = time.monotonic() - started
    busy = spent.get("denoise", 0.0) / spent["total"] if spent.get("total") else 0.0
    if missing:
        logger.info("denoising took %.0f%% of the workers' time; %s", 100 * busy,
                    ", ".join(f"{stage} {value:.1f} s" for stage, value in sorted(spent.items())))  # fmt: skip
    return {"kept": len(finished), "made": len(missing), "seconds": round(seconds, 3), "busy": round(busy, 4)}


def drive(job: GenerationJob, shards: list[int]) -> Iterator[dict[str, Any]]:
    """Have Ray's actor pool make the shards; yield the stats of each once, as it is finished.

    The pool restarts actors that die and hands their shards out again, so a shard may be begun twice: it is put whole,
    with the same bytes. Raises what a worker raised.
    """
    if not shards:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    gpus = cluster_gpus() if job.device == "cuda" else 0
    workers = min(job.settings.workers or gpus or 1, len(shards))
    cpus = 1 if gpus else job.settings.cpus_per_worker or max(1, cluster_cpus() // workers)
    rows = ray.data.from_items(
        [{"shard": shard} for shard in shards], override_num_blocks=min(len(shards), MOST_BLOCKS)
    ).map(
        ShardActor,
        fn_constructor_kwargs={"job": job, "threads": cpus},
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        num_gpus=1 if gpus else None,
    )
    done: set[int] = set()
    try:
        for row in rows.iter_rows():
            if row["shard"] not in done:
                done.add(row["shard"])
                yield row
    except Exception as error:
        told = _input_error(error)
        if told is None:
            raise
        raise told from error
    if done != set(shards):
        raise RuntimeError(f"shards {sorted(set(shards) - done)[:10]} did not come back from Ray")


@task(name="finish-dataset", cache_policy=None, persist_result=False)
def finish_dataset(job: GenerationJob) -> Manifest:
    """Write the card and, last, the manifest; raise when shards are missing or too many rows failed."""
    layout, store = job.layout, job.store()
    finished = finished_shards(store, layout, job.fingerprint)
    missing = sorted(set(range(layout.shards)) - finished.keys())
    if missing:
        raise RuntimeError(f"{store.url}: {len(missing)} shards are missing, {layout.shard_key(missing[0])} first; "
                           "run the same command again")  # fmt: skip
    with ThreadPoolExecutor(READERS) as pool:
        numbers = sorted(finished)
        entries = list(pool.map(lambda shard: shard_entry(store, layout, shard, finished[shard]), numbers))
    manifest = build_manifest(job.fingerprint, job.run, layout, entries)
    write_card(store)
    write_manifest(store, manifest)
    counts = manifest.counts
    logger.info("%s: %d rows, %d ok, %d failed, in %d shards", store.url, counts.rows, counts.ok, counts.failed,
                counts.shards)  # fmt: skip
    if counts.failed > job.settings.max_failed * counts.rows:
        raise FailedRowsError(
            f"{store.url}: {counts.failed} of {counts.rows} rows failed, more than --max-failed "
            f"{job.settings.max_failed:g}; their errors are in the column `error`"
        )
    return manifest


def _input_error(error: BaseException | None) -> InputError | None:
    """The user's own error inside of what Ray wraps around it."""
    while error is not None:
        if isinstance(error, InputError):
            return InputError(str(getattr(error, "cause", error)))
        error = getattr(error, "cause", None) or error.__cause__
    return None
