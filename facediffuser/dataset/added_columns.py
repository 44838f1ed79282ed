"""Columns added to a finished dataset: Parquet files of their own beside the shards, keyed by sample_id."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa

from facediffuser.dataset.encoding import parquet_bytes
from facediffuser.dataset.reading import open_parquet, shard_schema
from facediffuser.dataset.schema import DATASET_SCHEMA, hugging_face_features
from facediffuser.errors import InputError
from facediffuser.runs import canonical_json
from facediffuser.storage import Store

ADDED_PREFIX = "scores/"
SCORER_MARK, LICENCE_MARK = "facediffuser_scorer_", "facediffuser_licence_"
KEY = "sample_id"


def added_key(name: str) -> str:
    """Return where the added columns of a name lie."""
    return f"{ADDED_PREFIX}{name}.parquet"


class AddedColumns:
    """The added columns of a dataset; `schema` without the key, in the order of the files' names.

    `columns`: those of the dataset itself, which no file may have.
    """

    def __init__(self, tables: Mapping[str, pa.Table], columns: Collection[str] = DATASET_SCHEMA.names):
        self.tables = dict(tables)
        self._next_row: dict[str, int] = {}
        self._sorted: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        fields: dict[str, pa.Field] = {}
        for key, table in self.tables.items():
            for field in table.schema:
                if field.name != KEY and (field.name in fields or field.name in columns):
                    raise InputError(f"{key}: column {field.name!r} is there already; remove one of the two files")
                fields[field.name] = field
        fields.pop(KEY, None)
        self.schema = pa.schema(list(fields.values()))

    def rows(self, sample_ids: pa.Array | pa.ChunkedArray) -> pa.Table:
        """Return the added columns of rows by their ids, in that order.

        Quick for rows asked for in the order they were added in, piece by piece, as one reads a dataset.

        Args:
            sample_ids: n ids of rows, strings.

        Returns:
            A table of n rows with the columns of `schema`; null for a row that has no values there.
        """
        columns: dict[str, pa.ChunkedArray] = {}
        wanted = pa.chunked_array(sample_ids if isinstance(sample_ids, pa.ChunkedArray) else [sample_ids])
        for key, table in self.tables.items():
            rows = table.slice(self._next_row.get(key, 0), len(wanted))
            if rows[KEY] == wanted:
                self._next_row[key] = self._next_row.get(key, 0) + len(wanted)
            else:
                rows = table.take(self._positions(key, wanted))
            columns |= {name: rows[name] for name in table.column_names if name != KEY}
        return pa.table(columns)

    def _positions(self, key: str, wanted: pa.ChunkedArray) -> pa.Array:
        """Where in a table the ids are, null for one that is not there; sorted once, so that each look is short."""
        if key not in self._sorted:
            ids = self.tables[key][KEY].to_numpy(zero_copy_only=False)
            order = np.argsort(ids, kind="stable")
            self._sorted[key] = (ids[order], order)
        ids, order = self._sorted[key]
        asked = wanted.to_numpy(zero_copy_only=False)
        at = np.minimum(np.searchsorted(ids, asked), max(len(ids) - 1, 0))
        absent = ids[at] != asked if len(ids) else np.ones(len(asked), bool)
        return pa.array(order[at] if len(ids) else np.zeros(len(asked), np.int64), mask=absent)

    def without(self, *columns: str) -> "AddedColumns":
        """Return the same without some columns."""
        kept = {
            key: table.drop_columns([name for name in columns if name in table.column_names])
            for key, table in self.tables.items()
        }
        return AddedColumns({key: table for key, table in kept.items() if table.column_names != [KEY]}, ())

    def digests(self) -> dict[str, str]:
        """Return what the files say of the scorers that made them."""
        return self._marks(SCORER_MARK)

    def licences(self) -> dict[str, str]:
        """Return what the files say of the licences of those scorers' weights."""
        return self._marks(LICENCE_MARK)

    def _marks(self, prefix: str) -> dict[str, str]:
        marks = [(table.schema.metadata or {}) for table in self.tables.values()]
        each = ((name.decode(), value.decode()) for found in marks for name, value in found.items())
        return {name.removeprefix(prefix): value for name, value in each if name.startswith(prefix)}


def require_new_columns(columns: Mapping[str, Sequence[str]], store: Store | None = None) -> None:
    """Check the names of added columns before hours are spent on them.

    Args:
        columns: the names of the columns, by the name of their file without `.parquet`.
        store: the dataset, whose other files below scores/ are looked at, too.

    Raises:
        InputError: a dataset has one of them already.
    """
    taken = {name: "every dataset" for name in DATASET_SCHEMA.names}
    if store and set(taken) & {name for names in columns.values() for name in names}:
        taken = dict.fromkeys(shard_schema(store).names, "the dataset")
    for url, table in (read_added_columns(store) if store else AddedColumns({})).tables.items():
        if url.rpartition("/")[2].removesuffix(".parquet") not in columns:
            taken |= {name: url for name in table.column_names if name != KEY}
    for file, names in columns.items():
        for name in names:
            if name in taken:
                raise InputError(f"scorer {file}: adds column {name!r}, which {taken[name]} has already; leave it out")


def read_added_columns(store: Store) -> AddedColumns:
    """Return a dataset's added columns; none when nothing was added.

    Raises:
        InputError: two files have one column, or a file cannot be read.
    """
    tables = {}
    for key in [info.key for info in store.list(ADDED_PREFIX) if info.key.endswith(".parquet")]:
        with open_parquet(store, key) as file:
            tables[store.url_of(key)] = file.read()
    # A dataset of an earlier version may have had columns of this one added.
    names = {name for table in tables.values() for name in table.column_names} - {KEY}
    own = shard_schema(store).names if names & set(DATASET_SCHEMA.names) else DATASET_SCHEMA.names
    return AddedColumns(tables, own)


def write_added_columns(
    store: Store, name: str, table: pa.Table, digests: Mapping[str, str], licences: Mapping[str, str] | None = None
) -> str:
    """Put a table with a sample_id column as `scores/<name>.parquet`; return the key.

    Args:
        store: the dataset.
        name: of the file.
        table: the columns.
        digests: the SHA-256 of the scorers that made them, by a short name, for the footer.
        licences: those of the scorers, by the same names.
    """
    metadata = {f"{SCORER_MARK}{part}": digest for part, digest in digests.items()}
    metadata |= {f"{LICENCE_MARK}{part}": licence for part, licence in (licences or {}).items()}
    metadata["huggingface"] = canonical_json({"info": {"features": hugging_face_features(table.schema)}})
    key = added_key(name)
    store.put(key, parquet_bytes(table.replace_schema_metadata(metadata)))
    return key
