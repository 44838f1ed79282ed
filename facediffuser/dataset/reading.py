"""Reading the Parquet of a dataset piece by piece: its shards, their row groups, footers and columns."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from facediffuser.dataset.row_values import value_problems
from facediffuser.dataset.schema import (
    DATASET_SCHEMA,
    FACES,
    FINGERPRINT_KEY,
    IP_MARGIN,
    PLAN_SCHEMA,
    RUN_KEY,
    SUBJECTS_KEY,
    SUBJECTS_SCHEMA,
    is_list,
)
from facediffuser.errors import InputError
from facediffuser.storage import ObjectInfo, StorageError, Store, open_store
from facediffuser.storage.arrow import arrow_filesystem
from facediffuser.storage.reading import DamagedError, parse_json, reading

DATA_PREFIX = "data/"
READERS = 16


def list_shards(store: Store) -> list[ObjectInfo]:
    """Return the Parquet objects of a dataset's `data/`.

    Raises:
        InputError: there are none.
    """
    store.require_readable()
    shards = [info for info in store.list(DATA_PREFIX) if info.key.endswith(".parquet")]
    if not shards:
        raise InputError(f"{store.url}: no {DATA_PREFIX}*.parquet there; give the URL that `generate` wrote to")
    return shards


def require_no_dataset(store: Store) -> None:
    """Check that an output for something else holds no dataset.

    Raises:
        InputError: it does.
    """
    if any(info.key.endswith(".parquet") for info in store.list(DATA_PREFIX)):
        raise InputError(f"{store.url}: holds a dataset; give another output")


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
        InputError: it is damaged or no Parquet, found when it is opened or when it is read in the block; or its columns,
            or their values, are not what such an object of a dataset holds.
    """
    with readable_parquet(store, key), store.open(key) as source, _Rows(source) as file:
        file.url, file.known = store.url_of(key), _known_schema(key)
        _require_columns_of(store, key, file.schema_arrow)
        yield file


class _Rows(pq.ParquetFile):
    """A Parquet file whose values are looked at when they are read."""

    url: str
    known: pa.Schema | None = None

    def read(self, *args: Any, **options: Any) -> pa.Table:
        return self._sound(super().read(*args, **options))

    def read_row_group(self, *args: Any, **options: Any) -> pa.Table:
        return self._sound(super().read_row_group(*args, **options))

    def _sound(self, table: pa.Table) -> pa.Table:
        require_values(self.url, table, self.known)
        return table


def require_values(url: str, table: pa.Table, known: pa.Schema | None) -> None:
    """Raise DamagedError when rows hold what no run writes; `url` names the object they are from."""
    for problem in value_problems(table, known) if known is not None else ():
        raise DamagedError(f"{url}: {problem}; put it back, or let `facediffuser repair` make it again")


def _known_schema(key: str) -> pa.Schema | None:
    return next((known for prefix, known, _ in _KNOWN if key.startswith(prefix)), None)


# What each object of a dataset holds, and the columns without which nothing can be made of it.
_KNOWN = (
    (
        DATA_PREFIX,
        DATASET_SCHEMA,
        ("sample_id", "method", "subject_ids", "prompt_id", "prompt", "category", "ip", "pc", "status"),
    ),
    ("plan/", PLAN_SCHEMA, tuple(PLAN_SCHEMA.names)),
    ("scores/", pa.schema([DATASET_SCHEMA.field(name) for name in ("sample_id", FACES, IP_MARGIN)]), ("sample_id",)),
    (SUBJECTS_KEY, SUBJECTS_SCHEMA, ("subject_id", "image")),
)


def _require_columns_of(store: Store, key: str, schema: pa.Schema) -> None:
    for prefix, known, needed in _KNOWN:
        if not key.startswith(prefix):
            continue
        for name in needed:
            if name not in schema.names:
                raise InputError(f"{store.url_of(key)}: no column {name!r}; give a dataset that `generate` wrote")
        for name in schema.names:
            found = schema.field(name).type
            if name in known.names and not _alike(found, known.field(name).type):
                raise InputError(
                    f"{store.url_of(key)}: column {name!r} is of type {found}, not {known.field(name).type}; give a dataset "
                    "that `generate` wrote"
                )


