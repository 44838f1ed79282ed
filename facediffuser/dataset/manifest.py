"""The manifest: written last, it lists every object of a finished dataset with its sha256, and carries its own digest."""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Self

import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from facediffuser.dataset.plan import Layout, find_sample, part_names
from facediffuser.dataset.reading import list_shards, readable_parquet
from facediffuser.dataset.schema import READABLE_VERSIONS, SUBJECTS_KEY, run_schema_version
from facediffuser.errors import InputError
from facediffuser.number_words import counted
from facediffuser.runs import canonical_json, count_provenances, has_fingerprint, provenance_of
from facediffuser.storage import ObjectInfo, StorageError, Store
from facediffuser.storage.reading import parse_json

MANIFEST_KEY = "manifest.json"
SHARDS = "shards"
ENTRY_NAMES = ("rows", "ok", "failed", "bytes", "sha256")
# Timings of the workers, another at every run: `verify` compares what they repeat of the manifest instead.
UNLISTED = ("stats/",)
# What manifests had before they carried a digest.
EARLIER_FIELDS = frozenset({"schema_version", "fingerprint", "counts", "scorers", "models", "run", "rows", "shard_size",
                            "made_from", "objects", "shards"})  # fmt: skip
# Fields that stand in a manifest only where they say something.
OPTIONAL_FIELDS = ("name", "kept", "certificate", "more_parts", "retractions", "retracting")
# The order of a manifest's fields, as it has been from the first version on.
_ORDER = (
    "digest", "schema_version", "fingerprint", "counts", "scorers", "models", "run", "rows", "shard_size", "kept", "made_from",
    "objects", "unlisted", "provenances", "spent", "certificate", "shards", "more_parts", "retractions", "retracting",
)  # fmt: skip
PART_NAME = re.compile(r"^(p\d{4,6})?$")
# About two million shards; a larger file is not read.
MOST_BYTES = 512 << 20
_DIGEST = re.compile(rb'\s*\{\s*"digest":\s*"([0-9a-f]{64})"')

Count = Annotated[int, Field(ge=0)]


class ChangedError(StorageError):
    """Another command wrote a dataset's manifest while this one ran; run again, this one begins with that manifest."""


class _Entry(BaseModel):
    # Strict: "24" or 24.0 in the place of 24 is a changed manifest.
    model_config = ConfigDict(frozen=True, strict=True)


class ShardEntry(_Entry):
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


class ObjectEntry(_Entry):
    """An object beside the shards as the manifest lists it: a part of the plan, the references, the card, a score."""

    key: str
    bytes: Count
    sha256: str


class Counts(_Entry):
    """Rows and shards of a dataset."""

    rows: Count
    ok: Count
    failed: Count
    shards: Count


class Retraction(_Entry):
    """That people were taken out of a dataset; it says nothing of who they were."""

    subjects: Count
    rows: Count


class Part(_Entry):
    """What one run made of a dataset: its identity, its plan and its shards. Most datasets have one part.

    name: "" for the first part; stands in the keys of the others, see `Layout`.
    run: the document the fingerprint is the sha256 of: settings, digests of models and scorers, plan, subjects.
    rows: how many it has now.
    kept: where rows were removed, how many each shard has.
    made_from: where models and scorers were at `generate`; it decides nothing, `repair` looks there first.
    spent: hours of workers, energy and money that the run took; None where its stats did not say.
    certificate: what the certificate of a run in fast mode says (see `facediffuser.dataset.certificate`); None for others.
    provenances: what the shards were computed with (code, libraries, threads, hardware), and how many `shards` each.
    """

    name: str = Field("", pattern=PART_NAME.pattern)
    fingerprint: str
    scorers: dict[str, str]
    models: dict[str, str]
    run: dict[str, Any]
    rows: Count
    shard_size: int = Field(ge=1)
    kept: list[Count] = []
    made_from: dict[str, str] = {}
    provenances: list[dict[str, Any]] = []
    spent: dict[str, Any] | None = None
    certificate: dict[str, Any] | None = None
    shards: list[ShardEntry]

    @model_validator(mode="after")
    def _lists_what_is_planned(self) -> Self:
        # Whatever walks over shards and plan files is then bounded by the length of the file.
        if len(self.shards) != self.layout.shards:
            raise ValueError(
                f"{counted(self.rows, 'row')} in shards of {self.shard_size} make {counted(self.layout.shards, 'shard')}, "
                f"{len(self.shards)} are listed"
            )
        return self

    def as_part(self, **changes: Any) -> "Part":
        """Return the part, without what a manifest has beside it, with some fields changed; it is checked anew."""
        return Part(**{name: getattr(self, name) for name in Part.model_fields} | changes)

    @property
    def failed(self) -> int:
        """How many of the rows failed."""
        return sum(entry.failed for entry in self.shards)

    @property
    def layout(self) -> Layout:
        """How the part's plan is cut into shards."""
        return Layout(self.rows, self.shard_size, self.name, tuple(self.kept))

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


