"""Finished datasets joined as one: shards and plans are copied as they are, references and added columns are put together."""

import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from facediffuser.batch_stage import Counts, Results, Stage, Unit, WorkerPool
from facediffuser.cards.dataset_card import rewrite_card, write_card
from facediffuser.curation.curation_settings import MergeSettings
from facediffuser.dataset.added_columns import (
    ADDED_PREFIX,
    AddedColumns,
    added_key,
    read_added_columns,
    write_added_columns,
)
from facediffuser.dataset.certificate import certified_part, renamed_key
from facediffuser.dataset.consent import recorded_terms
from facediffuser.dataset.extension import (
    SampleIds,
    add_references,
    encode_references_of_parts,
    output_state,
    part_name,
    planned_ids,
    read_references,
)
from facediffuser.dataset.manifest import (
    MANIFEST_KEY,
    Manifest,
    ObjectEntry,
    Part,
    Retraction,
    ShardEntry,
    begun_parts,
    build_manifest,
    object_entry,
    read_manifest,
    read_sound_manifest,
)
from facediffuser.dataset.reading import read_chosen
from facediffuser.dataset.schema import SUBJECTS_KEY, schema_of_run
from facediffuser.dataset.seal import seal
from facediffuser.dataset.spending import write_spent
from facediffuser.errors import InputError
from facediffuser.number_words import counted
from facediffuser.pictures import stored_picture
from facediffuser.runs import canonical_json, fingerprint_of
from facediffuser.storage import Store, open_store

logger = logging.getLogger(__name__)

MARK_KEY = "stats/merge.json"
# Of the numbers of a unit vector.
SAME_VECTOR = 0.01


@dataclass(frozen=True)
class Source:
    """A dataset that is merged, and the names that its parts have in the result."""

    store: Store
    manifest: Manifest
    names: tuple[str, ...]

    def renamed(self) -> list[tuple[Part, Part]]:
        """Return each part as it is here and as it is in the result."""
        return [(part, _renamed(part, name)) for part, name in zip(self.manifest.parts, self.names, strict=True)]

    def copies(self) -> list[Unit]:
        """Return the objects that are copied: the key in the result, the rows, and (URL, key here, bytes, SHA-256)."""
        units = []
        listed = {entry.key: entry for entry in self.manifest.objects}
        for part, new in self.renamed():
            keys = dict(zip(part.layout.part_keys(), new.layout.part_keys(), strict=True))
            keys |= {key: renamed_key(key, new.name) for key in listed if certified_part(key) == part.name}
            units += [self._copy(listed[key], new_key) for key, new_key in keys.items()]
            units += [self._copy(one, two.key, one.rows) for one, two in zip(part.shards, new.shards, strict=True)]
        return units

    def _copy(self, entry: ObjectEntry | ShardEntry, key: str, rows: int = 0) -> Unit:
        return Unit(key, rows, (self.store.url, entry.key, entry.bytes, entry.sha256))


def _renamed(part: Part, name: str) -> Part:
    layout = part.as_part(name=name).layout
    shards = [entry.model_copy(update={"key": layout.shard_key(n)}) for n, entry in enumerate(part.shards)]
    return part.as_part(name=name, shards=shards)


def open_sources(urls: Sequence[str]) -> list[Source]:
    """Return the datasets to merge.

    Raises:
        InputError: one is not finished or damaged, is named twice, has another schema than the first, or a manifest of the
            earliest kind, which lists shards only.
    """
    sources: list[Source] = []
    number = 1
    for url in urls:
        store = open_store(url)
        if store.url in [source.store.url for source in sources]:
            raise InputError(f"{url}: named twice; name each dataset once")
        manifest = read_sound_manifest(store)
        if not manifest.objects:
            raise InputError(f"{url}: its manifest lists neither plan nor references; run `facediffuser card {url}` first, which "
                             "lists them")  # fmt: skip
        if sources and manifest.schema_version != sources[0].manifest.schema_version:
            raise InputError(f"{url}: has schema version {manifest.schema_version!r}, {sources[0].store.url} has "
                             f"{sources[0].manifest.schema_version!r}; merge datasets of one version")  # fmt: skip
        if sources and schema_of_run(manifest.run) != schema_of_run(sources[0].manifest.run):
            raise InputError(f"{url}: its faces have embeddings of another length than those of {sources[0].store.url}, or "
                             "none; merge datasets of the same scorers, all with embeddings or all without")  # fmt: skip
        if output_state(store).begun:
            raise InputError(f"{url}: rows are being added to it; finish that with `facediffuser generate --extend`")
        names = tuple(part_name(number + place) for place in range(len(manifest.parts)))
        number += len(names)
        sources.append(Source(store, manifest, names))
    return sources


