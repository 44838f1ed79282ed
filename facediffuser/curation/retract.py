"""A person taken out of a dataset: shards, plan, references, added columns, card and manifest are made without them."""

import functools
import hashlib
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from facediffuser.batch_stage import Counts, Results, Stage, Unit, WorkerPool
from facediffuser.cards.dataset_card import write_card
from facediffuser.curation.curation_settings import RetractSettings
from facediffuser.dataset.added_columns import KEY
from facediffuser.dataset.encoding import parquet_bytes
from facediffuser.dataset.extension import UNFINISHED_REFERENCES, read_references
from facediffuser.dataset.manifest import (
    Manifest,
    Part,
    Retraction,
    ShardEntry,
    begun_parts,
    entry_of_shard,
    manifest_problems,
    object_entry,
    parse_manifest,
    read_manifest_bytes,
    require_objects,
    write_manifest,
)
from facediffuser.dataset.mentions import mentioned, subjects_of_sample, text_columns, without_mentions
from facediffuser.dataset.plan import Layout, encode_groups
from facediffuser.dataset.reading import READERS, open_parquet, readable_parquet
from facediffuser.dataset.references import ROWS_PER_GROUP
from facediffuser.dataset.schema import SUBJECTS_KEY
from facediffuser.dataset.seal import CARD_PREFIX, KEPT_ENTRIES, README_KEY, seal
from facediffuser.dataset.shards import encode_table
from facediffuser.errors import InputError
from facediffuser.storage import Store, open_store

logger = logging.getLogger(__name__)

LEFTOVERS = ("stats/scores-", UNFINISHED_REFERENCES)


def begin_retraction(store: Store, subject: str) -> tuple[Manifest, bool]:
    """Return the manifest of a dataset a subject can be taken out of, and whether that was begun before.

    Raises:
        InputError: there is no such subject, the manifest is damaged, rows are being added, or another subject is being
            taken out.
    """
    store.require_writable()
    data = read_manifest_bytes(store)
    manifest = parse_manifest(store, data)
    for problem in manifest_problems(manifest.model_copy(update={"retracting": ""}), data):
        raise InputError(f"{store.url_of('manifest.json')}: {problem}; put it back first")
    if manifest.retracting:
        if manifest.retracting != _mark(manifest, subject):
            raise InputError(f"{store.url}: another subject is being taken out, and that was interrupted; run "
                             "`facediffuser retract` with that one first")  # fmt: skip
        return manifest, True
    if begun_parts(store, manifest):
        raise InputError(f"{store.url}: rows are being added to it; finish that with `facediffuser generate --extend`")
    known = read_references(store)["subject_id"].unique().to_pylist()
    if subject not in known:
        near = ", ".join(sorted(known)[:3])
        raise InputError(
            f"{store.url}: no subject {subject!r}; the column subject_id of {SUBJECTS_KEY} has {near}, ..."
        )
    return manifest, False


def require_retractable(store: Store, manifest: Manifest) -> None:
    """Raise InputError for an object that is missing, of another size, or whose texts cannot be read.

    Found in the middle of the work it would leave a dataset that can neither be finished nor repaired.
    """
    require_objects(store, manifest)
    beside = [info.key for info in store.list() if info.key.startswith(KEPT_ENTRIES) and info.key.endswith(".parquet")]

    def read(key: str) -> None:
        with open_parquet(store, key) as file:
            file.read(columns=text_columns(file.schema_arrow))

    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(read, [*(entry.key for entry in manifest.all_shards), *manifest.planned_keys(), *beside]):
            pass


def _mark(manifest: Manifest, subject: str) -> str:
    """What the manifest says of an unfinished retraction: no name, only whether it is the same one."""
    return hashlib.sha256(f"{manifest.fingerprint}\0{subject}".encode()).hexdigest()


def retract_stage(settings: RetractSettings) -> Stage:
    """Return the stage that takes a subject out of a dataset; its result is the manifest of what remains.

    The manifest is marked first: until the end nothing else changes the dataset. Run again after an interruption it
    does what is left.

    Raises:
        InputError: see `begin_retraction`.
    """
    store = open_store(settings.url)
    manifest, resumes = begin_retraction(store, settings.subject)
    if not resumes:
        manifest = write_manifest(store, manifest.model_copy(update={"retracting": _mark(manifest, settings.subject)}))
    units = [Unit(entry.key, entry.rows, entry.model_dump()) for entry in manifest.all_shards]
    worker = functools.partial(RetractWorker, settings.url, settings.subject, resumes)
    finish = functools.partial(_finish, store, manifest, settings.subject, resumes)
    identity = {"retract": manifest.fingerprint}
    return Stage("Retract", "images", identity, units, worker, finish, pool=WorkerPool(settings.workers))


class RetractWorker:
    """Makes one shard after another without a subject, those that show it; `unit.data` is the manifest's entry.

    `resumes`: the shard may differ from its entry because it was made before.
    """

    def __init__(self, url: str, subject: str, resumes: bool):
        self.store, self.subject, self.resumes = open_store(url), subject, resumes

    def __call__(self, unit: Unit) -> Counts:
        with open_parquet(self.store, unit.key) as file:
            names = text_columns(file.schema_arrow)
            table = file.read(columns=names)
        keep = rows_without(table["subject_ids"], self.subject)
        others = [name for name in names if mentioned(table[name].filter(keep), self.subject)]
        if pc.all(keep).as_py() is not False and not others:
            data = self.store.get(unit.key) if self.resumes else b""
            if not self.resumes or hashlib.sha256(data).hexdigest() == unit.data["sha256"]:
                return {"removed": 0}
        else:
            with open_parquet(self.store, unit.key) as file:
                kept = file.read().filter(keep)
            data = encode_table(_scrubbed(kept, others, self.subject))
            self.store.put(unit.key, data)
        entry = entry_of_shard(unit.key, data)
        return {"removed": unit.rows - entry.rows, "entry": entry.model_dump()}


