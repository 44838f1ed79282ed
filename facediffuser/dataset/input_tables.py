"""Tables that a user brings, JSONL, CSV or Parquet, as rows with their numbers; errors name file and row."""

import csv
import io
import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from facediffuser.errors import InputError
from facediffuser.storage import StorageError, Store

# Tables are read whole: one of more bytes is none that a person or a program wrote on purpose.
MOST_TABLE_BYTES = 1 << 28
PARQUET_BATCH_ROWS = 1 << 10
MOST_SHOWN_CHARACTERS = 200

Row = tuple[int, dict[str, Any]]
"""The number of a row, for messages, and its values by column."""


def read_table_file(store: Store, key: str) -> bytes:
    """Return the bytes of a table's file.

    Raises:
        InputError: it cannot be read, or is larger than MOST_TABLE_BYTES.
    """
    name = store.url_of(key)
    try:
        with store.open(key) as file:
            data = file.read(MOST_TABLE_BYTES + 1)
    except StorageError:
        raise
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if len(data) > MOST_TABLE_BYTES:
        raise InputError(f"{name}: file too large, at most {MOST_TABLE_BYTES:,} bytes are read; split it")
    return data


def json_rows(data: bytes, name: str) -> list[Row]:
    """Return the objects of a JSONL file with their line numbers, from 1; empty lines count and have no object.

    Args:
        data: the file.
        name: its path or URL, for errors.

    Raises:
        InputError: a line is not an object of JSON, or has two values of one name.
    """
    rows = []
    # Lines end at line feeds alone: JSON may hold U+2028 and other ends of lines inside of its strings.
    for number, line in enumerate(_text(data, name).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_with_unique_names)
        except _Repeated as error:
            raise InputError(f"{name} row {number}: two values are called {error}; keep one") from None
        except (ValueError, RecursionError):
            raise InputError(f"{name} row {number}: not JSON; write one object a line") from None
        if not isinstance(row, dict):
            raise InputError(f'{name} row {number}: not an object; write {{"prompt": "..."}}')
        rows.append((number, row))
    return rows


class _Repeated(Exception):
    """A JSON object with two values of one name, of which Python's reader would drop the first without a word."""


def _with_unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Repeated(shown_value(next(name for name in names if names.count(name) > 1)))
    return row


def csv_rows(data: bytes, name: str, known: tuple[str, ...] = ()) -> list[Row]:
    """Return the rows of a CSV file with the lines they end at; cells that a row lacks are None.

    Args:
        data: the file.
        name: its path or URL, for errors.
        known: the columns that a file without rows may have; any when none is named.

    Raises:
        InputError: the file is not CSV, a row has more cells than there are columns, or column names are
            missing or repeat.
    """
    reader = csv.DictReader(io.StringIO(_text(data, name), newline=""), strict=True)
    rows = []
    try:
        columns = reader.fieldnames or []
        require_column_names(columns, name)
        for row in reader:
            if None in row:
                raise InputError(f"{name} row {reader.line_num}: more cells than the header; quote cells with commas")
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise InputError(f"{name} row {reader.line_num}: not CSV ({error}); save it as CSV in UTF-8") from None
    if not rows and columns and known:
        require_columns(dict.fromkeys(columns), known, (), name)
    return rows


def require_column_names(columns: Sequence[str], name: str) -> None:
    """Check the names of a table's columns.

    Args:
        columns: the names.
        name: the file's path or URL, for errors.

    Raises:
        InputError: a column has no name, as pandas writes its index, or two have the same.
    """
    for number, column in enumerate(columns, 1):
        if not column.strip():
            raise InputError(
                f"{name}: column {number} has no name; name or remove it (pandas: to_csv(..., index=False))"
            )
        if column in columns[: number - 1]:
            raise InputError(f"{name}: two columns are called {shown_value(column)}; keep one")


def parquet_rows(data: bytes, name: str, known: tuple[str, ...]) -> list[Row]:
    """Return the rows of a Parquet file, counted from 1.

    Args:
        data: the file.
        name: its path or URL, for errors.
        known: the columns it may have.

    Raises:
        InputError: the file is not Parquet, has other columns, or more than MOST_TABLE_BYTES of text.
    """
    rows: list[Row] = []
    size = 0
    try:
        with pq.ParquetFile(io.BytesIO(data)) as file:
            require_column_names(file.schema_arrow.names, name)
            require_columns(dict.fromkeys(file.schema_arrow.names), known, (), name)
            for batch in file.iter_batches(PARQUET_BATCH_ROWS):
                size += batch.nbytes
                if size > MOST_TABLE_BYTES:
                    raise InputError(f"{name}: holds more than {MOST_TABLE_BYTES:,} bytes of text; split it")
                rows += _batch_rows(batch, len(rows) + 1, name)
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{name}: not a Parquet file, or a damaged one ({type(error).__name__}); give another"
        ) from None
    return rows


def _batch_rows(batch: pa.RecordBatch, first: int, name: str) -> list[Row]:
    rows = []
    for place in range(batch.num_rows):
        row = {}
        for column, values in zip(batch.schema.names, batch.columns, strict=True):
            try:
                row[column] = values[place].as_py()
            except UnicodeDecodeError:
                raise InputError(f"{name} row {first + place}: {column} is not UTF-8 text; write it again") from None
        rows.append((first + place, row))
    return rows


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") + 1
        raise InputError(f"{name} row {row}: not UTF-8 text; save it as UTF-8") from None


def normalised(name: str) -> str:
    """Return a name in Unicode's composed form (NFC), in which names are compared."""
    return unicodedata.normalize("NFC", name)


def shown_value(value: object, quoted: bool = True) -> str:
    """Return a value for a message: escaped as in Python, and cut where it is long.

    Args:
        value: the value.
        quoted: whether text keeps its quotes.
    """
    text = repr(value)
    text = text if quoted else text[1:-1]
    return text if len(text) <= MOST_SHOWN_CHARACTERS else text[:MOST_SHOWN_CHARACTERS] + "..."


def require_text(text: str, where: str, kind: str) -> None:
    """Check that a dataset can hold a text.

    Args:
        text: the text.
        where: file and row, for errors.
        kind: what the text is, such as `prompt`.

    Raises:
        InputError: it has halves of characters, or control characters other than tab and ends of lines.
    """
    for place, char in enumerate(text, 1):
        if "\ud800" <= char <= "\udfff" or (char < " " and char not in "\t\n\r") or char == "\x7f":
            raise InputError(f"{where}: character {place} of the {kind} is {char!r}, no text; remove it")


def require_columns(row: dict[str, Any], known: tuple[str, ...], needed: tuple[str, ...], name: str) -> None:
    """Check the columns of a row.

    Args:
        row: values by column.
        known: the columns it may have.
        needed: the columns it must have.
        name: file and row, for errors.

    Raises:
        InputError: a column is not known, or one that is needed is missing.
    """
    unknown = [column for column in row if column not in known]
    if unknown:
        raise InputError(f"{name}: unknown column {shown_value(unknown[0])}; known are {', '.join(known)}")
    for column in needed:
        if column not in row:
            raise InputError(f"{name}: no column {column!r}; known are {', '.join(known)}")