def require_mergeable(sources: Sequence[Source]) -> None:
    """Check that the datasets can be in one.

    Raises:
        InputError: two have a sample id in common, or another class word, other pictures, crops or identities for one
            subject id.
    """
    known: list[tuple[Source, SampleIds]] = []
    for source in sources:
        ids = list(planned_ids(source.store, [part.name for part in source.manifest.parts]))
        for other, there in known:
            clash = there.contain(ids)
            if clash.any():
                raise InputError(f"{other.store.url} and {source.store.url}: both have the row {ids[int(clash.argmax())]!r}"
                                 f" ({counted(int(clash.sum()), 'row')} in all); merge datasets of different rows")  # fmt: skip
        known.append((source, SampleIds(ids)))
    _require_same_people(sources)
    merged_columns(sources)


@dataclass(frozen=True)
class _Picture:
    """What a dataset has of one reference picture: the crop that the model is shown, and the vector of the face."""

    digest: str
    crop_box: list[int] | None
    identity: list[float] | None


@dataclass(frozen=True)
class _Person:
    """What tells people of one id apart: their class words, and what there is of each picture by its SHA-256."""

    class_words: set[str]
    pictures: dict[str, _Picture]


def _require_same_people(sources: Sequence[Source]) -> None:
    """Check that a subject id stands for one person who looks alike: the first dataset's references serve all rows.

    Raises:
        InputError: it does not.
    """
    known: dict[str, tuple[Source, _Person]] = {}
    for source in sources:
        for name, here in _people(source.store).items():
            other, there = known.setdefault(name, (source, here))
            what = _difference(name, other, there, source, here)
            if what:
                raise InputError(f"{other.store.url} and {source.store.url}: subject {name!r} has {what} in each; generate one of "
                                 "them under another id")  # fmt: skip
    terms: dict[str, tuple[Source, dict[str, str | None]]] = {}
    for source in sources:
        for name, own in recorded_terms(source.store).items():
            other, first = terms.setdefault(name, (source, own))
            if own != first:
                logger.warning(
                    "%s: what subject %r agreed to is not what %s says, which stays",
                    source.store.url,
                    name,
                    other.store.url,
                )


def _people(store: Store) -> dict[str, _Person]:
    found: dict[str, _Person] = {}
    for row in read_references(store).to_pylist():
        person = found.setdefault(row["subject_id"], _Person(set(), {}))
        person.class_words.add(row["class_word"])
        digest = hashlib.sha256(row["image"]["bytes"]).hexdigest()
        person.pictures[row["source_sha256"]] = _Picture(digest, row.get("crop_box"), row.get("identity"))
    return found


def _difference(name: str, other: Source, there: _Person, source: Source, here: _Person) -> str | None:
    """What differs of a person in two datasets, in words; None for nothing."""
    if there.class_words != here.class_words or there.pictures.keys() != here.pictures.keys():
        return "other pictures or another class word"
    pairs = [(there.pictures[key], here.pictures[key]) for key in there.pictures]
    if any(one.crop_box != two.crop_box for one, two in pairs):
        return "another crop of its reference pictures (--reference-crop, --reference-margin)"
    # Another version of the encoder writes other bytes of the same pixels.
    if any(one.digest != two.digest for one, two in pairs) and _pixels(other.store, name) != _pixels(
        source.store, name
    ):
        return "other pixels in its cropped reference pictures (--reference-crop, --reference-margin)"
    if not all(_same_vector(one.identity, two.identity) for one, two in pairs):
        return "another identity vector (other --scorers)"
    return None


