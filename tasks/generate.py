"""The tasks of the flow `generate-dataset`: plan, estimate, and the stage that generates the shards."""

import functools
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from prefect import task

from facediffuser.batch_stage import Limits, Results, Stage, Unit, WorkerPool
from facediffuser.cards.card_facts import spent_lines
from facediffuser.cards.dataset_card import rewrite_card, write_card
from facediffuser.dataset.certificate import (
    CERTIFICATE_SCHEMA,
    dataset_certificate,
    sample_size,
    stats_key,
    summary_bytes,
    summary_key,
)
from facediffuser.dataset.extension import (
    UNFINISHED_REFERENCES,
    add_references,
    encode_references_of_parts,
    finished_part,
    read_references,
)
from facediffuser.dataset.inputs import class_words_line
from facediffuser.dataset.manifest import (
    ChangedError,
    Counts,
    Manifest,
    Part,
    ShardEntry,
    build_manifest,
    build_part,
    find_manifest,
    object_entry,
    read_sound_manifest,
    shard_entry,
)
from facediffuser.dataset.other_run import require_same_run
from facediffuser.dataset.plan import MOST_SHARDS, Layout, part_names
from facediffuser.dataset.reading import read_columns
from facediffuser.dataset.references import references_marks
from facediffuser.dataset.schema import SUBJECTS_KEY
from facediffuser.dataset.seal import KEPT_ENTRIES, seal
from facediffuser.dataset.shards import finished_shards
from facediffuser.dataset.spending import Spent, add_up, read_spent, total_spent, write_spent
from facediffuser.errors import RunError
from facediffuser.evaluation.certificate_summary import failure, summarise
from facediffuser.evaluation.tables import ScoreRow
from facediffuser.generation.certify import CertificateWorker, certificate_parts, certificate_stage, missing_parts
from facediffuser.generation.estimate import SampleWorker, estimate, shard_size_for
from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.generation.generate_stage import ShardWorker, denoising_share, generate_stage
from facediffuser.generation.job import GenerationJob, Prepared, prepare
from facediffuser.generation.measured_rate import Rate, rate_of_dataset
from facediffuser.number_words import counted
from facediffuser.runs import HARDWARE, Document, Run, different_provenances, provenance_differences, shown
from facediffuser.storage import Store, lasting_name
from facediffuser.storage.reading import parse_json, read_json_object
from facediffuser.tasks.chosen_driver import chosen_driver
from facediffuser.tasks.driver import Driver
from facediffuser.tasks.retrying import RETRIES

logger = logging.getLogger(__name__)

READERS = 16
FEW_BATCHES = 8
# Times that a run is finished anew because another driver of the same run finished it meanwhile.
FINISH_TRIES = 3
# Names of models and scorers that are no paths, whatever lies in the working folder.
KEPT_NAMES = ("miniature", "paper")


class Finished(NamedTuple):
    """What a finished dataset holds, its means of IP and PC, and what its certificate says, if it has one."""

    counts: Counts
    table: list[ScoreRow]
    certificate: dict[str, Any] | None = None


class FailedRowsError(RunError):
    """More rows failed than the settings allow; the dataset is complete and says which and why."""


class CertificateError(RunError):
    """Fast mode lost more than the settings allow; the dataset is complete, and its certificate says how much."""


@task(name="plan-dataset", cache_policy=None, persist_result=False, **RETRIES)
def plan_dataset(settings: GenerateSettings) -> Prepared:
    """Check the input and, unless it is a dry run, write the plan and the references."""
    driver = chosen_driver()
    prepared = prepare(settings, driver)
    if prepared.free_shard_size:
        prepared = _with_measured_shards(settings, prepared, driver)
    layout = prepared.job.layout
    if settings.extend and not layout.rows:
        logger.info("%s: has all rows of %s", prepared.job.output, _inputs(prepared))
        return prepared
    logger.info("%s: %s of %s in %s, fingerprint %s", prepared.job.output,
                counted(layout.rows, "new image" if layout.name else "image"), _inputs(prepared),
                counted(layout.shards, "shard"), prepared.job.fingerprint[:12])  # fmt: skip
    logger.info("%s", class_words_line(prepared.plan.subjects))
    if not settings.dry_run:
        started = time.monotonic()
        written = prepared.write()
        logger.info("plan: %s written in %.1f s", counted(written, "object"), time.monotonic() - started)
    return prepared


def _inputs(prepared: Prepared) -> str:
    return f"{counted(len(prepared.plan.subjects), 'subject')} and {counted(len(prepared.plan.prompts), 'prompt')}"


