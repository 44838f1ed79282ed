"""Columns of other scorers as a stage: the units are a dataset's shards; the columns go beside them in `scores/`.

A worker keeps what it found in a shard as an object below `stats/`, so that an interrupted run is resumed. The last step
puts them together as `scores/<scorer>.parquet` and removes them.
"""

import functools
import io
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from pyarrow import feather

from facediffuser.batch_stage import Counts, Results, Stage, Unit, WorkerPool
from facediffuser.dataset.added_columns import KEY, read_added_columns, require_new_columns, write_added_columns
from facediffuser.dataset.reading import list_shards, read_footer, row_groups
from facediffuser.dataset.schema import DATASET_SCHEMA, FACES
from facediffuser.devices import pick_device
from facediffuser.evaluation.image_sources import dataset_reference_pictures
from facediffuser.evaluation.row_scorers import DatasetScorer, load_row_scorers, score_dataset_rows
from facediffuser.evaluation.score_settings import ScoreSettings
from facediffuser.pictures import stored_picture
from facediffuser.runs import fingerprint_of
from facediffuser.scoring.columns import short_name
from facediffuser.storage import Store, open_store

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
    shards = list_shards(store)
    # Loaded here, too: a scorer says its columns and its digest once its weights are read.
    scorers = load_row_scorers(settings, store)
    require_new_columns({short_name(name): scorer.columns.names for name, scorer in scorers.items()}, store)
    identity = {
        "scorers": {name: scorer.digest for name, scorer in scorers.items()},
        "batch_size": settings.batch_size,
        "shards": [[info.key, info.size, str(info.version)] for info in shards],
    }
    # Not in a folder of their own, which would be left behind, empty.
    prefix = f"{UNFINISHED_PREFIX}{fingerprint_of(identity)[:16]}-"
    every = [
        Unit(f"{prefix}{info.key.rsplit('/', 1)[-1]}.arrow", read_footer(store, info.key).num_rows, info.key)
        for info in shards
    ]
    units = [unit for unit in every if not store.exists(unit.key)]
    return Stage(
        "Score", "images", identity, units, functools.partial(ColumnWorker, settings),
        functools.partial(_finish, store, scorers, [unit.key for unit in every]),
        sum(unit.rows for unit in every) - sum(unit.rows for unit in units), pool or WorkerPool(),
    )  # fmt: skip


def discard_unfinished(url: str) -> None:
    """Remove what workers kept of columns that are not written: a dataset that is damaged will be another when it is repaired."""
    store = open_store(url)
    for info in store.list(UNFINISHED_PREFIX):
        store.delete(info.key)


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


def _finish(store: Store, scorers: Mapping[str, DatasetScorer], keys: list[str], results: Results) -> list[str]:
    table = pa.concat_tables(feather.read_table(io.BytesIO(store.get(key))) for key in keys).combine_chunks()
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
    discard_unfinished(store.url)
    return written
