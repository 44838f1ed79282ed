"""The manifest: written last, it lists every object of a finished dataset with its sha256, and carries its own digest."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from facediffuser.dataset.plan import Layout
from facediffuser.dataset.reading import read_columns
from facediffuser.dataset.schema import SCHEMA_VERSION, SUBJECTS_KEY
from facediffuser.errors import InputError
from facediffuser.runs import canonical_json, count_provenances, fingerprint_of, provenance_of
from facediffuser.storage import ObjectInfo, Store

MANIFEST_KEY = "manifest.json"
SHARDS = "shards"
ENTRY_NAMES = ("rows", "ok", "failed", "bytes", "sha256")
# Timings of the workers, another at every run: `verify` compares what they repeat of the manifest instead.
UNLISTED = ("stats/",)
# What manifests had before they carried a digest.
EARLIER_FIELDS = frozenset({"schema_version", "fingerprint", "counts", "scorers", "models", "run", "rows", "shard_size",
                            "made_from", "objects", "shards"})  # fmt: skip
# About two million shards; a larger file is not read.
MOST_BYTES = 512 << 20

Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    # Strict: "24" or 24.0 in the place of 24 is a changed manifest.
    model_config = ConfigDict(frozen=True, strict=True)


class ShardEntry(_Part):
    """One shard as the manifest lists it.

    computed_with: the place in `Manifest.provenances` of what its footer says of libraries, threads and hardware; None
    for a shard of an earlier version, whose footer keeps that in the run document.
    """

    key: str
    rows: Count
    ok: Count
    failed: Count
    bytes: Count
    sha256: str
    computed_with: int | None = None


class ObjectEntry(_Part):
    """An object beside the shards as the manifest lists it: a part of the plan, the references, the card, a score."""

    key: str
    bytes: Count
    sha256: str


class Counts(_Part):
    """Rows and shards of a dataset."""

    rows: Count
    ok: Count
    failed: Count
    shards: Count


class Manifest(_Part):
    """What a finished dataset holds.

    digest: the sha256 of the manifest's own bytes with this value empty; empty in manifests of earlier versions, which
        list plan, references and shards only.
    run: the document the fingerprint is the sha256 of: settings, digests of models and scorers, plan, subjects.
    made_from: where models and scorers were at `generate`; it decides nothing, `repair` looks there first.
    objects: all that is neither a shard nor below one of the prefixes in `unlisted`.
    spent: hours of workers, energy and money that the run took; None where its stats did not say.
    certificate: what the certificate of a run in fast mode says (see `facediffuser.dataset.certificate`); None for others.
    provenances: what the shards were computed with (code, libraries, threads, hardware), and how many `shards` each.
    """

    digest: str = ""
    schema_version: str = SCHEMA_VERSION
    fingerprint: str
    counts: Counts
    scorers: dict[str, str]
    models: dict[str, str]
    run: dict[str, Any]
    rows: Count
    shard_size: int = Field(ge=1)
    made_from: dict[str, str] = {}
    objects: list[ObjectEntry] = []
    unlisted: list[str] = []
    provenances: list[dict[str, Any]] = []
    spent: dict[str, Any] | None = None
    certificate: dict[str, Any] | None = None
    shards: list[ShardEntry]

    @model_validator(mode="after")
    def _lists_what_is_planned(self) -> "Manifest":
        # Whatever walks over shards and plan parts is then bounded by the length of the file.
        if len(self.shards) != self.layout.shards:
            raise ValueError(
                f"{self.rows} rows in shards of {self.shard_size} are {self.layout.shards} shards, "
                f"{len(self.shards)} are listed"
            )
        return self

    @property
    def layout(self) -> Layout:
        return Layout(self.rows, self.shard_size)

    def computed_with(self, shard: int) -> dict[str, Any] | None:
        """Return the provenance in a shard's footer, None for a shard of an earlier version."""
        place = self.shards[shard].computed_with
        if place is None:
            return None
        return {name: value for name, value in self.provenances[place].items() if name != SHARDS}

    def recorded_provenances(self) -> list[dict[str, Any]]:
        """Return the different provenances of the shards, those of an earlier version from the run document."""
        found = [{name: value for name, value in one.items() if name != SHARDS} for one in self.provenances]
        return found or [one for one in [provenance_of(self.run)] if one]


