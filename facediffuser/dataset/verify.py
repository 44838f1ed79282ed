"""Verification: every object against the manifest, every planned row exactly once, every image readable."""

import hashlib
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facediffuser.dataset.added_columns import ADDED_PREFIX
from facediffuser.dataset.certificate import CERTIFICATE_PREFIX, CERTIFICATE_SCHEMA, certified_part, dataset_certificate
from facediffuser.dataset.consent import expired_subjects
from facediffuser.dataset.manifest import (
    ENTRY_NAMES,
    MANIFEST_KEY,
    Manifest,
    ObjectEntry,
    Part,
    ShardEntry,
    manifest_problems,
    read_manifest,
    read_manifest_bytes,
)
from facediffuser.dataset.plan import Layout, part_names, read_shard_rows
from facediffuser.dataset.reading import DATA_PREFIX
from facediffuser.dataset.schema import FINGERPRINT_KEY, PLAN_SCHEMA, SUBJECTS_KEY, schema_of_run
from facediffuser.errors import InputError
from facediffuser.number_words import counted
from facediffuser.pictures import stored_picture
from facediffuser.storage import ObjectInfo, Store, open_store
from facediffuser.storage.base import StorageError
from facediffuser.storage.reading import parse_json

READERS = 4
_EARLIER = (
    "{url}: its manifest is of an earlier version, without a digest of itself and of README.md, card/ and scores/; "
    "`facediffuser card` adds them"
)


@dataclass(frozen=True)
class Problem:
    """What is wrong with one object.

    `shard`: its number when the object is, or should be, a shard of the dataset, and `part` the number of its part, from
    0; `foreign`: below data/ and none; `unlisted`: elsewhere and not in the manifest; `stats`: a worker's stats of a shard;
    `certificate`: listed, and of a certificate.
    """

    key: str
    what: str
    shard: int | None = None
    part: int = 0
    foreign: bool = False
    unlisted: bool = False
    stats: bool = False
    certificate: bool = False

    def __str__(self) -> str:
        return f"{self.key}: {self.what}"


@dataclass(frozen=True)
class Findings:
    """What is wrong with a dataset, and notes on what its manifest says nothing of."""

    problems: list[Problem]
    notes: list[str]


def verify(url: str) -> list[str]:
    """Return what is wrong with a dataset, one line each; an empty list when all is as the manifest says.

    The manifest is checked against its own digest, and every other object (plan, references, card, added scores) for
    presence and SHA-256; what is there and not listed is named. Each shard is also checked for schema, fingerprint,
    rows (each planned row once, in its order), images (present, their SHA-256, decodable) and counts.

    Args:
        url: the dataset: a folder or a URL that `open_store` knows.

    Raises:
        InputError: there is no manifest, or one that cannot be read.
    """
    return [str(problem) for problem in inspect(url).problems]


def inspect(url: str) -> Findings:
    """Return what `verify` finds, and notes: whose consent has expired, what an earlier version's manifest leaves out.

    Args:
        url: the dataset.

    Raises:
        InputError: there is no manifest, or one that cannot be read.
    """
    store = open_store(url)
    manifest = read_manifest(store)
    problems = find_problems(store, manifest)
    expired = [] if any(problem.key == SUBJECTS_KEY for problem in problems) else expired_subjects(store)
    return Findings(problems, [*([] if manifest.digest else [_EARLIER.format(url=store.url)]), *expired])


def find_problems(store: Store, manifest: Manifest) -> list[Problem]:
    """Return what is wrong with a dataset."""
    present = {info.key: info for info in store.list()}
    problems = [Problem(MANIFEST_KEY, what) for what in manifest_problems(manifest, read_manifest_bytes(store))]
    listed = {entry.key for entry in manifest.all_shards}
    begun = _parts_begun(manifest, present)
    for name in begun:
        problems.append(Problem(f"plan/part-{name}-*.parquet", "rows are being added, and that is not finished; run "
                                "`facediffuser generate --extend` again", unlisted=True))  # fmt: skip
    for key in present:
        if key.startswith(DATA_PREFIX) and key not in listed and not set(part_names([key])) & set(begun):
            problems.append(Problem(key, "not a shard of this dataset; remove it", foreign=True))
    problems += _objects(store, manifest, present)
    places = [(number, shard) for number, part in enumerate(manifest.parts) for shard in range(part.layout.shards)]
    for number, part in enumerate(manifest.parts):
        problems += _stats(store, part, present, number)
    with ThreadPoolExecutor(READERS) as pool:
        checks = pool.map(lambda place: check_shard(store, manifest.parts[place[0]], place[1]), places)
        for (number, shard), found in zip(places, checks, strict=True):
            problems += [Problem(manifest.parts[number].shards[shard].key, what, shard, number) for what in found]
    return problems


def _parts_begun(manifest: Manifest, keys: Iterable[str]) -> list[str]:
    """The names of the parts that have a plan among the keys and are not in the manifest."""
    listed = {part.name for part in manifest.parts}
    return [name for name in part_names(key for key in keys if key.startswith("plan/")) if name not in listed]


