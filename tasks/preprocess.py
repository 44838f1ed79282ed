"""The task `preprocess`: lists the source, has its pictures checked and prepared part by part, and sums up."""

import logging
import posixpath
import time
from collections.abc import Container
from dataclasses import replace
from typing import Any

from prefect import task

from facediffuser.batch_stage import Results
from facediffuser.cards.prepared_card import write_card
from facediffuser.errors import InputError
from facediffuser.number_words import counted
from facediffuser.preprocess.parts import (
    MANIFEST,
    begin_or_resume_prepared,
    earlier_splits,
    finished_parts,
    part_name,
    require_parts_fit,
    run_identity,
    split_into_parts,
    to_json,
)
from facediffuser.preprocess.photo_stages import Job
from facediffuser.preprocess.prepared_manifest import build_manifest, recorded_provenance
from facediffuser.preprocess.preprocess_check import require_apart
from facediffuser.preprocess.preprocess_settings import PreprocessSettings
from facediffuser.preprocess.preprocess_stage import CheckWorker, Parts, PartWorker, part_stage
from facediffuser.preprocess.required_models import require_models
from facediffuser.preprocess.sources import FOLDER, Listing, list_source
from facediffuser.preprocess.splits import assign_splits, near_duplicates
from facediffuser.runs import check_provenance, different_provenances, software
from facediffuser.storage import Store, open_store
from facediffuser.storage.reading import parse_json, read_json_object
from facediffuser.tasks.chosen_driver import chosen_driver
from facediffuser.tasks.driver import Driver
from facediffuser.tasks.retrying import RETRIES

logger = logging.getLogger(__name__)

MANIFEST_FIELDS: dict[str, type] = {"counts": dict, "rejected": dict, "source": dict}
BETWEEN_SPLITS = "between the splits: near-identical to pictures of train and of test"


@task(name="prepare-photographs", cache_policy=None, persist_result=False, **RETRIES)
def prepare_photographs(settings: PreprocessSettings, worker: type[PartWorker] = PartWorker) -> dict[str, Any]:
    """Prepare a source of photographs; run again with the same settings it keeps the parts that are finished.

    Args:
        settings: the settings.
        worker: prepares the parts.

    Returns:
        counts by split, rejections by reason, the output and the seconds.

    Raises:
        InputError: the source cannot be read, models cannot be had, or the output is not ours; nothing is written.
        Stopped: SIGTERM arrived; the parts in hand are finished.
    """
    started = time.monotonic()
    store = open_store(settings.output)
    require_apart(settings)
    listing = list_source(settings.source, settings.format, settings.ffhq_images)
    if listing.left_out:
        level = logging.WARNING if listing.format == FOLDER else logging.INFO
        logger.log(level, "%s: %s", listing.url, listing.left_out_line())
    require_parts_fit(listing.url, split_into_parts(listing.records, settings.part_size))
    models = require_models(settings, listing)
    earlier = _earlier(settings, listing)
    store.require_writable()
    if settings.stages:
        open_store(settings.stages).require_writable()
    identity = run_identity(settings, listing, models, earlier)
    run, there = begin_or_resume_prepared(store, identity, listing)
    if MANIFEST in there:
        logger.info("%s: finished earlier; nothing to do", store.url)
        manifest = read_json_object(store, MANIFEST, "remove it and run the same command again", MANIFEST_FIELDS)
        return _result(store, manifest, started, {}, 0)
    parts = dict(enumerate(split_into_parts(listing.records, settings.part_size)))
    summaries = finished_parts(store, there, run.fingerprint, len(parts))
    recorded = different_provenances(recorded_provenance(run, summary) for summary in summaries.values())
    check_provenance(store.url, recorded, {**software(), "threads": settings.cpus_per_worker}, settings.exact)
    required = tuple(recorded) if settings.exact else ()
    job = Job(settings, listing.format, run.fingerprint, models=models, required=required)
    driver = chosen_driver()
    if not listing.has_splits and len(summaries) < len(parts):
        parts = _with_splits(store, there, job, listing, parts, earlier, driver)
    missing = {part: records for part, records in parts.items() if part not in summaries}
    logger.info("%s: %s (%s), %d of %s to prepare", listing.url, counted(len(listing.records), "picture"), listing.format,
                len(missing), counted(len(parts), "part"))  # fmt: skip

    def finish(results: Results) -> dict[str, Any]:
        made = {
            summary["part"]: {k: v for k, v in summary.items() if k != "seconds"} for summary in results.counts.values()
        }
        every = summaries | made
        manifest = build_manifest(run, listing, [every[part] for part in sorted(every)])
        write_card(store, manifest)
        store.put(MANIFEST, to_json(manifest))
        return _result(store, manifest, started, dict(results.totals.get("seconds", {})), len(summaries))

    return driver.run(part_stage(worker, job, run.document, listing, missing, driver.gpus > 0, finish))


