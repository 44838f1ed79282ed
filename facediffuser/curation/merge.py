"""Finished datasets joined as one: shards and plans are copied as they are, references and added columns are put together."""

import functools
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from facediffuser.batch_stage import Counts, Results, Stage, Unit, WorkerPool
from facediffuser.cards.dataset_card import write_card
from facediffuser.curation.curation_settings import MergeSettings
from facediffuser.dataset.added_columns import ADDED_PREFIX, AddedColumns, read_added_columns, write_added_columns
from facediffuser.dataset.certificate import certified_part, renamed_key
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
    ShardEntry,
    build_manifest,
    object_entry,
    read_sound_manifest,
)
from facediffuser.dataset.schema import SUBJECTS_KEY, schema_of_run
from facediffuser.dataset.seal import seal
from facediffuser.dataset.spending import write_spent
from facediffuser.errors import InputError
from facediffuser.number_words import counted
from facediffuser.runs import canonical_json, fingerprint_of
from facediffuser.storage import Store, open_store

logger = logging.getLogger(__name__)

MARK_KEY = "stats/merge.json"


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
        InputError: one is not finished or damaged, is named twice, or has another schema than the first.
    """
    sources: list[Source] = []
    number = 1
    for url in urls:
        store = open_store(url)
        if store.url in [source.store.url for source in sources]:
            raise InputError(f"{url}: named twice; name each dataset once")
        manifest = read_sound_manifest(store)
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
        InputError: two have a sample id in common, or other pictures or another class word for one subject id.
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
    people: dict[str, tuple[Source, tuple]] = {}
    for source in sources:
        for name, looks in _looks(read_references(source.store)).items():
            other, known_looks = people.setdefault(name, (source, looks))
            if known_looks != looks:
                raise InputError(f"{other.store.url} and {source.store.url}: subject {name!r} has other pictures or another "
                                 "class word in each; generate one of them under another id")  # fmt: skip
    merged_columns(sources)


def _looks(references: pa.Table) -> dict[str, tuple]:
    """What tells people apart: the class word and the pictures' digests of each subject."""
    found: dict[str, list] = {}
    for row in references.select(["subject_id", "class_word", "source_sha256"]).to_pylist():
        found.setdefault(row["subject_id"], []).append((row["class_word"], row["source_sha256"]))
    return {name: tuple(sorted(set(values))) for name, values in found.items()}


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


def require_output(store: Store, identity: dict[str, Any]) -> None:
    """Check that the output is empty or holds this very merge, finished or not.

    Args:
        store: the output.
        identity: what `merge_identity` returns.

    Raises:
        InputError: it holds something else.
    """
    store.require_writable()
    if not store.exists(MARK_KEY):
        if present := store.list():
            raise InputError(f"{store.url}: holds {present[0].key!r}; give an empty output")
    elif store.get(MARK_KEY) != _mark(identity):
        raise InputError(f"{store.url}: holds a merge of other datasets, or of these before they changed; give an empty "
                         "output")  # fmt: skip


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
    require_output(store, identity)
    if not store.exists(MARK_KEY):
        require_mergeable(sources)
        store.put(MARK_KEY, _mark(identity), if_absent=True)
    there = {info.key: info.size for info in store.list()}
    every = [unit for source in sources for unit in source.copies()]
    units = [unit for unit in every if there.get(unit.key) != unit.data[2]]
    return Stage(
        "Merge", "images", identity, units, functools.partial(CopyWorker, settings.output),
        functools.partial(_finish, sources, store),
        sum(unit.rows for unit in every) - sum(unit.rows for unit in units), WorkerPool(settings.workers),
    )  # fmt: skip


def _finish(sources: Sequence[Source], store: Store, results: Results) -> Manifest:
    _require_copied(store, [unit for source in sources for unit in source.copies()])
    parts = [new for source in sources for _, new in source.renamed()]
    references = functools.reduce(add_references, (read_references(source.store) for source in sources))
    subjects = encode_references_of_parts(references, parts)
    store.put(SUBJECTS_KEY, subjects)
    written = []
    for name, table in merged_columns(sources).items():
        added = AddedColumns({name: table}, ())
        written.append(write_added_columns(store, name, table, added.digests(), added.licences()))
    plans = [
        ObjectEntry(key=unit.key, bytes=unit.data[2], sha256=unit.data[3])
        for source in sources
        for unit in source.copies()
        if unit.key.startswith("plan/")
    ]
    write_spent(store, parts)
    write_card(store)
    retractions = [one for source in sources for one in source.manifest.retractions]
    built = build_manifest(parts, [*plans, object_entry(SUBJECTS_KEY, subjects)], retractions)
    return seal(store, built, written)
