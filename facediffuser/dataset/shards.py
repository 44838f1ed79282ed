"""Shards: finished rows as one Parquet object, encoded in memory; its presence with the run's fingerprint ends it."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from facediffuser.dataset.encoding import column_paths, parquet_bytes
from facediffuser.dataset.plan import Layout
from facediffuser.dataset.schema import DATASET_SCHEMA, FINGERPRINT_KEY
from facediffuser.storage import ObjectInfo, Store

logger = logging.getLogger(__name__)

ROWS_PER_GROUP = 100
IMAGE_BYTES = "image.bytes"
READERS = 16


def encode_shard(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> bytes:
    """Return a shard's Parquet: about 100 rows per row group, page index, zstd for all columns but the image bytes.

    `schema` is DATASET_SCHEMA with the run's marks. The same rows give the same bytes.
    """
    table = pa.Table.from_pylist(list(rows), schema=schema)
    others = [path for path in column_paths(DATASET_SCHEMA) if path != IMAGE_BYTES]
    return parquet_bytes(
        table,
        row_group_size=ROWS_PER_GROUP,
        # Images are compressed already; a second pass would cost time and win nothing.
        compression={IMAGE_BYTES: "none"} | dict.fromkeys(others, "zstd"),
        use_dictionary=["prompt_id", "prompt", "category", "subject_ids.list.element", "method", "scheduler", "status"],
        write_statistics=others,
    )


def shard_mark(store: Store, key: str) -> str | None:
    """Return the fingerprint in a Parquet object's footer; None when it has none, is missing, or is not whole."""
    try:
        with store.open(key) as source:
            metadata = pq.read_metadata(source).metadata or {}
    except (pa.ArrowInvalid, FileNotFoundError):
        return None
    return metadata.get(FINGERPRINT_KEY, b"").decode() or None


def finished_shards(store: Store, layout: Layout, fingerprint: str) -> dict[int, ObjectInfo]:
    """Return the shards that are there and whole, with the run's fingerprint, by number."""
    there = {}
    for info in store.list("data/"):
        shard = layout.shard_of_key(info.key)
        if shard is not None:
            there[shard] = info
    with ThreadPoolExecutor(READERS) as pool:
        marks = pool.map(lambda info: shard_mark(store, info.key), there.values())
    finished = {shard: info for (shard, info), mark in zip(there.items(), marks, strict=True) if mark == fingerprint}
    for shard in there.keys() - finished.keys():
        logger.warning("%s: not a whole shard of this run; it is made again", store.url_of(there[shard].key))
    return finished