class Manifest(Part):
    """What a finished dataset holds: its first part, which earlier versions of this code read alone, and the others.

    digest: the sha256 of the manifest's own bytes with this value empty; empty in manifests of earlier versions, which
        list plan, references and shards only. It stays with what is derived of a manifest: `write_manifest` puts it only
        in the place of that one.
    counts: of all parts.
    objects: all that is neither a shard nor below one of the prefixes in `unlisted`.
    more_parts: the parts after the first.
    retractions: people that were taken out, in the order in which they were.
    retracting: not empty where a retraction was begun and is not finished; it tells only whether another is the same.
    """

    digest: str = ""
    schema_version: str
    counts: Counts
    objects: list[ObjectEntry] = []
    unlisted: list[str] = []
    more_parts: list[Part] = []
    retractions: list[Retraction] = []
    retracting: str = ""

    @property
    def parts(self) -> list[Part]:
        """All parts, the first one, which the manifest itself is, included."""
        return [self, *self.more_parts]

    @property
    def all_shards(self) -> list[ShardEntry]:
        """The entries of all parts' shards, part by part."""
        return [entry for part in self.parts for entry in part.shards]

    def planned_keys(self) -> list[str]:
        """Return the keys of all parts' plans and of the references."""
        return [*(key for part in self.parts for key in part.layout.part_keys()), SUBJECTS_KEY]

    def with_parts(self, parts: Sequence[Part]) -> "Manifest":
        """Return the manifest with other parts, and counts of them."""
        changes = {"more_parts": list(parts[1:]), "counts": count_parts(parts)}
        return self.model_copy(update=dict(parts[0].as_part()) | changes)


def count_parts(parts: Sequence[Part]) -> Counts:
    """Return the rows and shards of parts."""
    shards = [entry for part in parts for entry in part.shards]
    ok, failed = sum(entry.ok for entry in shards), sum(entry.failed for entry in shards)
    return Counts(rows=ok + failed, ok=ok, failed=failed, shards=len(shards))


def build_part(
    fingerprint: str,
    run: dict[str, Any],
    layout: Layout,
    shards: list[ShardEntry],
    made_from: dict[str, str] | None = None,
    computed_with: Sequence[dict[str, Any] | None] = (),
    spent: dict[str, Any] | None = None,
) -> Part:
    """Return the part of a dataset that a run made, all of whose shards are there.

    Args:
        fingerprint: the SHA-256 of the run's document.
        run: that document.
        layout: how rows lie in shards.
        shards: an entry for each shard, in order; `computed_with` in them is filled in here.
        made_from: where models and scorers were.
        computed_with: the provenance in each shard's footer, None where it has none; by default none has.
        spent: what the run took.

    Raises:
        RuntimeError: shards or rows are missing.
    """
    rows = sum(shard.ok + shard.failed for shard in shards)
    if len(shards) != layout.shards or rows != layout.rows:
        raise RuntimeError(
            f"{counted(rows, 'row')} in {counted(len(shards), 'shard')}; planned are {layout.rows} in {layout.shards}"
        )
    each = list(computed_with) or [None] * len(shards)
    provenances = count_provenances([one or provenance_of(run) for one in each], SHARDS)
    places = {canonical_json({k: v for k, v in one.items() if k != SHARDS}): n for n, one in enumerate(provenances)}
    shards = [
        entry.model_copy(update={"computed_with": None if one is None else places[canonical_json(one)]})
        for entry, one in zip(shards, each, strict=True)
    ]
    return Part(
        name=layout.name, fingerprint=fingerprint, scorers=run["scorers"], models=run["models"], run=run,
        rows=layout.rows, shard_size=layout.shard_size, kept=list(layout.kept), made_from=made_from or {},
        provenances=provenances, spent=spent, shards=shards,
    )  # fmt: skip


