"""The manifest: written last, it says what a finished dataset holds, shard by shard with sha256."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict

from facediffuser.dataset.plan import Layout
from facediffuser.dataset.reading import read_columns
from facediffuser.dataset.schema import SCHEMA_VERSION, SUBJECTS_KEY
from facediffuser.errors import InputError
from facediffuser.storage import ObjectInfo, Store

MANIFEST_KEY = "manifest.json"
ENTRY_NAMES = ("rows", "ok", "failed", "bytes", "sha256")


class ShardEntry(BaseModel):
    """One shard as the manifest lists it."""

    model_config = ConfigDict(frozen=True)

    key: str
    rows: int
    ok: int
    failed: int
    bytes: int
    sha256: str


class ObjectEntry(BaseModel):
    """An object beside the shards as the manifest lists it: a part of the plan, the references."""

    model_config = ConfigDict(frozen=True)

    key: str
    bytes: int
    sha256: str


class Counts(BaseModel):
    """Rows and shards of a dataset."""

    model_config = ConfigDict(frozen=True)

    rows: int
    ok: int
    failed: int
    shards: int


class Manifest(BaseModel):
    """`run` is the document the fingerprint is the sha256 of: settings, model and scorer digests, plan, libraries.

    `made_from`: where models and scorers lay, as `generate` was told; it decides nothing and `repair` begins there.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: str = SCHEMA_VERSION
    fingerprint: str
    counts: Counts
    scorers: dict[str, str]
    models: dict[str, str]
    run: dict[str, Any]
    rows: int
    shard_size: int
    made_from: dict[str, str] = {}
    objects: list[ObjectEntry] = []
    shards: list[ShardEntry]

    @property
    def layout(self) -> Layout:
        return Layout(self.rows, self.shard_size)


def build_manifest(
    fingerprint: str,
    run: dict[str, Any],
    layout: Layout,
    shards: list[ShardEntry],
    objects: list[ObjectEntry] | None = None,
    made_from: dict[str, str] | None = None,
) -> Manifest:
    """Return the manifest of a dataset all of whose shards are there."""
    ok, failed = sum(shard.ok for shard in shards), sum(shard.failed for shard in shards)
    counts = Counts(rows=ok + failed, ok=ok, failed=failed, shards=len(shards))
    if len(shards) != layout.shards or counts.rows != layout.rows:
        raise RuntimeError(f"{counts.rows} rows in {len(shards)} shards; planned are {layout.rows} in {layout.shards}")
    return Manifest(
        fingerprint=fingerprint, counts=counts, scorers=run["scorers"], models=run["models"], run=run,
        rows=layout.rows, shard_size=layout.shard_size, made_from=made_from or {}, objects=objects or [], shards=shards,
    )  # fmt: skip


def write_manifest(store: Store, manifest: Manifest) -> None:
    """Put the manifest; the same dataset gives the same bytes."""
    store.put(MANIFEST_KEY, (json.dumps(manifest.model_dump(), indent=1, ensure_ascii=False) + "\n").encode())


def read_manifest(store: Store) -> Manifest:
    """Return a dataset's manifest; InputError when there is none or it cannot be read."""
    store.require_readable()
    try:
        return Manifest.model_validate_json(store.get(MANIFEST_KEY))
    except FileNotFoundError:
        raise InputError(f"{store.url}: no {MANIFEST_KEY}; let `generate` finish it") from None
    except ValueError:
        raise InputError(f"{store.url_of(MANIFEST_KEY)}: not a manifest; let `generate` write it again") from None


def object_entries(store: Store, layout: Layout) -> list[ObjectEntry]:
    """Return the entries of the plan's parts and the references."""
    keys = [*(layout.part_key(part) for part in range(layout.parts)), SUBJECTS_KEY]
    return [object_entry(key, store.get(key)) for key in keys]


def object_entry(key: str, data: bytes) -> ObjectEntry:
    """Return the entry of an object that holds `data`."""
    return ObjectEntry(key=key, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def shard_entry(store: Store, layout: Layout, shard: int, info: ObjectInfo) -> ShardEntry:
    """Return the entry of a finished shard: from its stats, or from the shard itself where they are missing or old."""
    try:
        stats = json.loads(store.get(layout.stats_key(shard)))
        if stats["bytes"] == info.size and stats["rows"] == layout.shard_rows(shard):
            return ShardEntry(key=info.key, **{name: stats[name] for name in ENTRY_NAMES})
    except (FileNotFoundError, ValueError, KeyError):
        pass  # a worker ended between the shard and its stats: the shard tells the same
    status = read_columns(store, info.key, ["status"])["status"].to_pylist()
    ok = status.count("ok")
    digest = hashlib.sha256(store.get(info.key)).hexdigest()
    return ShardEntry(key=info.key, rows=len(status), ok=ok, failed=len(status) - ok, bytes=info.size, sha256=digest)