def _pixels(store: Store, name: str) -> dict[str, tuple[tuple[int, int], bytes]]:
    rows = read_chosen(store, SUBJECTS_KEY, ("subject_id", "source_sha256", "image"), "subject_id", [name]).to_pylist()
    pictures = {row["source_sha256"]: stored_picture(row["image"]["bytes"], f"{SUBJECTS_KEY}: {name}") for row in rows}
    return {key: (picture.size, picture.tobytes()) for key, picture in pictures.items()}


def _same_vector(one: list[float] | None, two: list[float] | None) -> bool:
    """Whether two vectors are one network's of one picture: other hardware gives other last bits."""
    if one is None or two is None:
        return one is two
    return len(one) == len(two) and bool(np.allclose(one, two, atol=SAME_VECTOR))


def merged_columns(sources: Sequence[Source]) -> dict[str, pa.Table]:
    """Return the added columns of all datasets together, by the name of their file.

    Raises:
        InputError: they were added by different scorers, or have different columns.
    """
    tables: dict[str, list[pa.Table]] = {}
    for source in sources:
        for url, table in read_added_columns(source.store).tables.items():
            tables.setdefault(url.rsplit("/", 1)[1].removesuffix(".parquet"), []).append(table)
    for name, found in tables.items():
        for other in found[1:]:
            if not other.schema.equals(found[0].schema, check_metadata=True):
                raise InputError(f"{ADDED_PREFIX}{name}.parquet: was added by different scorers or has different columns in the "
                                 "datasets; add it to all of them with one scorer")  # fmt: skip
        if len(found) < len(sources):
            logger.warning("%s%s.parquet: only %d of %d datasets have it; null for rows of the others", ADDED_PREFIX, name,
                           len(found), len(sources))  # fmt: skip
    return {name: pa.concat_tables(found).combine_chunks() for name, found in tables.items()}


def merge_identity(sources: Sequence[Source]) -> dict[str, Any]:
    """Return what decides the result: the datasets' manifests, in their order."""
    return {"merge": [hashlib.sha256(source.store.get(MANIFEST_KEY)).hexdigest() for source in sources]}


def require_output(store: Store, sources: Sequence[Source]) -> Manifest | None:
    """Check that the output is empty or holds this very merge, finished or not, and nothing has changed it since.

    Args:
        store: the output.
        sources: the datasets to merge.

    Returns:
        The manifest of the finished merge, None where it is not finished.

    Raises:
        InputError: the output holds something else, or the merge has been changed.
    """
    store.require_writable()
    if not store.exists(MARK_KEY):
        if present := store.list():
            raise InputError(f"{store.url}: holds {present[0].key!r}; give an empty output")
        return None
    if store.get(MARK_KEY) != _mark(merge_identity(sources)):
        raise InputError(f"{store.url}: holds a merge of other datasets, or of these before they changed; give an empty "
                         "output")  # fmt: skip
    if not store.exists(MANIFEST_KEY):
        return None
    manifest = read_manifest(store)
    for change in _changes(store, manifest, sources):
        raise InputError(f"{store.url}: changed since it was merged ({change}); give an empty output")
    return read_sound_manifest(store)


def _changes(store: Store, manifest: Manifest, sources: Sequence[Source]) -> Iterator[str]:
    """What was done to a finished merge that merging anew would undo, in words."""
    if manifest.retracting:
        yield "a subject is being taken out of it"
    if manifest.retractions != _retractions(sources):
        yield "people were taken out of it"
    if begun_parts(store, manifest):
        yield "rows are being added to it"
    parts = [new for source in sources for _, new in source.renamed()]
    if len(manifest.parts) > len(parts):
        yield "rows were added to it"
    for part, new in zip(manifest.parts, parts, strict=False):
        if (part.name, part.fingerprint) != (new.name, new.fingerprint):
            yield f"part {new.name or 'one'} is of another run"
    entries: list[ShardEntry | ObjectEntry] = [*manifest.all_shards, *manifest.objects]
    listed = {entry.key: entry.sha256 for entry in entries}
    for source in sources:
        for unit in source.copies():
            if unit.key not in listed:
                yield f"{unit.key} is not in its manifest"
            elif listed[unit.key] != unit.data[3]:
                yield f"{unit.key} is not the one of {source.store.url}"


def _retractions(sources: Sequence[Source]) -> list[Retraction]:
    return [one for source in sources for one in source.manifest.retractions]


