"""Shards: finished rows as one Parquet object, encoded in memory; its presence with the run's fingerprint ends it."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from facediffuser.dataset.encoding import column_paths, parquet_bytes
from facediffuser.dataset.plan import Layout
from facediffuser.dataset.reading import readable_parquet
from facediffuser.dataset.schema import COMPUTED_WITH_KEY, FACES, FINGERPRINT_KEY, RUN_KEY
from facediffuser.runs import provenance_of
from facediffuser.storage import ObjectInfo, Store
from facediffuser.storage.reading import DamagedError, parse_json

logger = logging.getLogger(__name__)

ROWS_PER_GROUP = 100
IMAGE_BYTES = "image.bytes"
EMBEDDING = "faces.list.element.embedding.list.element"
# What rows are looked up by. Subjects stand in a list: the statistics of a row group tell little of who is in it.
LOOKED_UP = ("sample_id", "prompt_id", "subject_ids.list.element", "faces.list.element.subject_id")
BLOOM_FILTER = {"ndv": 2 * ROWS_PER_GROUP, "fpp": 0.01}
READERS = 16


@dataclass(frozen=True)
class Marks:
    """What the footer of an object of a run says.

    fingerprint: the run's.
    computed_with: the provenance kept apart from the run document; None in an object of an earlier version.
    provenance: the same, or what the run document of an earlier version says of it; may be empty.
    """

    fingerprint: str
    computed_with: dict[str, Any] | None
    provenance: dict[str, Any]


@dataclass(frozen=True)
class FinishedShard:
    """A shard that is whole and of the run at hand."""

    info: ObjectInfo
    marks: Marks


def encode_shard(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> bytes:
    """Return a shard's Parquet: about 100 rows per row group, page index, zstd for all columns but the image bytes.

    Statistics for all columns but image bytes and embeddings; Bloom filters on what rows are looked up by. A shard of
    schema version 1 has no Bloom filters, as ever: it must be the same bytes when it is made again.

    Args:
        rows: finished rows; what the schema does not name is left out.
        schema: of the run, with its marks. The same rows give the same bytes.
    """
    return encode_table(pa.Table.from_pylist(list(rows), schema=schema))


def encode_table(table: pa.Table) -> bytes:
    """Return the Parquet of a shard's table, whose schema carries the marks; the same table gives the same bytes."""
    others = [path for path in column_paths(table.schema.remove_metadata()) if path != IMAGE_BYTES]
    options: dict[str, Any] = {}
    if FACES in table.schema.names:
        options["bloom_filter_options"] = dict.fromkeys(LOOKED_UP, BLOOM_FILTER)
    return parquet_bytes(
        table,
        row_group_size=ROWS_PER_GROUP,
        # Images are compressed already; a second pass would cost time and win nothing.
        compression={IMAGE_BYTES: "none"} | dict.fromkeys(others, "zstd"),
        use_dictionary=["prompt_id", "prompt", "category", "subject_ids.list.element", "method", "scheduler", "status"],
        write_statistics=[path for path in others if path != EMBEDDING],
        **options,
    )


def read_marks(store: Store, key: str) -> Marks | None:
    """Return the marks in a Parquet object's footer; None when it has none, is missing, or is not whole."""
    try:
        with readable_parquet(store, key), store.open(key) as source:
            metadata = pq.read_metadata(source).metadata or {}
            fingerprint = metadata.get(FINGERPRINT_KEY, b"").decode()
            computed_with = parse_json(metadata.get(COMPUTED_WITH_KEY, b"null"))
            run = parse_json(metadata.get(RUN_KEY, b"{}"))
    except (DamagedError, FileNotFoundError):
        return None
    if not fingerprint or not isinstance(run, dict) or not isinstance(computed_with, dict | None):
        return None
    return Marks(fingerprint, computed_with, computed_with or provenance_of(run))


def shard_mark(store: Store, key: str) -> str | None:
    """Return the fingerprint in a Parquet object's footer; None when it has none, is missing, or is not whole."""
    marks = read_marks(store, key)
    return marks.fingerprint if marks else None


def finished_shards(store: Store, layout: Layout, fingerprint: str) -> dict[int, FinishedShard]:
    """Return the shards that are there and whole, with the run's fingerprint, by number.

    Args:
        store: the dataset.
        layout: how the plan is cut into shards.
        fingerprint: the run's; shards of another are not finished.
    """
    there = {}
    for info in store.list("data/"):
        shard = layout.shard_of_key(info.key)
        if shard is not None:
            there[shard] = info
    with ThreadPoolExecutor(READERS) as pool:
        marks = pool.map(lambda info: read_marks(store, info.key), there.values())
    finished = {
        shard: FinishedShard(info, found)
        for (shard, info), found in zip(there.items(), marks, strict=True)
        if found is not None and found.fingerprint == fingerprint
    }
    for shard in there.keys() - finished.keys():
        logger.warning("%s: not a whole shard of this run; it is made again", store.url_of(there[shard].key))
    return finished