@task(name="estimate-run", cache_policy=None, persist_result=False, **RETRIES)
def estimate_run(settings: GenerateSettings, prepared: Prepared) -> dict[str, Any]:
    """Return what a run would take, from a dataset's rate or from one batch that a worker generates in memory."""
    job = prepared.job
    driver = chosen_driver()
    rate = _rate(settings, prepared, driver, certified=job.exact_settings is not None)
    sample = sample_size(job.layout.rows) if job.exact_settings else 0
    workers = job.pool.at_once(driver.gpus, driver.cpus, job.layout.shards)
    return estimate(job.layout.rows, rate, settings.gpu_hour_price, sample, workers, job.layout.shard_size)


def _with_measured_shards(settings: GenerateSettings, prepared: Prepared, driver: Driver) -> Prepared:
    """Return the run with shards of about a minute; what is only a few batches is one shard and not worth measuring."""
    job = prepared.job
    if job.layout.rows <= FEW_BATCHES * job.batch_size:
        return prepared
    rate = _rate(settings, prepared, driver)
    rows = max(shard_size_for(rate, job.batch_size), -(-job.layout.rows // MOST_SHARDS))
    logger.info("shards of %s: %.2f s an image by %s", counted(rows, "image"), rate.seconds_per_image, rate.source)
    return prepared.with_shard_size(rows)


def _rate(settings: GenerateSettings, prepared: Prepared, driver: Driver, certified: bool = False) -> Rate:
    """Return the rate of a dataset or of a batch; `certified`: that of a certificate's rows, too."""
    if settings.measured_by:
        return rate_of_dataset(settings.measured_by)
    job = prepared.job
    rows = next((prepared.rows or prepared.plan).tables(job.batch_size)).to_pylist()
    stage = Stage(
        "Sample", "images", job.run, [Unit("sample", len(rows))],
        functools.partial(SampleWorker, job, rows, prepared.references, certified),
        finish=lambda results: Rate(**results.counts["sample"]),
        pool=WorkerPool(1, cpus=job.threads or 1, gpu=job.device == "cuda"), limits=Limits(grace_s=job.limits.grace_s),
    )  # fmt: skip
    return driver.run(stage)


@task(name="generate-shards", cache_policy=None, persist_result=False, **RETRIES)
def generate_shards(job: GenerationJob, worker: type[ShardWorker] = ShardWorker) -> dict[str, Any]:
    """Generate the shards that are missing; return how many were there and generated, and what the workers spent.

    Raises:
        Stopped: SIGTERM arrived; the shards in hand are finished.
        InputError: shards are there of another provenance, and the job demands the exact one.
    """
    layout, store = job.layout, job.store()
    finished = finished_shards(store, layout, job.fingerprint)
    missing = [shard for shard in range(layout.shards) if shard not in finished]
    logger.info("%d of %s finished, %d to generate", len(finished), counted(layout.shards, "shard"), len(missing))
    recorded = different_provenances(one.marks.provenance for one in finished.values())
    if missing:
        job = job.with_recorded(recorded)

    def finish(results: Results) -> dict[str, Any]:
        busy, seconds = denoising_share(results.totals), results.totals.get("seconds", {})
        if missing:
            stages = ", ".join(f"{name} {spent:.1f} s" for name, spent in sorted(seconds.items()))
            logger.info("denoising took %.0f%% of the workers' time; %s", 100 * busy, stages)
        return {
            "kept": len(finished),
            "made": len(missing),
            "seconds": round(results.seconds, 3),
            "busy": round(busy, 4),
        }

    if not layout.rows:
        return {"kept": 0, "made": 0, "seconds": 0.0, "busy": 0.0}
    return chosen_driver().run(generate_stage(job, missing, finish, worker, _HardwareWarning(store.url, recorded)))


class _HardwareWarning:
    """Warns, once, when the first shard arrives that was computed on other hardware than one before.

    Other software is warned of when a run is resumed; which hardware the workers have is known only from their shards.
    """

    def __init__(self, url: str, recorded: list[Document]):
        self.url, self.warned = url, False
        self.first = next((one for one in recorded if "hardware" in one), None)

    def __call__(self, stats: dict[str, Any]) -> None:
        here = stats.get("computed_with")
        self.first = self.first or here
        if self.warned or not here or not self.first:
            return
        there, here = ({name: one[name] for name in HARDWARE if name in one} for one in (self.first, here))
        if found := provenance_differences(there, here):
            self.warned = True
            logger.warning("%s: shards are computed on different hardware (%s); the last bits may differ, and the manifest "
                           "lists them", self.url, shown(found))  # fmt: skip


@task(name="certify-dataset", cache_policy=None, persist_result=False, **RETRIES)
def certify_dataset(job: GenerationJob, worker: type[CertificateWorker] = CertificateWorker) -> dict[str, Any] | None:
    """Make what is missing of the certificate of a run in fast mode; return what it says, None for a run in exact mode.

    Raises:
        Stopped: SIGTERM arrived; the parts in hand are finished.
    """
    if job.exact_settings is None:
        return None
    if not job.layout.rows:  # nothing was added
        return None
    store, parts = job.store(), certificate_parts(job)
    missing = missing_parts(job, parts)
    rows = sum(len(places) for places in parts.values())
    logger.info("certificate: %d of %s also made in exact mode; %d of %s finished", rows, counted(job.layout.rows, "row"),
                len(parts) - len(missing), counted(len(parts), "part"))  # fmt: skip
    if missing:
        chosen_driver().run(certificate_stage(job, parts, missing, worker=worker))
    names = [name for name in CERTIFICATE_SCHEMA.names if name not in ("image", "image_sha256")]
    found = [row for key in parts for row in read_columns(store, key, names).to_pylist()]
    fix = "remove it, and run the same command again"
    timings = [read_json_object(store, stats_key(key), fix, {"seconds": dict}) for key in parts]
    summary = summarise(found, timings, job.max_loss)
    if dataset_certificate(store, job.layout.name) != summary:
        store.put(summary_key(job.layout.name), summary_bytes(summary))
    changes, speeds = summary["differences"], summary["images_per_second"]
    logger.info(
        "certificate %s: %s over %s, mask cells %s, SSIM %s, images/s %s fast and %s exact", summary["verdict"],
        ", ".join(f"{name} {one['mean']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})" for name, one in changes.items() if one["n"]),
        counted(summary["pairs"], "pair"), summary["mask_cells"], summary["ssim"], speeds["fast"], speeds["exact"],
    )  # fmt: skip
    return summary


def _other_parts(store: Store, name: str, before: Manifest | None) -> list[Part]:
    """The finished parts of a dataset but for one: as the manifest has them, or made of plans and shards."""
    listed = {part.name: part for part in before.parts} if before else {}
    found = []
    for other in part_names(info.key for info in store.list("plan/")):
        if other != name:
            part = listed.get(other) or finished_part(store, other)
            if part and other not in listed:
                there = read_spent(store)
                spent = _sums(store, part.layout, part.run["settings"]["device"], there.hour_price if there else None)
                part = part.model_copy(update={"spent": spent.model_dump() if spent else None})
            found += [part] if part else []
    return found


def _keep_references(job: GenerationJob, parts: list[Part]) -> None:
    """Put the references of a part that was added together with those that are there."""
    store = job.store()
    if job.references_key == SUBJECTS_KEY or {part.fingerprint for part in parts} <= set(references_marks(store)):
        return
    table = add_references(read_references(store), read_references(store, job.references_key))
    store.put(SUBJECTS_KEY, encode_references_of_parts(table, parts))


def _spent(job: GenerationJob, store: Store, before: Manifest | None) -> Spent | None:
    """What the run took; what is known of the whole run stays, whatever is made again later.

    `before`: the manifest that was there. Without one, sums that are of as many images were this run's.
    """
    name, price = job.layout.name, job.limits.hour_price
    known = total_spent(part.spent for part in before.parts if part.name == name) if before else None
    known = known or (None if name else read_spent(store))
    if known and known.images == job.layout.rows and price in (None, known.hour_price):
        return known
    if price is None and known:
        price = known.hour_price
    spent = _sums(store, job.layout, job.device, price)
    if spent:
        logger.info("took %s", "; ".join(f"{name}: {value}" for name, value in spent_lines(spent)))
    return spent


def _sums(store: Store, layout: Layout, device: str, price: float | None) -> Spent | None:
    return add_up(_stats(store, layout), "gpu" if device == "cuda" else "cpu", price)


def _stats(store: Store, layout: Layout) -> list[dict[str, Any]]:
    """The stats of the shards that have any: they are lost when a worker ends between the shard and its stats."""

    def read(shard: int) -> dict[str, Any] | None:
        try:
            stats = parse_json(store.get(layout.stats_key(shard)))
            return stats if isinstance(stats["rows"], int) and isinstance(stats["seconds"]["total"], float) else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    with ThreadPoolExecutor(READERS) as pool:
        return [one for one in pool.map(read, range(layout.shards)) if one]


def _same_run_finished(store: Store, part: Part, before: Manifest | None) -> bool:
    """Return whether a dataset's manifest lists the run that made `part`, with the very same shards.

    `before`: the manifest that was there. Where people were taken out, parts removed or this run's shards made anew since,
    what this run holds of the dataset is old.
    """
    found = find_manifest(store)
    if found is None or found.retracting or found.retractions != (before.retractions if before else []):
        return False
    there = {one.name: (one.fingerprint, one.layout, [_content(entry) for entry in one.shards]) for one in found.parts}
    known = {one.name for one in before.parts} if before else set()
    return known <= there.keys() and there.get(part.name) == (
        part.fingerprint, part.layout, [_content(entry) for entry in part.shards]
    )  # fmt: skip


def _content(entry: ShardEntry) -> tuple[str, str]:
    return entry.key, entry.sha256


def _write_card_and_manifest(
    job: GenerationJob, store: Store, before: Manifest | None, part: Part, certificate: dict[str, Any] | None
) -> tuple[Manifest, list[ScoreRow]]:
    """Write what is beside a finished part's shards and, last, the manifest in the place of `before`.

    Raises:
        ChangedError: the manifest is not `before` any more.
    """
    layout = job.layout
    parts = sorted([part, *_other_parts(store, layout.name, before)], key=lambda one: one.name)
    _keep_references(job, parts)
    if certificate and dataset_certificate(store, layout.name) != certificate:  # another driver measured other times
        store.put(summary_key(layout.name), summary_bytes(certificate))
    write_spent(store, parts)
    built = build_manifest(parts, retractions=before.retractions if before else ())
    table = write_card(store, built)
    known_entries = {entry.key: entry for entry in before.objects} if before else {}
    own = {*layout.part_keys(), SUBJECTS_KEY}
    objects = [
        known_entries[key] if key in known_entries and key not in own else object_entry(key, store.get(key))
        for key in built.planned_keys()
    ]
    # Columns added before keep their entries: later damage to them is still found.
    objects += [entry for entry in known_entries.values() if entry.key.startswith(KEPT_ENTRIES)]
    built = built.model_copy(update={"objects": objects, "digest": before.digest if before else ""})
    manifest = seal(store, built, {summary_key(layout.name)} if certificate else ())
    return manifest, table


@task(name="finish-dataset", cache_policy=None, persist_result=False, **RETRIES)
def finish_dataset(job: GenerationJob, certificate: dict[str, Any] | None = None) -> Finished:
    """Write the card and, last, the manifest.

    Where another driver of the same run wrote the manifest meanwhile, it is finished once more, from that manifest on.

    Args:
        job: the run.
        certificate: what the certificate of fast mode says.

    Raises:
        RuntimeError: shards are missing.
        ChangedError: a command that is not a driver of this run wrote a manifest meanwhile.
        FailedRowsError: more rows failed than `--max-failed` allows; the dataset is complete nevertheless.
        CertificateError: the certificate says that fast mode lost too much; likewise.
    """
    layout, store = job.layout, job.store()
    if not layout.rows:  # nothing was added
        table = rewrite_card(store)
        return Finished(read_sound_manifest(store).counts, table)
    require_same_run(store, Run(job.run, job.fingerprint), name=layout.name)
    finished = finished_shards(store, layout, job.fingerprint)
    missing = sorted(set(range(layout.shards)) - finished.keys())
    if missing:
        raise RuntimeError(f"{store.url}: {counted(len(missing), 'shard')} missing, {layout.shard_key(missing[0])} first; "
                           "run the same command again")  # fmt: skip
    with ThreadPoolExecutor(READERS) as pool:
        numbers = sorted(finished)
        entries = list(pool.map(lambda shard: shard_entry(store, layout, shard, finished[shard].info), numbers))
    places = {name: lasting_name(getattr(job, name), KEPT_NAMES) for name in ("models", "scorers")}
    computed_with = [finished[shard].marks.computed_with for shard in numbers]
    for left in reversed(range(FINISH_TRIES)):
        before = find_manifest(store)
        spent = _spent(job, store, before)
        part = build_part(
            job.fingerprint, job.run, layout, entries, places, computed_with, spent.model_dump() if spent else None
        ).as_part(certificate=certificate)
        try:
            manifest, table = _write_card_and_manifest(job, store, before, part, certificate)
            break
        except ChangedError:
            if not left or not _same_run_finished(store, part, before):
                raise
            logger.info(
                "%s: another driver of the same run finished it meanwhile; once more, from its manifest", store.url
            )
    for info in store.list(UNFINISHED_REFERENCES):
        store.delete(info.key)
    counts = manifest.counts
    logger.info("%s: %s, %d ok, %d failed, in %s", store.url, counted(counts.rows, "row"), counts.ok, counts.failed,
                counted(counts.shards, "shard"))  # fmt: skip
    if part.failed > job.max_failed * part.rows:
        raise FailedRowsError(
            f"{store.url}: {part.failed} of {counted(part.rows, 'row')} failed, more than --max-failed "
            f"{job.max_failed:g}; their errors are in the column `error`"
        )
    lost = failure(certificate, job.faster_options) if certificate else None
    if lost:
        raise CertificateError(f"{store.url}: {lost}")
    return Finished(counts, table, certificate)
