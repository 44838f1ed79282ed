"""Columns of other scorers as a stage: the units are a dataset's shards; the columns go beside them in `scores/`.

A worker keeps what it found in a shard as an object below `stats/`, so that an interrupted run is resumed, also one that a
damaged shard ended: its name says which shard it is of, and which version of it. The last step puts them together as
`scores/<scorer>.parquet` and removes them.
"""

import functools
import io
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from pyarrow import feather

from facediffuser.batch_stage import Counts, Results, Stage, Unit, WorkerPool
from facediffuser.dataset.added_columns import KEY, read_added_columns, require_new_columns, write_added_columns
from facediffuser.dataset.manifest import find_manifest, listed_shards
from facediffuser.dataset.reading import changed_shards, read_footer, require_same_shards, row_groups
from facediffuser.dataset.schema import DATASET_SCHEMA, FACES
from facediffuser.devices import pick_device
from facediffuser.evaluation.image_sources import dataset_reference_pictures
from facediffuser.evaluation.row_scorers import DatasetScorer, load_row_scorers, score_dataset_rows
from facediffuser.evaluation.score_settings import ScoreSettings
from facediffuser.pictures import stored_picture
from facediffuser.runs import fingerprint_of
from facediffuser.scoring.columns import short_name
from facediffuser.storage import ObjectInfo, Store, open_store

COLUMNS = ("sample_id", "subject_ids", "prompt", "image")
UNFINISHED_PREFIX = "stats/scores-"


def column_stage(settings: ScoreSettings, pool: WorkerPool | None = None) -> Stage:
    """Return the stage that adds the columns of other scorers; its result are the keys of the files written.

    The same dataset gives the same bytes: a row per row of the dataset, null for one without an image.

    Args:
        settings: the dataset, the scorers and the device.
        pool: the workers.

    Raises:
        InputError: there is no dataset, a scorer cannot be used, or it adds a column that is there already.
    """
    store = open_store(settings.url)
    shards = listed_shards(store, find_manifest(store))
    # Loaded here, too: a scorer says its columns and its digest once its weights are read.
    scorers = load_row_scorers(settings, store)
    require_new_columns({short_name(name): scorer.columns.names for name, scorer in scorers.items()}, store)
    identity = {
        "scorers": {name: scorer.digest for name, scorer in scorers.items()},
        "batch_size": settings.batch_size,
    }
    kept = {info: _kept_key(identity, info) for info in shards}
    every = [Unit(key, read_footer(store, info.key).num_rows, info.key) for info, key in kept.items()]
    units = [unit for unit in every if not store.exists(unit.key)]
    return Stage(
        "Score", "images", identity, units, functools.partial(ColumnWorker, settings),
        functools.partial(_finish, store, scorers, kept),
        sum(unit.rows for unit in every) - sum(unit.rows for unit in units), pool or WorkerPool(),
    )  # fmt: skip


def _kept_key(identity: Mapping[str, Any], shard: ObjectInfo) -> str:
    """The key of what is kept of a shard; not in a folder of its own, which would be left behind, empty."""
    of_shard = fingerprint_of({**identity, "shard": [shard.key, shard.size, str(shard.version)]})
    return f"{UNFINISHED_PREFIX}{of_shard[:16]}-{shard.key.rsplit('/', 1)[-1]}.arrow"


class ColumnWorker:
    """Scores the images of one shard after another; `unit.data` is the shard's key."""

    def __init__(self, settings: ScoreSettings):
        self.store, self.batch_size = open_store(settings.url), settings.batch_size
        self.scorers = load_row_scorers(settings, self.store, pick_device(settings.device))
        needed = any(scorer.reads_faces for scorer in self.scorers.values())
        self.added = read_added_columns(self.store) if needed else None
        self.references = dataset_reference_pictures(self.store) if self.store.exists("subjects.parquet") else {}
        fields = [field.with_nullable(True) for scorer in self.scorers.values() for field in scorer.columns]
        self.schema = pa.schema(fields)

    def __call__(self, unit: Unit) -> Counts:
        sink = io.BytesIO()
        feather.write_feather(self.score(unit.data), sink, compression="zstd")
        self.store.put(unit.key, sink.getvalue())
        return {"rows": unit.rows}

    def score(self, key: str) -> pa.Table:
        """Return the sample ids of a shard with the columns of all scorers; `key` is the shard's."""
        parts, ids = [], []
        wanted = (*COLUMNS, FACES) if self.added is not None else COLUMNS
        # All columns are read, and so looked at: the card reads others than the scorers, after the hours of work.
        for _, _, read in row_groups(self.store, [key], DATASET_SCHEMA.names):
            table = read.select([name for name in wanted if name in read.column_names])
            if self.added is not None and FACES in self.added.schema.names:
                table = table.append_column(FACES, self.added.rows(table["sample_id"])[FACES])
            for start in range(0, table.num_rows, self.batch_size):
                rows = table.slice(start, self.batch_size).to_pylist()
                parts.append(self._score_batch(rows))
                ids += [row["sample_id"] for row in rows]
        found = pa.concat_tables(parts) if parts else self.schema.empty_table()
        return found.add_column(0, KEY, pa.array(ids, pa.string()))

    def _score_batch(self, rows: list[dict[str, Any]]) -> pa.Table:
        values = score_dataset_rows(
            self.scorers, rows, lambda row: stored_picture(row["image"]["bytes"], row["sample_id"]), self.references
        )
        return pa.Table.from_pylist(values, schema=self.schema)


def _finish(
    store: Store, scorers: Mapping[str, DatasetScorer], kept: Mapping[ObjectInfo, str], results: Results
) -> list[str]:
    for info in changed_shards(store, kept):
        store.delete(kept[info])  # the rows may be of a person who was taken out meanwhile
    require_same_shards(store, kept)
    table = pa.concat_tables(feather.read_table(io.BytesIO(store.get(key))) for key in kept.values()).combine_chunks()
    written = [
        write_added_columns(
            store,
            short_name(name),
            table.select([KEY, *scorer.columns.names]),
            {short_name(name): scorer.digest},
            {short_name(name): scorer.licence},
        )
        for name, scorer in scorers.items()
    ]
    for info in store.list(UNFINISHED_PREFIX):
        store.delete(info.key)
    return written
