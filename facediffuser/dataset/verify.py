"""Verification: every object against the manifest, every planned row exactly once, every image readable."""

import hashlib
import io
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from facediffuser.dataset.manifest import Manifest, ShardEntry, object_entry, read_manifest
from facediffuser.dataset.plan import Layout, read_shard_rows
from facediffuser.dataset.schema import DATASET_SCHEMA, FINGERPRINT_KEY, PLAN_SCHEMA, canonical_json
from facediffuser.dataset.shards import foreign_shards
from facediffuser.errors import InputError
from facediffuser.pictures import stored_picture
from facediffuser.storage import Store, open_store

logger = logging.getLogger(__name__)

READERS = 4


@dataclass(frozen=True)
class Problem:
    """What is wrong with one object; `shard` is its number when the object is, or should be, a shard of the dataset."""

    key: str
    what: str
    shard: int | None = None
    foreign: bool = False

    def __str__(self) -> str:
        return f"{self.key}: {self.what}"


def verify(url: str) -> list[str]:
    """Return what is wrong with a dataset, one line each; an empty list when all is as the manifest says.

    Each shard is checked for presence, sha256, schema, fingerprint, rows (each planned row once, in its order), images
    (present, their sha256, decodable) and counts; plan and references for presence and sha256. Raises InputError when
    there is no manifest.
    """
    store = open_store(url)
    return [str(problem) for problem in find_problems(store, read_manifest(store))]


def find_problems(store: Store, manifest: Manifest) -> list[Problem]:
    """Return what is wrong with a dataset."""
    layout = manifest.layout
    problems = [Problem("manifest.json", what) for what in _whole(manifest, layout)]
    for key in foreign_shards(store, layout):
        problems.append(Problem(key, "not a shard of this dataset; remove it", foreign=True))
    problems += _objects(store, manifest)
    with ThreadPoolExecutor(READERS) as pool:
        checks = pool.map(lambda pair: check_shard(store, manifest, *pair), enumerate(manifest.shards))
        for shard, found in enumerate(checks):
            problems += [Problem(manifest.shards[shard].key, what, shard) for what in found]
    return problems


def _objects(store: Store, manifest: Manifest) -> Iterator[Problem]:
    for entry in manifest.objects:
        try:
            there = object_entry(entry.key, store.get(entry.key))
        except FileNotFoundError:
            yield Problem(entry.key, "missing")
            continue
        if there != entry:
            yield Problem(entry.key, f"sha256 differs from the manifest's ({there.bytes} bytes, listed {entry.bytes})")


def _whole(manifest: Manifest, layout: Layout) -> Iterator[str]:
    if hashlib.sha256(canonical_json(manifest.run).encode()).hexdigest() != manifest.fingerprint:
        yield "its run is not the one of its fingerprint"
    keys = [entry.key for entry in manifest.shards]
    if keys != [layout.shard_key(shard) for shard in range(layout.shards)]:
        yield f"lists {len(keys)} shards, not the {layout.shards} planned"
    for name in ("rows", "ok", "failed"):
        total = sum(getattr(entry, name) for entry in manifest.shards)
        if total != getattr(manifest.counts, name):
            yield f"counts {getattr(manifest.counts, name)} {name}, its shards {total}"


def check_shard(store: Store, manifest: Manifest, shard: int, entry: ShardEntry) -> list[str]:
    """Return what is wrong with one shard, one line each."""
    try:
        data = store.get(entry.key)
    except FileNotFoundError:
        return ["missing"]
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        return [f"sha256 differs from the manifest's ({len(data)} bytes, listed {entry.bytes})"]
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        return [f"not readable as Parquet ({type(error).__name__})"]
    if not table.schema.equals(DATASET_SCHEMA):
        return ["its columns are not a dataset's"]
    problems = []
    mark = (table.schema.metadata or {}).get(FINGERPRINT_KEY, b"").decode()
    if mark != manifest.fingerprint:
        problems.append(f"made by another run (fingerprint {mark[:12]})")
    problems += _rows_as_planned(store, manifest.layout, shard, entry, table)
    problems += _images(table)
    return problems


def _rows_as_planned(store: Store, layout: Layout, shard: int, entry: ShardEntry, table: pa.Table) -> Iterator[str]:
    if table.num_rows != entry.rows:
        yield f"{table.num_rows} rows, the manifest says {entry.rows}"
    try:
        planned = read_shard_rows(store, layout, shard)
    except (OSError, pa.ArrowException, IndexError) as error:
        yield f"its plan cannot be read ({type(error).__name__})"
        return
    if table.select(PLAN_SCHEMA.names).to_pylist() != planned:
        yield "its rows are not those planned"
    status = table["status"].to_pylist()
    if (status.count("ok"), status.count("failed")) != (entry.ok, entry.failed):
        yield f"{status.count('ok')} ok and {status.count('failed')} failed rows, not as the manifest says"


def _images(table: pa.Table) -> Iterator[str]:
    columns = ("sample_id", "status", "image", "image_sha256", "height", "width")
    for row in table.select(columns).to_pylist():
        where = row["sample_id"]
        if row["status"] != "ok":
            if row["image"] is not None:
                yield f"{where}: failed, but has an image"
            continue
        data = (row["image"] or {}).get("bytes")
        if not data:
            yield f"{where}: no image"
        elif hashlib.sha256(data).hexdigest() != row["image_sha256"]:
            yield f"{where}: image differs from its sha256"
        else:
            try:
                image = stored_picture(data)
            except InputError:
                yield f"{where}: image does not decode"
            else:
                if image.size != (row["width"], row["height"]):
                    yield f"{where}: image is {image.size[0]} x {image.size[1]}, not as the row says"