def _mark(identity: dict[str, Any]) -> bytes:
    return canonical_json({"fingerprint": fingerprint_of(identity)}).encode()


class CopyWorker:
    """Copies one object after another to the output, in the store where it can."""

    def __init__(self, output: str):
        self.store = open_store(output)
        self.sources: dict[str, Store] = {}

    def __call__(self, unit: Unit) -> Counts:
        url, key, size, digest = unit.data
        source = self.sources.setdefault(url, open_store(url))
        try:
            data = self.store.copy_from(source, key, unit.key)
        except FileNotFoundError:
            raise InputError(f"{source.url_of(key)}: missing; run `facediffuser repair {url}`") from None
        if data is not None and (len(data) != size or hashlib.sha256(data).hexdigest() != digest):
            self.store.delete(unit.key)
            raise _damaged(unit)
        return {"copied": 1, "rows": unit.rows}


def _damaged(unit: Unit) -> InputError:
    url, key = unit.data[:2]
    return InputError(f"{open_store(url).url_of(key)}: is not as its manifest says; run `facediffuser repair {url}`")


def _require_copied(store: Store, units: Sequence[Unit]) -> None:
    """Raise InputError for a copy that is not as long as its manifest says: a server that copies by itself does not look."""
    there = {info.key: info.size for info in store.list()}
    for unit in units:
        if there.get(unit.key) != unit.data[2]:
            store.delete(unit.key)
            raise _damaged(unit)


def merge_stage(settings: MergeSettings) -> Stage:
    """Return the stage that merges datasets; its result is the manifest of the merged one.

    Raises:
        InputError: see `open_sources`, `require_mergeable`, `require_output`.
    """
    sources, store = open_sources(settings.urls), open_store(settings.output)
    identity = merge_identity(sources)
    finished = require_output(store, sources)
    if not store.exists(MARK_KEY):
        require_mergeable(sources)
        store.put(MARK_KEY, _mark(identity), if_absent=True)
    there = {info.key: info.size for info in store.list()}
    every = [unit for source in sources for unit in source.copies()]
    units = [unit for unit in every if there.get(unit.key) != unit.data[2]]
    return Stage(
        "Merge", "images", identity, units, functools.partial(CopyWorker, settings.output),
        functools.partial(_finish, sources, store, finished),
        sum(unit.rows for unit in every) - sum(unit.rows for unit in units), WorkerPool(settings.workers),
    )  # fmt: skip


def _finish(sources: Sequence[Source], store: Store, finished: Manifest | None, results: Results) -> Manifest:
    """Write what is beside the shards and return the manifest; of a merge that was `finished` only what is missing."""
    _require_copied(store, [unit for source in sources for unit in source.copies()])
    there = {info.key for info in store.list()}
    # What is not listed any more was removed by somebody.
    wanted = {entry.key for entry in finished.objects if entry.key not in there} if finished else None
    parts = [new for source in sources for _, new in source.renamed()]
    subjects = encode_references_of_parts(_merged_references(sources), parts)
    if wanted is None or SUBJECTS_KEY in wanted:
        store.put(SUBJECTS_KEY, subjects)
    written = []
    for name, table in merged_columns(sources).items():
        if wanted is None or added_key(name) in wanted:
            added = AddedColumns({name: table}, ())
            written.append(write_added_columns(store, name, table, added.digests(), added.licences()))
    if finished:
        if wanted:
            rewrite_card(store)
        return read_sound_manifest(store)
    plans = [
        ObjectEntry(key=unit.key, bytes=unit.data[2], sha256=unit.data[3])
        for source in sources
        for unit in source.copies()
        if unit.key.startswith("plan/")
    ]
    write_spent(store, parts)
    write_card(store)
    built = build_manifest(parts, [*plans, object_entry(SUBJECTS_KEY, subjects)], _retractions(sources))
    return seal(store, built, written)


def _merged_references(sources: Sequence[Source]) -> pa.Table:
    """The references of all people, those of the first dataset that has a person: `_require_same_people` holds."""
    table = read_references(sources[0].store)
    for source in sources[1:]:
        known, own = set(table["subject_id"].to_pylist()), read_references(source.store)
        table = add_references(
            table, own.filter(pa.array([name not in known for name in own["subject_id"].to_pylist()], pa.bool_()))
        )
    return table
