"""Preprocessing as two stages: pictures are checked (sources without splits), then prepared; the units are parts."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from facediffuser.batch_stage import Counts, Results, Stage, Unit, WorkerPool
from facediffuser.preprocess.archives import read_records
from facediffuser.preprocess.parts import part_name
from facediffuser.preprocess.photo_stages import Job
from facediffuser.preprocess.source_files import Record
from facediffuser.preprocess.sources import Listing

Parts = dict[int, list[Record]]


class PartWorker:
    """Prepares parts; `unit.data` is the part's number, its records, and their files' bytes where they are read."""

    title, folder = "Preprocess", "parts"

    def __init__(self, job: Job):
        from facediffuser.preprocess.prepare import PartPreparer

        self.preparer = PartPreparer(job, job.settings.cpus_per_worker)

    def __call__(self, unit: Unit) -> Counts:
        return self.preparer.prepare(*unit.data)


class CheckWorker(PartWorker):
    """Checks the pictures of parts and keeps their perceptual hashes: for sources without splits of their own."""

    title, folder = "Check", "checks"

    def __call__(self, unit: Unit) -> Counts:
        self.preparer.check(*unit.data)
        return {"pictures": unit.rows}


def part_stage(
    worker: type[PartWorker],
    job: Job,
    identity: Mapping[str, Any],
    listing: Listing,
    parts: Parts,
    gpu: bool,
    finish: Callable[[Results], Any],
) -> Stage:
    """Return the stage that prepares parts, or checks them.

    Args:
        worker: the class that does a part; it says the stage's title and the folder of what it writes of a part.
        job: settings, models and source of the run.
        identity: what decides the rows.
        listing: the source's pictures.
        parts: the records of the parts to do, by number.
        gpu: whether a worker takes a GPU.
        finish: called with the results of all parts; what it returns is the stage's result.
    """
    units = [
        Unit(part_name(worker.folder, part, "json"), len(parts[part]), (part, parts[part])) for part in sorted(parts)
    ]
    read = functools.partial(read_parts, listing.url, listing.top, units) if listing.archive and units else None
    return Stage(
        worker.title, "pictures", identity, units, functools.partial(worker, job), finish,
        finished=len(listing.records) - sum(unit.rows for unit in units),
        pool=WorkerPool(job.settings.workers, cpus=job.settings.cpus_per_worker, gpu=gpu),
        read=read, describe=_describe,
    )  # fmt: skip


def _describe(totals: Counts) -> str:
    rejected = totals.get("counts", {}).get("rejected", 0)
    return f"{rejected} rejected" if rejected else ""


def read_parts(url: str, top: str, units: list[Unit]) -> Iterator[Unit]:
    """Read an archive once from beginning to end, and yield each unit, with its files, as soon as they are there.

    Args:
        url: the archive.
        top: the folder that its listing leaves off.
        units: in the order of the archive, with (part, records) as data.
    """
    waiting = iter(units)
    unit = next(waiting)
    records, files = [], []
    for record, content in read_records(url, top, [record for one in units for record in one.data[1]]):
        records.append(record)
        files.append(content)
        if len(records) == unit.rows:
            yield Unit(unit.key, unit.rows, (unit.data[0], records, files))
            unit, records, files = next(waiting, unit), [], []