def build_manifest(
    parts: Sequence[Part], objects: list[ObjectEntry] | None = None, retractions: Sequence[Retraction] = ()
) -> Manifest:
    """Return the manifest of a dataset.

    Args:
        parts: its parts, the first one first.
        objects: the entries of plans and references.
        retractions: those that were carried out.
    """
    return Manifest(
        **dict(parts[0].as_part()), schema_version=run_schema_version(parts[0].run), counts=count_parts(parts), objects=objects or [],
        unlisted=list(UNLISTED), more_parts=list(parts[1:]), retractions=list(retractions),
    )  # fmt: skip


def write_manifest(store: Store, manifest: Manifest) -> Manifest:
    """Put the manifest with its digest, and return it; the same dataset gives the same bytes.

    Nothing else writes a dataset's manifest. A command that works for hours holds the manifest that it read at its start;
    another one may have written its own by then, which must not be undone.

    Args:
        store: the dataset.
        manifest: its `digest` is that of the manifest whose place it takes; empty where there is none.

    Raises:
        ChangedError: another manifest is there by now.
    """
    every = manifest.model_dump()
    # A dataset that was made at once and left as it is has the manifest that it always had.
    for document in (every, *every["more_parts"]):
        for name in OPTIONAL_FIELDS:
            if not document.get(name, True):
                del document[name]
    document = {name: every[name] for name in _ORDER if name in every} | {"digest": ""}
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    if manifest_digest(store) != digest:
        require_unchanged(store, manifest.digest)
        store.put(MANIFEST_KEY, text.replace('"digest": ""', f'"digest": "{digest}"', 1).encode())
    return manifest.model_copy(update={"digest": digest})


def manifest_digest(store: Store) -> str:
    """Return the digest in a dataset's manifest, of which only the beginning is read.

    Empty where there is no manifest, or none with a digest: one of an earlier version, or something else.
    """
    try:
        with store.open(MANIFEST_KEY, buffer_bytes=1 << 10) as file:
            found = _DIGEST.match(file.read(1 << 10))
    except (FileNotFoundError, IsADirectoryError):
        return ""
    return found[1].decode() if found else ""


def require_unchanged(store: Store, digest: str) -> None:
    """Check that a dataset's manifest is the one that a command began with.

    Args:
        store: the dataset.
        digest: that of the manifest it began with.

    Raises:
        ChangedError: it is another; run again, the command begins with that one.
    """
    if manifest_digest(store) != digest:
        raise ChangedError(f"{store.url}: changed while this command ran (another command wrote its {MANIFEST_KEY}); run it "
                           "again")  # fmt: skip