def _alike(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Return whether a column can be read as another type: numbers as numbers, text as text, parts likewise."""
    types = pa.types
    if types.is_dictionary(found):
        return _alike(found.value_type, wanted)
    if types.is_list(wanted):
        return is_list(found) and _alike(found.value_type, wanted.value_type)
    if types.is_struct(wanted):
        return types.is_struct(found) and all(
            found.get_field_index(part.name) >= 0 and _alike(found.field(part.name).type, part.type) for part in wanted
        )
    for kinds in (
        (types.is_string, types.is_large_string),
        (types.is_binary, types.is_large_binary),
        (types.is_integer, types.is_floating),
    ):
        if any(kind(wanted) for kind in kinds):
            return any(kind(found) for kind in kinds)
    return found == wanted


@contextmanager
def readable_parquet(store: Store, key: str) -> Iterator[None]:
    """Turn what reading a damaged Parquet object raises in the block into one line that names it.

    Raises:
        InputError: instead of what PyArrow raises.
    """
    with reading(store.url_of(key), "Parquet of a dataset", "put it back, or let `facediffuser repair` make it again"):
        yield


def row_groups(
    store: Store, keys: Sequence[str], columns: Sequence[str], needed: Sequence[str] = ()
) -> Iterator[tuple[str, int, pa.Table]]:
    """Yield (key, row group, table) of Parquet objects, one row group at a time.

    Args:
        store: the dataset.
        keys: the objects.
        columns: those to read; an object without one of them gives a table without it.
        needed: those of `columns` that must be there.

    Raises:
        InputError: an object lacks one of the needed columns, or is damaged.
    """
    for key in keys:
        with open_parquet(store, key) as file:
            present = [name for name in columns if name in file.schema_arrow.names]
            absent = [name for name in needed if name not in present]
            if absent:
                raise InputError(f"{store.url_of(key)}: no column {absent[0]!r}; give a dataset that `generate` wrote")
            for group in range(file.num_row_groups):
                yield key, group, file.read_row_group(group, columns=present)


def require_readable_shards(store: Store, shards: Iterable[ObjectInfo]) -> None:
    """Check that shards can be opened and hold what work on a dataset needs.

    Raises:
        InputError: one cannot; the first is named.
    """
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(lambda info: read_footer(store, info.key), shards):
            pass


def changed_shards(store: Store, shards: Iterable[ObjectInfo]) -> list[ObjectInfo]:
    """Return those of the shards that are gone, or replaced by others, since they were listed."""
    there = set(store.list(DATA_PREFIX))
    return [info for info in shards if info not in there]


def require_same_shards(store: Store, shards: Iterable[ObjectInfo]) -> None:
    """Check that shards are as they were when a command listed them, before what it found in them is written.

    Raises:
        StorageError: one is gone or replaced; run again, the command reads what is there then.
    """
    for info in changed_shards(store, shards)[:1]:
        raise StorageError(f"{store.url_of(info.key)}: changed by another command while this one ran; run it again")


def count_rows(store: Store, shards: Iterable[ObjectInfo] | None = None) -> int:
    """Return how many rows a dataset has, from its shards' footers.

    Args:
        store: the dataset.
        shards: of these alone; by default all of `data/`.

    Raises:
        InputError: there is no shard.
    """
    return sum(read_footer(store, info.key).num_rows for info in (list_shards(store) if shards is None else shards))


def shard_schema(store: Store, key: str | None = None) -> pa.Schema:
    """Return the columns of a dataset's shards, with the marks of their run; `key` is a shard's, by default the first's."""
    return read_footer(store, key or list_shards(store)[0].key).schema.to_arrow_schema()


def read_footer(store: Store, key: str) -> pq.FileMetaData:
    """Return the footer of a Parquet object."""
    with open_parquet(store, key) as file:
        return file.metadata


def recorded_run(schema: pa.Schema | None) -> tuple[str | None, dict[str, Any]]:
    """Return fingerprint and run document from the metadata of a Parquet object that a run wrote; None and {} without.

    Raises:
        InputError: the metadata is damaged.
    """
    metadata = (schema.metadata if schema is not None else None) or {}
    fingerprint = metadata.get(FINGERPRINT_KEY)
    with reading("the run in a Parquet footer", "JSON", "run `facediffuser verify` to find the damaged file"):
        run = parse_json(metadata.get(RUN_KEY, b"{}"))
        return fingerprint.decode() if fingerprint else None, run if isinstance(run, dict) else {}


def read_chosen(store: Store, key: str, names: Sequence[str], column: str, values: Sequence[str]) -> pa.Table:
    """Return some columns of some rows; row groups without such rows are not read.

    Args:
        store: the dataset.
        key: the Parquet object.
        names: the columns to return; those that are not there are left out.
        column: the column to choose by.
        values: a row is returned when its `column` is one of these.
    """
    with open_parquet(store, key) as file:
        present = [name for name in names if name in file.schema_arrow.names]
    with readable_parquet(store, key), store.open(key) as source:
        table = pq.read_table(source, columns=present, filters=pc.field(column).isin(list(values)))
    require_values(store.url_of(key), table, _known_schema(key))
    return table


def read_columns(store: Store, key: str, columns: Iterable[str]) -> pa.Table:
    """Return some columns of a shard or of another Parquet object of a dataset.

    Raises:
        InputError: a column is not there, or the object is damaged.
    """
    wanted = list(columns)
    with open_parquet(store, key) as file:
        absent = [name for name in wanted if name not in file.schema_arrow.names]
        if absent:
            raise InputError(f"{store.url_of(key)}: no column {absent[0]!r}; give a dataset that `generate` wrote")
        return file.read(columns=wanted)
