"""The stage `preprocess`: lists the source, has its parts prepared by Ray actors that hold the models, and sums up."""

import json
import logging
import pickle
import posixpath
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ray
from prefect import task

from facediffuser.cards.prepared_card import write_card
from facediffuser.errors import InputError
from facediffuser.pictures import left_out_line
from facediffuser.preprocess.archives import read_records
from facediffuser.preprocess.parts import (
    MANIFEST,
    begin_run,
    describe_run,
    earlier_splits,
    finished_parts,
    part_name,
    split_into_parts,
)
from facediffuser.preprocess.photo_stages import Job
from facediffuser.preprocess.prepare import PartPreparer
from facediffuser.preprocess.prepared_manifest import build_manifest, write_manifest
from facediffuser.preprocess.preprocess_check import require_apart
from facediffuser.preprocess.preprocess_settings import PreprocessSettings
from facediffuser.preprocess.required_models import require_models
from facediffuser.preprocess.source_files import Record
from facediffuser.preprocess.sources import Listing, list_source
from facediffuser.preprocess.splits import assign_splits, near_duplicates
from facediffuser.storage import Store, open_store
from facediffuser.tasks.progress import Progress
from facediffuser.tasks.ray_session import cluster_gpus, connect_ray

logger = logging.getLogger(__name__)

CHECK, PREPARE = "check", "prepare"
MOST_BLOCKS = 1000
BETWEEN_SPLITS = "between the splits: near-identical to pictures of train and of test"
# No share of the CPUs: on a machine whose cores all belong to actors the one reader would wait for ever.
READER_CPUS = 0

PART_BLOCK_BYTES = 1 << 16

Parts = dict[int, list[Record]]