def read_manifest(store: Store) -> Manifest:
    """Return a dataset's manifest.

    Its digest is not checked: `manifest_problems` does, and `read_sound_manifest`.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    return parse_manifest(store, read_manifest_bytes(store))


def read_sound_manifest(store: Store) -> Manifest:
    """Return a dataset's manifest, its digest checked. What writes a manifest anew begins with this.

    Raises:
        InputError: there is none, it cannot be read, or it is damaged.
    """
    data = read_manifest_bytes(store)
    manifest = parse_manifest(store, data)
    for problem in manifest_problems(manifest, data):
        raise InputError(f"{store.url_of(MANIFEST_KEY)}: {problem}; put it back, or remove it and let `generate`, with "
                         "its options, write it again")  # fmt: skip
    return manifest


def find_manifest(store: Store) -> Manifest | None:
    """Return a dataset's manifest, its digest checked, None where there is none.

    Raises:
        InputError: it cannot be read, or it is damaged.
    """
    return read_sound_manifest(store) if store.exists(MANIFEST_KEY) else None


def read_manifest_bytes(store: Store) -> bytes:
    """Return a manifest as it stands.

    Raises:
        InputError: there is none, it cannot be read, or it is larger than any manifest.
    """
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
    """Return the manifest that the bytes hold.

    Args:
        store: the dataset, for the error.
        data: the content of manifest.json.

    Raises:
        InputError: they are not a manifest; the error names the first field that is wrong.
    """
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        what = f"{place}: {first['msg']}" if place else first["msg"].removeprefix("Value error, ")
        raise InputError(f"{store.url_of(MANIFEST_KEY)}: not a manifest ({what[:200]}); put it back, or remove it and "
                         "let `generate` write it again") from None  # fmt: skip


def manifest_problems(manifest: Manifest, data: bytes) -> Iterator[str]:
    """Yield what is wrong with a manifest taken by itself, a line each.

    Args:
        manifest: what `data` holds.
        data: the bytes it was read from, for its digest.
    """
    if manifest.digest:
        unsigned = data.replace(f'"digest": "{manifest.digest}"'.encode(), b'"digest": ""', 1)
        if hashlib.sha256(unsigned).hexdigest() != manifest.digest:
            yield "changed since it was written (its digest is of other bytes)"
    else:
        unknown = parse_json(data).keys() - EARLIER_FIELDS
        if unknown:
            yield f"has no digest, but {sorted(unknown)[0]!r}, which no manifest of an earlier version has"
    if manifest.schema_version not in READABLE_VERSIONS:
        yield f"has schema version {manifest.schema_version!r}; this code reads {' and '.join(READABLE_VERSIONS)}"
    for part in manifest.parts:
        if manifest.schema_version in READABLE_VERSIONS and run_schema_version(part.run) != manifest.schema_version:
            yield f"has schema version {manifest.schema_version}, a run of it {run_schema_version(part.run)}"
        yield from _part_problems(part)
    names = [part.name for part in manifest.parts]
    if names[0] or len(set(names)) != len(names):
        yield "names a part twice, or its first one"
    shards, rows = (sum(getattr(part.layout, name) for part in manifest.parts) for name in ("shards", "rows"))
    if manifest.counts.shards != shards:
        yield f"counts {counted(manifest.counts.shards, 'shard')}, planned: {shards}"
    if manifest.counts.rows != rows:
        yield f"counts {counted(manifest.counts.rows, 'row')}, planned: {rows}"
    for name in ("rows", "ok", "failed"):
        total = sum(getattr(entry, name) for entry in manifest.all_shards)
        if total != getattr(manifest.counts, name):
            yield f"counts {getattr(manifest.counts, name)} {name}, its shards {total}"
    if manifest.objects or manifest.digest:
        listed = [entry.key for entry in manifest.objects]
        there = set(listed)
        if len(there) != len(listed):
            yield "lists an object twice"
        for key in manifest.planned_keys():
            if key not in there:
                yield f"does not list {key}"
    if manifest.retracting:
        yield "a subject is being taken out, and that was interrupted; run `facediffuser retract` with it again"


def _part_problems(part: Part) -> Iterator[str]:
    """Yield what is wrong with a part taken by itself."""
    layout = part.layout
    if not has_fingerprint(part.run, part.fingerprint):
        yield "its run is not the one of its fingerprint"
    for name in ("models", "scorers"):
        if getattr(part, name) != part.run.get(name):
            yield f"its {name} are not those of its run"
    if part.kept and sum(part.kept) != part.rows:
        yield f"keeps {counted(sum(part.kept), 'row')}, it says {part.rows}"
    planned = (layout.shard_key(shard) for shard in range(layout.shards))
    for key, entry in zip(planned, part.shards, strict=True):
        if entry.key != key:
            yield f"lists {entry.key!r} where {key} is planned"
            break
    for shard, entry in enumerate(part.shards):
        if entry.rows != layout.shard_rows(shard) or entry.rows != entry.ok + entry.failed:
            listed = f"{counted(entry.rows, 'row')} ({entry.ok} ok, {entry.failed} failed)"
            yield f"lists {listed} of {entry.key}, planned: {layout.shard_rows(shard)}"
            break


def object_entries(store: Store, keys: Iterable[str]) -> list[ObjectEntry]:
    """Return the entries of objects, read now."""
    return [object_entry(key, store.get(key)) for key in keys]


def find_row(store: Store, manifest: Manifest, sample_id: str) -> tuple[Part, int, int]:
    """Return the part of a row, its shard and its place in it, both from 0.

    Args:
        store: the dataset.
        manifest: the dataset's.
        sample_id: the row's.

    Raises:
        InputError: the dataset has no such row.
    """
    for part in manifest.parts:
        if found := find_sample(store, part.layout, sample_id):
            return part, *found
    raise InputError(f"{store.url}: no row {sample_id!r}; look in column sample_id of its plan")


def require_objects(store: Store, manifest: Manifest) -> None:
    """Raise InputError for an object that a manifest lists and that is missing or of another size; one listing, no reading.

    The card does not count: it is written anew by whatever changes a dataset.
    """
    sizes = {info.key: info.size for info in store.list()}
    entries: list[ShardEntry | ObjectEntry] = [*manifest.all_shards, *manifest.objects]
    for entry in entries:
        if entry.key.startswith("card/") or entry.key == "README.md" or sizes.get(entry.key) == entry.bytes:
            continue
        what = f"{sizes[entry.key]} bytes, the manifest says {entry.bytes}" if entry.key in sizes else "missing"
        raise InputError(f"{store.url_of(entry.key)}: {what}; put it back, or run `facediffuser repair`")


def object_entry(key: str, data: bytes) -> ObjectEntry:
    """Return the entry of an object that holds `data`."""
    return ObjectEntry(key=key, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def shard_entry(store: Store, layout: Layout, shard: int, info: ObjectInfo) -> ShardEntry:
    """Return the entry of a finished shard: from its stats, or from the shard itself where they are missing or old.

    Args:
        store: the dataset.
        layout: how the plan is cut into shards.
        shard: the shard's number, from 0.
        info: its key and size in bytes.
    """
    try:
        stats = parse_json(store.get(layout.stats_key(shard)))
        if stats["bytes"] == info.size and stats["rows"] == layout.shard_rows(shard):
            return ShardEntry(key=info.key, **{name: stats[name] for name in ENTRY_NAMES})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # a worker ended between the shard and its stats: the shard tells the same
    with readable_parquet(store, info.key):
        return entry_of_shard(info.key, store.get(info.key))


def entry_of_shard(key: str, data: bytes) -> ShardEntry:
    """Return the entry of a shard whose Parquet is `data`; the provenance in its footer is not looked at."""
    status = pq.read_table(io.BytesIO(data), columns=["status"])["status"].to_pylist()
    digest, ok = hashlib.sha256(data).hexdigest(), status.count("ok")
    return ShardEntry(key=key, rows=len(status), ok=ok, failed=len(status) - ok, bytes=len(data), sha256=digest)


def begun_parts(store: Store, manifest: Manifest | None) -> list[str]:
    """Return the names of the parts whose rows are being added: their plan is there, and no manifest lists them."""
    listed = {part.name for part in manifest.parts} if manifest else set()
    return [name for name in part_names(info.key for info in store.list("plan/")) if name not in listed]


def listed_shards(store: Store, manifest: Manifest | None) -> list[ObjectInfo]:
    """Return the shards of a dataset that are there, without those of rows that are still being added to it.

    Args:
        store: the dataset.
        manifest: what lists its shards; None: all of `data/`, for a dataset that is not finished.

    Raises:
        InputError: there are none.
    """
    shards = list_shards(store)
    if manifest is None:
        return shards
    listed = {entry.key for entry in manifest.all_shards}
    found = [info for info in shards if info.key in listed]
    if not found:
        raise InputError(f"{store.url}: none of the shards that its {MANIFEST_KEY} lists is there; put them back, or run "
                         "`facediffuser repair`")  # fmt: skip
    return found
