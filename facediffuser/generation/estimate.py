"""What a run would take: worker hours, bytes and money, from a rate that was measured."""

import itertools
import time
from typing import Any

import pyarrow as pa

from facediffuser.batch_stage import Counts, Unit
from facediffuser.errors import InputError
from facediffuser.generation.job import GenerationJob
from facediffuser.generation.measured_rate import Rate
from facediffuser.number_words import counted, duration

SHARD_SECONDS = 60.0
SHARD_BYTES = 512 << 20
MOST_SHARD_ROWS = 20_000


def rate_of_sample(job: GenerationJob, rows: list[dict], references: pa.Table, certified: bool = False) -> Rate:
    """Return the rate of making a few rows here, in memory; on a GPU they are made twice and the second time counts.

    Args:
        job: the run.
        rows: planned rows.
        references: a table of SUBJECTS_SCHEMA with their subjects.
        certified: measure what a row of the certificate takes, too.

    Raises:
        InputError: a row fails.
    """
    from facediffuser.dataset.shards import encode_shard
    from facediffuser.generation.certify import exact_job
    from facediffuser.generation.shard_generator import ShardGenerator, device_name

    generator = ShardGenerator(job, references=references)
    for _ in range(2 if job.device == "cuda" else 1):
        started = time.perf_counter()
        made = generator.rows(rows)
        size = len(encode_shard(made, job.shard_schema))
        seconds = time.perf_counter() - started
    failed = [row["error"] for row in made if row["status"] == "failed"]
    if failed:
        raise InputError(f"the sample of {counted(len(rows), 'image')} failed ({failed[0]}); fix that before a run")
    both = None
    if certified and job.exact_settings is not None:
        pipeline = generator.pipeline.with_scheduler(job.exact_settings["scheduler"])
        exact = ShardGenerator(exact_job(job), pipeline, generator.scorers, references)
        for _ in range(2 if job.device == "cuda" else 1):
            started = time.perf_counter()
            exact.rows([row | job.exact_settings for row in rows])
            both = (seconds + time.perf_counter() - started) / len(rows)
    source = f"a sample of {counted(len(rows), 'image')}"
    return Rate(seconds / len(rows), size / len(rows), device_name(generator.device), source, both)


class SampleWorker:
    """Generates a few rows in memory, as `rate_of_sample` does; its counts are their `Rate`."""

    def __init__(self, job: GenerationJob, rows: list[dict[str, Any]], references: pa.Table, certified: bool):
        job.set_threads()
        self.given = job, rows, references, certified

    def __call__(self, unit: Unit) -> Counts:
        """Measure; the unit only names the work."""
        return vars(rate_of_sample(*self.given))


def shard_size_for(rate: Rate, batch_size: int) -> int:
    """Return the rows of a shard that takes a worker about a minute: 1, 2 or 5 times a power of ten batches.

    So coarse, it comes out the same when a rate is measured once more. A shard is in a worker's memory as a whole, so
    it has at most SHARD_BYTES.

    Args:
        rate: what was measured.
        batch_size: the rows of a batch.
    """
    rows = min(SHARD_SECONDS / rate.seconds_per_image, SHARD_BYTES / rate.bytes_per_image, MOST_SHARD_ROWS)
    series = (step * 10**power for power in itertools.count() for step in (1, 2, 5))
    batches = list(itertools.takewhile(lambda count: count * batch_size <= rows, series))
    return (batches or [1])[-1] * batch_size


def estimate(
    images: int,
    rate: Rate,
    hour_price: float | None,
    certificate_rows: int = 0,
    workers: int = 1,
    shard_size: int | None = None,
) -> dict[str, float | str | None]:
    """Return what some images take; starting up is not in it.

    Args:
        images: how many.
        rate: what was measured.
        hour_price: of a worker's hour, in any currency; None gives no price.
        certificate_rows: how many of them are made in both modes for a certificate.
        workers: how many make them at once.
        shard_size: how many of them one worker makes before it takes more; None shares them evenly.

    Returns:
        Time by the clock with that many workers, in words and in hours; hours of one worker (of one GPU, on GPUs), bytes,
        and money if a price is given; with certificate_rows their hours, which are in all of these, too, None where the
        rate does not tell them.
    """
    certificate = None if rate.certificate_seconds is None else certificate_rows * rate.certificate_seconds / 3600
    hours = images * rate.seconds_per_image / 3600 + (certificate or 0.0)
    shards = -(-images // (shard_size or 1))
    longest = min(images, -(-shards // workers) * (shard_size or 1))  # images of the worker that ends last
    wall_hours = longest * rate.seconds_per_image / 3600 + (certificate or 0.0) / workers
    found: dict[str, float | str | None] = {
        "wall_time": f"{duration(3600 * wall_hours)} with {counted(workers, 'worker')}, after the models are loaded",
        "wall_hours": round(wall_hours, 4),
        "worker_hours": round(hours, 4),
        "bytes": round(images * rate.bytes_per_image),
        "images_per_second_per_worker": round(1 / rate.seconds_per_image, 4),
        "device": rate.device,
        "measured_by": rate.source,
    }
    if certificate_rows:
        found["certificate_hours"] = None if certificate is None else round(certificate, 4)
    if hour_price is not None:
        found["cost"] = round(hours * hour_price, 2)
    return found