class PartActor:
    """A Ray Data actor: keeps a PartPreparer and hands it one part after another; returns numbers, never pixels."""

    def __init__(self, job: Job, threads: int):
        self.preparer = PartPreparer(job, threads)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Check or prepare the part in `row`; returns its number, its pictures and what came of it as JSON."""
        mode, part, records, files = pickle.loads(row["payload"])
        work = self.preparer.check if mode == CHECK else self.preparer.prepare
        result = work(part, records, files)
        return {"part": part, "pictures": len(records), "result": json.dumps(result)}


@task(name="prepare-photographs")
def prepare_photographs(settings: PreprocessSettings) -> dict[str, Any]:
    """Prepare a source of photographs; return counts by split, rejections by reason, the output and the seconds.

    Run again with the same settings it keeps the parts that are finished. InputError, with nothing written, for a
    source that cannot be read, models that cannot be had, an output that is not ours.
    """
    started = time.monotonic()
    store = open_store(settings.output)
    require_apart(settings)
    listing = list_source(settings.source, settings.format, settings.ffhq_images)
    if listing.left_out:
        logger.warning("%s: %s", listing.url, left_out_line(listing.left_out))
    models = require_models(settings, listing)
    earlier = _earlier(settings, listing)
    store.require_writable()
    if settings.stages:
        open_store(settings.stages).require_writable()
    run = describe_run(settings, listing, models, earlier)
    there = begin_run(store, run, listing)
    if MANIFEST in there:
        logger.info("%s: finished earlier; nothing to do", store.url)
        return _result(store, json.loads(store.get(MANIFEST)), started, {}, 0)
    connect_ray()
    job = Job(settings, listing.format, run["fingerprint"], models=models)
    parts = dict(enumerate(split_into_parts(listing.records, settings.part_size)))
    summaries = finished_parts(store, there, job.fingerprint, len(parts))
    if not listing.has_splits and len(summaries) < len(parts):
        parts = _with_splits(store, there, job, listing, parts, earlier)
    missing = {part: records for part, records in parts.items() if part not in summaries}
    kept = len(summaries)
    logger.info("%s: %d pictures (%s), %d of %d parts to make", listing.url, len(listing.records), listing.format,
                len(missing), len(parts))  # fmt: skip
    seconds: Counter[str] = Counter()
    with Progress(len(listing.records), "pictures", "Preprocess") as progress:
        progress.advance(sum(summary["pictures"] for summary in summaries.values()))
        for part, summary in _drive(PREPARE, job, listing, missing):
            seconds.update(summary.pop("seconds"))
            summaries[part] = summary
            progress.advance(summary["pictures"], _note(summaries))
    manifest = build_manifest(run, listing, [summaries[part] for part in sorted(summaries)])
    write_card(store, manifest)
    write_manifest(store, manifest)
    return _result(store, manifest, started, dict(seconds), kept)


def _earlier(settings: PreprocessSettings, listing: Listing) -> dict[str, str]:
    if not settings.earlier:
        return {}
    if listing.has_splits:
        raise InputError(f"--earlier {settings.earlier}: {listing.url} has splits of its own; leave the option out")
    return earlier_splits(settings.earlier)


def _with_splits(
    store: Store, there: dict[str, int], job: Job, listing: Listing, parts: Parts, earlier: dict[str, str]
) -> Parts:
    """The parts with a split for each record: as earlier, or the hash of its id, near-identical pictures together."""
    hashes = _finished_checks(store, there, job, parts)
    missing = {part: records for part, records in parts.items() if part not in hashes}
    with Progress(len(listing.records), "pictures", "Check") as progress:
        progress.advance(sum(len(found) for found in hashes.values()))
        for part, result in _drive(CHECK, job, listing, missing):
            hashes[part] = result["hashes"]
            progress.advance(len(result["hashes"]))
    every = [value for part in sorted(parts) for value in hashes[part]]
    usable = [index for index, value in enumerate(every) if value is not None]
    groups = near_duplicates([bytes.fromhex(every[index]) for index in usable], job.settings.near_duplicate_bits)
    records = [record for part in sorted(parts) for record in parts[part]]
    sides = assign_splits([records[index].image_id for index in usable], groups, job.settings.test_share, earlier)
    for index, side in zip(usable, sides, strict=True):
        records[index] = replace(records[index], split=side, problem=None if side else BETWEEN_SPLITS)
    logger.info("%d of %d pictures are near another", len(groups) - len(set(groups.tolist())), len(groups))
    return dict(enumerate(split_into_parts(records, job.settings.part_size)))


def _finished_checks(store: Store, there: dict[str, int], job: Job, parts: Parts) -> dict[int, list[str | None]]:
    hashes = {}
    for part, records in parts.items():
        key = part_name("checks", part, "json")
        content = json.loads(store.get(key)) if key in there else {}
        if content.get("fingerprint") == job.fingerprint and len(content["hashes"]) == len(records):
            hashes[part] = content["hashes"]
    return hashes


def _drive(mode: str, job: Job, listing: Listing, parts: Parts) -> Iterator[tuple[int, dict[str, Any]]]:
    """Have Ray do the parts; yield each one's number and result as it is finished, in any order."""
    if not parts:
        return
    settings = job.settings
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    gpus = cluster_gpus()
    if listing.archive:
        rows = ray.data.from_items([{"archive": listing.url}], override_num_blocks=1).map_batches(
            _read_archive,
            batch_size=None,
            num_cpus=READER_CPUS,
            fn_kwargs={"mode": mode, "top": listing.top, "parts": parts},
        )
        # Ray Data gathers what a reader yields until a block is this large: a part by itself must already be enough.
        rows.context.target_max_block_size = PART_BLOCK_BYTES
    else:
        items = [{"payload": pickle.dumps((mode, part, records, None))} for part, records in parts.items()]
        rows = ray.data.from_items(items, override_num_blocks=min(len(items), MOST_BLOCKS))
    results = rows.map(
        PartActor,
        fn_constructor_kwargs={"job": job, "threads": settings.cpus_per_worker},
        compute=ray.data.ActorPoolStrategy(size=min(settings.workers or gpus or 1, len(parts))),
        num_cpus=settings.cpus_per_worker,
        num_gpus=1 if gpus else None,
    )
    done = set()
    try:
        for row in results.iter_rows():
            # A part whose actor died after writing is done again, and may be told twice.
            if row["part"] not in done:
                done.add(row["part"])
                yield int(row["part"]), json.loads(row["result"])
    except Exception as error:
        # Ray wraps what an actor raises; the user's own errors come out as what they are.
        told = _input_error(error)
        if told is None:
            raise
        raise told from error
    if done != set(parts):
        raise RuntimeError(f"parts {sorted(set(parts) - done)} did not come back from Ray")


def _read_archive(batch: dict[str, Any], mode: str, top: str, parts: Parts) -> Iterator[dict[str, list]]:
    """Read an archive once from beginning to end, and yield each part as soon as its files are there."""
    order = sorted(parts)
    following = iter(order)
    part = next(following)
    records, files = [], []
    for record, content in read_records(batch["archive"][0], top, [record for part in order for record in parts[part]]):
        records.append(record)
        files.append(content)
        if len(records) == len(parts[part]):
            yield {"payload": [pickle.dumps((mode, part, records, files))]}
            part, records, files = next(following, -1), [], []


def _input_error(error: BaseException | None) -> InputError | None:
    while error is not None:
        if isinstance(error, InputError):
            return InputError(str(getattr(error, "cause", error)))
        error = getattr(error, "cause", None) or error.__cause__
    return None


def _note(summaries: dict[int, dict[str, Any]]) -> str:
    rejected = sum(summary["counts"]["rejected"] for summary in summaries.values())
    return f"{rejected} rejected" if rejected else ""


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
