"""Reading the Parquet of a dataset piece by piece: its shards, their row groups, footers and columns."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from facediffuser.dataset.schema import FINGERPRINT_KEY, RUN_KEY
from facediffuser.errors import InputError
from facediffuser.storage import ObjectInfo, Store, open_store
from facediffuser.storage.arrow import arrow_filesystem
from facediffuser.storage.reading import reading

DATA_PREFIX = "data/"


def list_shards(store: Store) -> list[ObjectInfo]:
    """Return the Parquet objects of a dataset's `data/`; InputError when there is none."""
    store.require_readable()
    shards = [info for info in store.list(DATA_PREFIX) if info.key.endswith(".parquet")]
    if not shards:
        raise InputError(f"{store.url}: no {DATA_PREFIX}*.parquet there; give the URL that `generate` wrote to")
    return shards


def open_dataset(url: str) -> ds.Dataset:
    """Return the rows of a dataset as a pyarrow Dataset, which reads what a query needs; opened at the dataset's root.

    `pyarrow.dataset.dataset` itself would take README.md, the plan and the stats beside `data/` for rows.

    Args:
        url: the dataset, a folder or s3://bucket/prefix; S3 is configured by the standard AWS environment.

    Returns:
        A dataset with the columns of DATASET_SCHEMA. In rows whose `status` is `failed`, image and scores are null.

    Raises:
        InputError: no `data/*.parquet` there, or the place cannot be read.
    """
    store = open_store(url)
    keys = [info.key for info in list_shards(store)]
    return ds.dataset(keys, format="parquet", filesystem=arrow_filesystem(store))


@contextmanager
def open_parquet(store: Store, key: str) -> Iterator[pq.ParquetFile]:
    """Yield a Parquet object, opened.

    Raises:
        FileNotFoundError: there is no such object.
        InputError: it is damaged or no Parquet, found when it is opened or when it is read in the block.
    """
    with readable_parquet(store, key), store.open(key) as source, pq.ParquetFile(source) as file:
        yield file


@contextmanager
def readable_parquet(store: Store, key: str) -> Iterator[None]:
    """Turn what reading a damaged Parquet object raises in the block into InputError, one line that names it."""
    with reading(store.url_of(key), "Parquet of a dataset", "put it back, or let `facediffuser repair` make it again"):
        yield


def row_groups(
    store: Store, keys: Sequence[str], columns: Sequence[str], needed: Sequence[str] = ()
) -> Iterator[tuple[str, int, pa.Table]]:
    """Yield (key, row group, table) of Parquet objects with those of `columns` that they have.

    Raises InputError naming the object that lacks one of the `needed` columns.
    """
    for key in keys:
        with open_parquet(store, key) as file:
            present = [name for name in columns if name in file.schema_arrow.names]
            absent = [name for name in needed if name not in present]
            if absent:
                raise InputError(f"{store.url_of(key)}: no column {absent[0]!r}; give a dataset that `generate` wrote")
            for group in range(file.num_row_groups):
                yield key, group, file.read_row_group(group, columns=present)


def count_rows(store: Store) -> int:
    """Return how many rows a dataset has, from its shards' footers; InputError when there is none."""
    return sum(read_footer(store, info.key).num_rows for info in list_shards(store))


def read_footer(store: Store, key: str) -> pq.FileMetaData:
    """Return the footer of a Parquet object."""
    with open_parquet(store, key) as file:
        return file.metadata


def recorded_run(schema: pa.Schema | None) -> tuple[str | None, dict[str, Any]]:
    """Return fingerprint and run document from the metadata of a Parquet object that a run wrote; None and {} without."""
    metadata = (schema.metadata if schema is not None else None) or {}
    fingerprint = metadata.get(FINGERPRINT_KEY)
    with reading("the run in a Parquet footer", "JSON", "run `facediffuser verify` to find the damaged file"):
        run = json.loads(metadata.get(RUN_KEY, b"{}"))
        return fingerprint.decode() if fingerprint else None, run if isinstance(run, dict) else {}


def read_columns(store: Store, key: str, columns: Iterable[str]) -> pa.Table:
    """Return some columns of a shard or of another Parquet object of a dataset."""
    with readable_parquet(store, key), store.open(key) as source:
        return pq.read_table(source, columns=list(columns))
