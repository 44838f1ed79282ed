"""Verification: every shard against the manifest, every planned row exactly once, every image readable."""

import hashlib
import io
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from facediffuser.dataset.manifest import Manifest, ShardEntry, read_manifest
from facediffuser.dataset.plan import Layout, read_shard_rows
from facediffuser.dataset.schema import DATASET_SCHEMA, FINGERPRINT_KEY, PLAN_SCHEMA
from facediffuser.dataset.shards import foreign_shards
from facediffuser.storage import Store, open_store

logger = logging.getLogger(__name__)

READERS = 4


def verify(url: str) -> list[str]:
    """Return what is wrong with a dataset, one line each; an empty list when all is as the manifest says.

    Each shard is checked for presence, sha256, schema, fingerprint, rows (each planned row once, in its order), images
    (present, their sha256, decodable) and counts. Raises InputError when there is no manifest.
    """
    store = open_store(url)
    manifest = read_manifest(store)
    layout = manifest.layout
    problems = list(_whole(manifest, layout))
    problems += [f"{key}: not a shard of this dataset; remove it" for key in foreign_shards(store, layout)]
    with ThreadPoolExecutor(READERS) as pool:
        checks = pool.map(lambda pair: check_shard(store, manifest, *pair), enumerate(manifest.shards))
        for found in checks:
            problems += found
    return problems


def _whole(manifest: Manifest, layout: Layout) -> Iterator[str]:
    keys = [entry.key for entry in manifest.shards]
    if keys != [layout.shard_key(shard) for shard in range(layout.shards)]:
        yield f"manifest.json: lists {len(keys)} shards, not the {layout.shards} planned"
    for name in ("rows", "ok", "failed"):
        total = sum(getattr(entry, name) for entry in manifest.shards)
        if total != getattr(manifest.counts, name):
            yield f"manifest.json: counts {getattr(manifest.counts, name)} {name}, its shards {total}"


def check_shard(store: Store, manifest: Manifest, shard: int, entry: ShardEntry) -> list[str]:
    """Return what is wrong with one shard, one line each."""
    try:
        data = store.get(entry.key)
    except FileNotFoundError:
        return [f"{entry.key}: missing"]
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        return [f"{entry.key}: sha256 differs from the manifest's ({len(data)} bytes, listed {entry.bytes})"]
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        return [f"{entry.key}: not readable as Parquet ({type(error).__name__})"]
    if not table.schema.equals(DATASET_SCHEMA):
        return [f"{entry.key}: its columns are not a dataset's"]
    problems = []
    mark = (table.schema.metadata or {}).get(FINGERPRINT_KEY, b"").decode()
    if mark != manifest.fingerprint:
        problems.append(f"{entry.key}: made by another run (fingerprint {mark[:12]})")
    problems += _rows_as_planned(store, manifest.layout, shard, entry, table)
    problems += _images(entry, table)
    return problems


def _rows_as_planned(store: Store, layout: Layout, shard: int, entry: ShardEntry, table: pa.Table) -> Iterator[str]:
    if table.num_rows != entry.rows:
        yield f"{entry.key}: {table.num_rows} rows, the manifest says {entry.rows}"
    try:
        planned = read_shard_rows(store, layout, shard)
    except (FileNotFoundError, pa.ArrowException, IndexError) as error:
        yield f"{entry.key}: its plan cannot be read ({type(error).__name__})"
        return
    if table.select(PLAN_SCHEMA.names).to_pylist() != planned:
        yield f"{entry.key}: its rows are not those planned"
    status = table["status"].to_pylist()
    if (status.count("ok"), status.count("failed")) != (entry.ok, entry.failed):
        yield f"{entry.key}: {status.count('ok')} ok and {status.count('failed')} failed rows, not as the manifest says"


def _images(entry: ShardEntry, table: pa.Table) -> Iterator[str]:
    columns = ("sample_id", "status", "image", "image_sha256", "height", "width")
    for row in table.select(columns).to_pylist():
        where = f"{entry.key}: {row['sample_id']}"
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
                with Image.open(io.BytesIO(data)) as image:
                    image.load()
            except (OSError, SyntaxError, ValueError):
                yield f"{where}: image does not decode"
            else:
                if image.size != (row["width"], row["height"]):
                    yield f"{where}: image is {image.size[0]} x {image.size[1]}, not as the row says"