def _objects(store: Store, manifest: Manifest, present: dict[str, ObjectInfo]) -> Iterator[Problem]:
    for entry in manifest.objects:
        data, what = _read(store, entry)
        if what and entry.key.startswith(CERTIFICATE_PREFIX):
            yield Problem(entry.key, f"{what}; `facediffuser repair` makes it again", certificate=True)
        elif what:
            yield Problem(entry.key, what)
        elif entry.key.startswith(CERTIFICATE_PREFIX):
            for problem in _certificate(store, manifest, entry.key, data):
                yield Problem(entry.key, problem, certificate=True)
    if not manifest.digest:
        return
    listed, begun = {entry.key for entry in manifest.objects}, _parts_begun(manifest, present)
    for key in sorted(present.keys() - listed - {MANIFEST_KEY}):
        if certified_part(key) in begun:
            continue
        hidden = any(part.startswith(".") for part in key.split("/"))  # of a file manager, a hub's client, git
        if not hidden and not _parts_begun(manifest, [key]) and not key.startswith((DATA_PREFIX, *manifest.unlisted)):
            yield Problem(key, "not listed in the manifest; " + _ways_out(key), unlisted=True)


def _certificate(store: Store, manifest: Manifest, key: str, data: bytes) -> Iterator[str]:
    """What is wrong with an object of a certificate whose bytes are those listed."""
    name = certified_part(key)
    part = next((part for part in manifest.parts if part.name == name), None)
    if part is None:
        yield "of no part of this dataset; remove it"
        return
    if key.endswith(".json"):
        if dataset_certificate(store, part.name) != part.certificate:
            yield "says other than the manifest; `facediffuser repair` writes it again"
        return
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        yield f"not readable as Parquet ({type(error).__name__})"
        return
    if not table.schema.equals(CERTIFICATE_SCHEMA):
        yield "its columns are not a certificate's"
        return
    mark = (table.schema.metadata or {}).get(FINGERPRINT_KEY, b"").decode(errors="replace")
    if mark != part.fingerprint:
        yield f"made by another run (fingerprint {mark[:12]})"
    # A pair may be missing because the dataset's row failed; its image in exact mode is kept all the same.
    kept = table.filter(pc.is_valid(pc.struct_field(table["image"], "bytes")))
    status = table.schema.get_field_index("status")
    yield from _images(kept.set_column(status, "status", pa.array(["ok"] * kept.num_rows, pa.string())))


def _ways_out(key: str) -> str:
    ours = key.startswith(("card/", ADDED_PREFIX)) or key == "README.md"
    return "`facediffuser card` lists it, or remove it" if ours else "remove it"


def _stats(store: Store, part: Part, present: dict[str, ObjectInfo], number: int) -> Iterator[Problem]:
    """What the workers' stats say of their shards must be what the manifest says; timings are theirs alone."""
    layout = part.layout
    for shard, entry in enumerate(part.shards):
        key = layout.stats_key(shard)
        if key not in present:
            continue
        try:
            stats = parse_json(store.get(key))
            same = all(stats[name] == getattr(entry, name) for name in ENTRY_NAMES)
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            yield Problem(key, "not a shard's stats; remove it", part=number, stats=True)
        else:
            if not same:
                yield Problem(key, f"says other than the manifest of {entry.key}; remove it", part=number, stats=True)


def _read(store: Store, entry: ObjectEntry | ShardEntry) -> tuple[bytes, str | None]:
    """Return a listed object's bytes and what is wrong with them, if anything is."""
    try:
        # No more than is listed and a byte: what stands there may be of any size.
        with store.open(entry.key) as file:
            data = file.read(entry.bytes + 1)
    except FileNotFoundError:
        return b"", "missing"
    except IsADirectoryError:
        return b"", "a folder stands in its place; remove it"
    except StorageError:
        raise
    except OSError as error:
        return b"", f"cannot be read ({error.strerror})"
    if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
        size = f"more than {entry.bytes}" if len(data) > entry.bytes else str(len(data))
        return data, f"sha256 differs from the manifest's ({size} bytes, listed {entry.bytes})"
    return data, None


def check_shard(store: Store, part: Part, shard: int) -> list[str]:
    """Return what is wrong with one shard, one line each.

    Args:
        store: the dataset.
        part: the part of the dataset that it belongs to.
        shard: its number in the part, from 0.
    """
    entry = part.shards[shard]
    data, what = _read(store, entry)
    if what:
        return [what]
    try:
        table = pq.read_table(io.BytesIO(data))
        if not table.schema.equals(schema_of_run(part.run)):
            return ["its columns are not a dataset's"]
        problems = []
        mark = (table.schema.metadata or {}).get(FINGERPRINT_KEY, b"").decode(errors="replace")
        if mark != part.fingerprint:
            problems.append(f"made by another run (fingerprint {mark[:12]})")
        problems += _rows_as_planned(store, part.layout, shard, entry, table)
        problems += _images(table)
    except StorageError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        return [f"not readable as Parquet ({type(error).__name__})"]
    return problems


def _rows_as_planned(store: Store, layout: Layout, shard: int, entry: ShardEntry, table: pa.Table) -> Iterator[str]:
    if table.num_rows != entry.rows:
        yield f"{counted(table.num_rows, 'row')}, the manifest says {entry.rows}"
    try:
        planned = read_shard_rows(store, layout, shard)
    except StorageError:
        raise
    except (OSError, InputError, IndexError) as error:
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
