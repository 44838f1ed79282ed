"""Other scorers on a finished dataset: their columns go beside the shards, which stay as they are."""

from collections.abc import Callable, Mapping

import pyarrow as pa

from facediffuser.dataset.added_columns import write_added
from facediffuser.dataset.reading import list_shards, row_groups
from facediffuser.evaluation.image_sources import dataset_pictures
from facediffuser.pictures import stored_picture
from facediffuser.prompts import without_markers
from facediffuser.scoring.columns import ColumnScorer, column_scores, short_name
from facediffuser.storage import Store

COLUMNS = ("sample_id", "subject_ids", "prompt", "image")


def add_columns(
    store: Store,
    scorers: Mapping[str, ColumnScorer],
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Write `scores/<scorer>.parquet` for each scorer and return the keys; the same dataset gives the same bytes.

    A row per row of the dataset, null for one without an image. InputError when there is no dataset.
    """
    keys = [info.key for info in list_shards(store)]
    references = dataset_pictures(store) if store.exists("subjects.parquet") else {}
    schema = pa.schema([field.with_nullable(True) for scorer in scorers.values() for field in scorer.columns])
    ids: list[str] = []
    parts: list[pa.Table] = []
    for _, _, table in row_groups(store, keys, COLUMNS):
        for start in range(0, table.num_rows, batch_size):
            rows = table.slice(start, batch_size).to_pylist()
            made = [row for row in rows if row["image"] and row["image"]["bytes"]]
            found = column_scores(
                dict(scorers),
                [stored_picture(row["image"]["bytes"], row["sample_id"]) for row in made],
                [[references.get(name, []) for name in row["subject_ids"]] for row in made],
                [without_markers(row["prompt"]) for row in made],
            ).to_pylist()
            values = {row["sample_id"]: value for row, value in zip(made, found, strict=True)}
            parts.append(pa.Table.from_pylist([values.get(row["sample_id"], {}) for row in rows], schema=schema))
            ids += [row["sample_id"] for row in rows]
            advance(len(rows))
    everything = pa.concat_tables(parts)
    return [
        write_added(
            store,
            short_name(name),
            pa.table({"sample_id": ids} | {column: everything[column] for column in scorer.columns.names}),
            {short_name(name): scorer.digest},
        )
        for name, scorer in scorers.items()
    ]