def build_manifest(
    fingerprint: str,
    run: dict[str, Any],
    layout: Layout,
    shards: list[ShardEntry],
    objects: list[ObjectEntry] | None = None,
    made_from: dict[str, str] | None = None,
    computed_with: Sequence[dict[str, Any] | None] = (),
    spent: dict[str, Any] | None = None,
) -> Manifest:
    """Return the manifest of a dataset all of whose shards are there.

    Args:
        fingerprint, run: the run.
        layout: how rows lie in shards.
        shards: an entry for each shard, in order; `computed_with` in them is filled in here.
        objects: the entries of plan and references.
        made_from: where models and scorers were.
        computed_with: the provenance in each shard's footer, None where it has none; by default none has.
        spent: what the run took.

    Raises:
        RuntimeError: shards or rows are missing.
    """
    ok, failed = sum(shard.ok for shard in shards), sum(shard.failed for shard in shards)
    counts = Counts(rows=ok + failed, ok=ok, failed=failed, shards=len(shards))
    if len(shards) != layout.shards or counts.rows != layout.rows:
        raise RuntimeError(f"{counts.rows} rows in {len(shards)} shards; planned are {layout.rows} in {layout.shards}")
    each = list(computed_with) or [None] * len(shards)
    provenances = count_provenances([one or provenance_of(run) for one in each], SHARDS)
    places = {canonical_json({k: v for k, v in one.items() if k != SHARDS}): n for n, one in enumerate(provenances)}
    shards = [
        entry.model_copy(update={"computed_with": None if one is None else places[canonical_json(one)]})
        for entry, one in zip(shards, each, strict=True)
    ]
    return Manifest(
        fingerprint=fingerprint, counts=counts, scorers=run["scorers"], models=run["models"], run=run,
        rows=layout.rows, shard_size=layout.shard_size, made_from=made_from or {}, objects=objects or [],
        unlisted=list(UNLISTED), provenances=provenances, spent=spent, shards=shards,
    )  # fmt: skip


def write_manifest(store: Store, manifest: Manifest) -> None:
    """Put the manifest with its digest; the same dataset gives the same bytes."""
    document = manifest.model_dump() | {"digest": ""}
    if manifest.certificate is None:
        del document["certificate"]  # as manifests were before there were certificates
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    store.put(MANIFEST_KEY, text.replace('"digest": ""', f'"digest": "{digest}"', 1).encode())


def read_manifest(store: Store) -> Manifest:
    """Return a dataset's manifest; InputError when there is none or it cannot be read.

    Its digest is not checked: `manifest_problems` does, and `read_sound_manifest`.
    """
    return parse_manifest(store, read_manifest_bytes(store))


def read_sound_manifest(store: Store) -> Manifest:
    """Return a dataset's manifest; InputError also when it is damaged. What writes a manifest anew begins with this."""
    data = read_manifest_bytes(store)
    manifest = parse_manifest(store, data)
    for problem in manifest_problems(manifest, data):
        raise InputError(f"{store.url_of(MANIFEST_KEY)}: {problem}; put it back, or remove it and let `generate`, with "
                         "its options, write it again")  # fmt: skip
    return manifest


def read_manifest_bytes(store: Store) -> bytes:
    """Return a manifest as it stands; InputError when there is none or it is larger than any manifest."""
    store.require_readable()
    url = store.url_of(MANIFEST_KEY)
    try:
        with store.open(MANIFEST_KEY) as file:
            size = file.seek(0, 2)
            if size > MOST_BYTES:
                raise InputError(f"{url}: {size} bytes, more than {MOST_BYTES}; not a manifest, remove it")
            file.seek(0)
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{store.url}: no {MANIFEST_KEY}; let `generate` finish it") from None
    except IsADirectoryError:
        raise InputError(f"{url}: a folder, not a manifest; remove it and let `generate` write it again") from None
    except PermissionError:
        raise InputError(f"{url}: cannot be read; check its permissions") from None


def parse_manifest(store: Store, data: bytes) -> Manifest:
    """Return the manifest that the bytes hold; InputError naming the first thing that cannot be."""
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        what = f"{place}: {first['msg']}" if place else first["msg"].removeprefix("Value error, ")
        raise InputError(f"{store.url_of(MANIFEST_KEY)}: not a manifest ({what[:200]}); put it back, or remove it and "
                         "let `generate` write it again") from None  # fmt: skip


