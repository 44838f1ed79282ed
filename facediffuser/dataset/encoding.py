"""Tables as the bytes of Parquet files, encoded in memory: the same table gives the same bytes."""

import functools
import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    """Return a table as a Parquet file: compressed with zstd and with a page index, unless `options` say otherwise.

    Args:
        table: the rows, with the footer's metadata in its schema.
        options: what else `pyarrow.parquet.write_table` takes.
    """
    sink = io.BytesIO()
    pq.write_table(table, sink, **{"compression": "zstd", "write_page_index": True} | options)
    return sink.getvalue()


@functools.cache
def column_paths(schema: pa.Schema) -> tuple[str, ...]:
    """Return the paths of a schema's columns in Parquet, such as `image.bytes`, in their order."""
    columns = pq.ParquetFile(io.BytesIO(parquet_bytes(schema.empty_table()))).schema
    return tuple(column.path for column in columns)