def _earlier(settings: PreprocessSettings, listing: Listing) -> dict[str, str]:
    if not settings.earlier:
        return {}
    if listing.has_splits:
        raise InputError(f"--earlier {settings.earlier}: {listing.url} has splits of its own; leave the option out")
    return earlier_splits(settings.earlier)


def _with_splits(
    store: Store,
    there: dict[str, int],
    job: Job,
    listing: Listing,
    parts: Parts,
    earlier: dict[str, str],
    driver: Driver,
) -> Parts:
    """The parts with a split for each record: as earlier, or the hash of its id, near-identical pictures together."""
    checked = _finished_checks(store, there, job, parts)
    missing = {part: records for part, records in parts.items() if part not in checked}

    def finish(results: Results) -> dict[int, list[str | None]]:
        return checked | _finished_checks(store, results.counts, job, missing)

    identity = {"fingerprint": job.fingerprint}
    hashes = driver.run(part_stage(CheckWorker, job, identity, listing, missing, driver.gpus > 0, finish))
    every = [value for part in sorted(parts) for value in hashes[part]]
    usable = [index for index, value in enumerate(every) if value is not None]
    groups = near_duplicates([bytes.fromhex(every[index]) for index in usable], job.settings.near_duplicate_bits)
    records = [record for part in sorted(parts) for record in parts[part]]
    sides = assign_splits([records[index].image_id for index in usable], groups, job.settings.test_share, earlier)
    for index, side in zip(usable, sides, strict=True):
        records[index] = replace(records[index], split=side, problem=None if side else BETWEEN_SPLITS)
    logger.info("%d of %s near another", len(groups) - len(set(groups.tolist())), counted(len(groups), "picture"))
    return dict(enumerate(split_into_parts(records, job.settings.part_size)))


def _finished_checks(store: Store, there: Container[str], job: Job, parts: Parts) -> dict[int, list[str | None]]:
    hashes = {}
    for part, records in parts.items():
        key = part_name("checks", part, "json")
        if key not in there:
            continue
        try:
            content = parse_json(store.get(key))
            found = [value and bytes.fromhex(value).hex() for value in content["hashes"]]
            whole = content["fingerprint"] == job.fingerprint and len(found) == len(records)
        except (ValueError, KeyError, TypeError):
            whole = False  # not as this program writes it: the pictures are checked once more
        if whole:
            hashes[part] = found
    return hashes


def _result(
    store: Store, manifest: dict[str, Any], started: float, seconds: dict[str, float], kept: int
) -> dict[str, Any]:
    counts = manifest["counts"]
    if seconds:
        made = ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items())
        logger.info("%s: worker seconds: %s", posixpath.basename(store.url), made)
    return {
        "output": store.url,
        **counts,
        "left_out": manifest["source"]["ignored_files"],
        "rejected_by_reason": manifest["rejected"],
        "parts_kept": kept,
        "worker_seconds": {name: round(spent, 3) for name, spent in seconds.items()},
        "seconds": round(time.monotonic() - started, 3),
    }