def manifest_problems(manifest: Manifest, data: bytes) -> Iterator[str]:
    """Yield what is wrong with a manifest taken by itself; `data`: the bytes it was read from."""
    if manifest.digest:
        unsigned = data.replace(f'"digest": "{manifest.digest}"'.encode(), b'"digest": ""', 1)
        if hashlib.sha256(unsigned).hexdigest() != manifest.digest:
            yield "changed since it was written (its digest is of other bytes)"
    else:
        unknown = json.loads(data).keys() - EARLIER_FIELDS
        if unknown:
            yield f"has no digest, but {sorted(unknown)[0]!r}, which no manifest of an earlier version has"
    if manifest.schema_version != SCHEMA_VERSION:
        yield f"has schema version {manifest.schema_version!r}; this code reads {SCHEMA_VERSION!r}"
    if _fingerprint(manifest.run) != manifest.fingerprint:
        yield "its run is not the one of its fingerprint"
    for name in ("models", "scorers"):
        if getattr(manifest, name) != manifest.run.get(name):
            yield f"its {name} are not those of its run"
    layout = manifest.layout
    planned = (layout.shard_key(shard) for shard in range(layout.shards))
    for key, entry in zip(planned, manifest.shards, strict=True):
        if entry.key != key:
            yield f"lists {entry.key!r} where {key} is planned"
            break
    for shard, entry in enumerate(manifest.shards):
        if entry.rows != layout.shard_rows(shard) or entry.rows != entry.ok + entry.failed:
            yield f"lists {entry.rows} rows ({entry.ok} ok, {entry.failed} failed) of {entry.key}, {layout.shard_rows(shard)} are planned"
            break
    if manifest.counts.shards != layout.shards:
        yield f"counts {manifest.counts.shards} shards, {layout.shards} are planned"
    if manifest.counts.rows != layout.rows:
        yield f"counts {manifest.counts.rows} rows, {layout.rows} are planned"
    for name in ("rows", "ok", "failed"):
        total = sum(getattr(entry, name) for entry in manifest.shards)
        if total != getattr(manifest.counts, name):
            yield f"counts {getattr(manifest.counts, name)} {name}, its shards {total}"
    if manifest.objects or manifest.digest:
        listed = [entry.key for entry in manifest.objects]
        there = set(listed)
        if len(there) != len(listed):
            yield "lists an object twice"
        for key in planned_keys(layout):
            if key not in there:
                yield f"does not list {key}"


def _fingerprint(run: dict[str, Any]) -> str:
    try:
        return fingerprint_of(run)
    except ValueError:  # NaN or infinity, which no run's document holds
        return ""


def planned_keys(layout: Layout) -> list[str]:
    """Return the keys of the plan's parts and of the references."""
    return [*(layout.part_key(part) for part in range(layout.parts)), SUBJECTS_KEY]


def object_entries(store: Store, layout: Layout) -> list[ObjectEntry]:
    """Return the entries of the plan's parts and the references."""
    return [object_entry(key, store.get(key)) for key in planned_keys(layout)]


def object_entry(key: str, data: bytes) -> ObjectEntry:
    """Return the entry of an object that holds `data`."""
    return ObjectEntry(key=key, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def shard_entry(store: Store, layout: Layout, shard: int, info: ObjectInfo) -> ShardEntry:
    """Return the entry of a finished shard: from its stats, or from the shard itself where they are missing or old."""
    try:
        stats = json.loads(store.get(layout.stats_key(shard)))
        if stats["bytes"] == info.size and stats["rows"] == layout.shard_rows(shard):
            return ShardEntry(key=info.key, **{name: stats[name] for name in ENTRY_NAMES})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # a worker ended between the shard and its stats: the shard tells the same
    status = read_columns(store, info.key, ["status"])["status"].to_pylist()
    ok = status.count("ok")
    digest = hashlib.sha256(store.get(info.key)).hexdigest()
    return ShardEntry(key=info.key, rows=len(status), ok=ok, failed=len(status) - ok, bytes=info.size, sha256=digest)