def rows_without(subject_ids: pa.ChunkedArray, subject: str) -> pa.ChunkedArray:
    """Return for each row whether it does not show a subject."""
    return pa.chunked_array([pa.array([subject not in ids for ids in subject_ids.to_pylist()], pa.bool_())])


def _scrubbed(table: pa.Table, columns: list[str], subject: str) -> pa.Table:
    """The table without what its rows of other people say of a subject."""
    for name in columns:
        field = table.schema.field(name)
        values = [without_mentions(value, subject) for value in table[name].to_pylist()]
        if None in values:
            field = field.with_nullable(True)  # a column that somebody added may not allow nulls
        table = table.set_column(table.column_names.index(name), field, pa.array(values, field.type))
    return table


# --- what is beside the shards ----------------------------------------------------------------------------------------


def _finish(store: Store, manifest: Manifest, subject: str, resumes: bool, results: Results) -> Manifest:
    changed = {key: counts["entry"] for key, counts in results.counts.items() if "entry" in counts}
    parts = [_without_rows(part, changed) for part in manifest.parts]
    for before, after in zip(manifest.parts, parts, strict=True):
        _rewrite_plan(store, before.layout, after.layout, subject)
        for shard, entry in enumerate(before.shards):
            if entry.key in changed:
                store.delete(after.layout.stats_key(shard))
    _rewrite_table(store, SUBJECTS_KEY, subject, "subject_id", row_group_size=ROWS_PER_GROUP)
    beside = [info.key for prefix in KEPT_ENTRIES for info in store.list(prefix)]
    added = [key for key in beside if key.endswith(".parquet")]
    rewritten_columns = [key for key in added if _rewrite_table(store, key, subject, KEY)]
    for prefix in (*LEFTOVERS, CARD_PREFIX, README_KEY):
        for info in store.list(prefix):
            store.delete(info.key)
    store.delete_leftovers()
    write_card(store)
    removed = manifest.counts.rows - sum(part.rows for part in parts)
    rewritten = manifest.with_parts(parts)
    planned = [object_entry(key, store.get(key)) for key in rewritten.planned_keys()]
    # The others keep the entries they are listed with, so that damage to them is still found.
    others = [entry for entry in manifest.objects if entry.key in beside]
    return seal(
        store,
        rewritten.model_copy(
            update={
                "objects": [*planned, *others],
                "retractions": [*manifest.retractions, Retraction(subjects=1, rows=removed)],
                "retracting": "",
            }
        ),
        written=added if resumes else rewritten_columns,
    )


def _without_rows(part: Part, changed: Mapping[str, dict[str, Any]]) -> Part:
    """The part with the shards that changed, and how many rows each of its shards has now."""
    shards = [ShardEntry(**changed[entry.key]) if entry.key in changed else entry for entry in part.shards]
    shards = [
        new.model_copy(update={"computed_with": old.computed_with})
        for new, old in zip(shards, part.shards, strict=True)
    ]
    rows = [entry.rows for entry in shards]
    kept = rows if part.kept or rows != [entry.rows for entry in part.shards] else []
    return part.as_part(shards=shards, rows=sum(rows), kept=kept)


def _rewrite_plan(store: Store, before: Layout, after: Layout, subject: str) -> None:
    """Put the plan files that name a subject without its rows; one that does not was put before, or never named it."""
    for number, key in enumerate(before.part_keys()):
        with open_parquet(store, key) as file:
            schema = file.schema_arrow
            keep = rows_without(file.read(columns=["subject_ids"])["subject_ids"], subject)
            if pc.all(keep).as_py() is not False:
                continue
            groups = [
                file.read_row_group(before.row_group(shard)[1]) if before.shard_rows(shard) else schema.empty_table()
                for shard in before.shards_of_part(number)
            ]
        kept = [rows.filter(rows_without(rows["subject_ids"], subject)) for rows in groups]
        counts = [rows.num_rows for rows in kept]
        if counts != [after.shard_rows(shard) for shard in before.shards_of_part(number)]:
            raise InputError(f"{store.url_of(key)}: its rows are not those of the shards; run `facediffuser verify`")
        store.put(key, encode_groups(kept, schema))


def _rewrite_table(store: Store, key: str, subject: str, column: str, **options: Any) -> bool:
    """Put a table without the rows and the texts that name a subject; return False for one that has none of them."""
    with readable_parquet(store, key), open_parquet(store, key) as file:
        table = file.read()
    keep = pa.array([subject not in subjects_of_sample(name) for name in table[column].to_pylist()], pa.bool_())
    kept = table.filter(keep)
    others = [name for name in text_columns(table.schema) if mentioned(kept[name], subject)]
    if kept.num_rows == table.num_rows and not others:
        return False
    store.put(key, parquet_bytes(_scrubbed(kept, others, subject), **options))
    return True
