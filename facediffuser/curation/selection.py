"""Which rows of a dataset an export has: an SQL condition, and a split by subject in which nobody is on both sides."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facediffuser.dataset.added_columns import AddedColumns, read_added_columns
from facediffuser.dataset.manifest import Manifest
from facediffuser.dataset.reading import open_parquet
from facediffuser.errors import InputError
from facediffuser.storage import Store
from facediffuser.storage.reading import parse_json

TRAIN, TEST = "train", "test"
CONDITION_MEMORY = "1GB"


def split_subjects(names: Iterable[str], test_share: float, seed: int) -> dict[str, str]:
    """Return for each subject the side it is on: `train` or `test`.

    With a share above 0 and two subjects or more, each side has one at least. Who is on which side depends on the names
    and the seed alone, and those who join later change it for few.

    Args:
        names: ids of subjects.
        test_share: the share of test, 0 to 1.
        seed: another seed gives another split.
    """
    ranked = sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())
    count = min(max(1, round(test_share * len(ranked))), len(ranked) - 1) if test_share and len(ranked) > 1 else 0
    return {name: TEST if place < count else TRAIN for place, name in enumerate(ranked)}


class Condition:
    """An SQL condition on a dataset's columns, evaluated by DuckDB without access to files or the network.

    It is parsed by itself, as one expression, so that it cannot end the query around it. It may look at its own row only,
    and must say the same of a row at every run: neither a query inside, nor parameters, nor functions such as `random`.
    """

    def __init__(self, text: str | None, schema: pa.Schema):
        self.text = text
        if text is None:
            return
        import duckdb

        self._error = duckdb.Error
        self._connection = duckdb.connect(
            config={"enable_external_access": False, "threads": 1, "memory_limit": CONDITION_MEMORY}
        )
        try:
            self._expression = duckdb.SQLExpression(text)
            self._require_of_row(text, schema.names)
        except (duckdb.Error, UnicodeEncodeError, TypeError) as error:
            raise self._refusal(error) from None
        # Some errors, as of a text that is no number, show in a row only.
        nothing = {field.name: pa.nulls(1, single_precision(field.type)) for field in schema}
        self.rows(pa.table(nothing | {"status": pa.array(["ok"])}))

    def rows(self, table: pa.Table) -> np.ndarray:
        """Return the places of the rows that hold it and have an image, ascending.

        Raises:
            InputError: it is no condition on these columns.
        """
        made = pc.equal(table["status"], "ok").combine_chunks()
        if self.text is None:
            return np.flatnonzero(made.to_numpy(zero_copy_only=False))
        wide = pa.schema([field.with_type(single_precision(field.type)) for field in table.schema])
        try:
            answers = self._connection.from_arrow(table.cast(wide)).select(self._expression.cast("BOOLEAN")).fetchall()
        except self._error as error:
            raise self._refusal(error) from None
        if len(answers) != table.num_rows or any(len(answer) != 1 for answer in answers):
            raise InputError(
                f"--where {self.text!r}: says not one thing of each row; give an SQL condition on the columns"
            )
        holds = np.array([answer[0] is True for answer in answers], bool)
        return np.flatnonzero(holds & made.to_numpy(zero_copy_only=False))

    def _require_of_row(self, text: str, columns: Sequence[str]) -> None:
        """Raise InputError for a condition that looks at more than its row, or says something else at the next run."""
        serialized = self._connection.execute("SELECT json_serialize_sql(?)", [f"SELECT (\n{text}\n)"]).fetchone()
        assert serialized is not None  # one row for one statement
        changing = self._connection.execute(
            "SELECT function_name FROM duckdb_functions() GROUP BY 1 "
            "HAVING bool_and(function_type = 'aggregate') OR bool_or(stability <> 'CONSISTENT')"
        ).fetchall()
        for found in _nodes(parse_json(serialized[0])):
            # Some functions are written without brackets, as `current_date`, like a column.
            names = found.get("column_names") or [found.get("function_name", "")]
            name = str(names[-1]).lower() if len(names) == 1 and names[0] not in columns else ""
            if found.get("class") in ("SUBQUERY", "WINDOW", "PARAMETER", "STAR") or (name,) in changing:
                what = name or str(found["class"]).lower()
                raise InputError(f"--where {text!r}: {what} is no condition on a row alone, the same at every run; give an SQL "
                                 "condition on the columns")  # fmt: skip

    def _refusal(self, error: Exception) -> InputError:
        said = " ".join(str(error).split("LINE")[0].split())
        return InputError(f"--where {self.text!r}: {said[:300]}; give an SQL condition on the columns")


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON document."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nodes(part)


def single_precision(kind: pa.DataType) -> pa.DataType:
    """Return a type with numbers of single precision where it has half: DuckDB does not know those."""
    if pa.types.is_float16(kind):
        return pa.float32()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(single_precision(field.type)) for field in kind.fields])
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(single_precision(kind.value_type), kind.list_size)
    if pa.types.is_list(kind):
        return pa.list_(single_precision(kind.value_type))
    return kind


@dataclass
class Chunk:
    """Rows of one side that are exported together: (shard, places of its rows) in the dataset's order."""

    split: str
    number: int
    first: int
    rows: list[tuple[str, list[int]]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many rows it has."""
        return sum(len(places) for _, places in self.rows)


@dataclass
class Selection:
    """The rows of an export.

    chunks: in the order of the dataset, side by side.
    failed: rows without an image; unlike: rows that do not hold the condition; mixed: rows with people of both sides.
    """

    chunks: list[Chunk]
    failed: int = 0
    unlike: int = 0
    mixed: int = 0


def columns_without_images(schema: pa.Schema) -> list[str]:
    """Return the columns that a condition may name."""
    return [name for name in schema.names if name != "image"]


def read_rows(store: Store, key: str, added: AddedColumns) -> Iterator[pa.Table]:
    """Yield a shard's row groups without the images, with the columns that were added."""
    with open_parquet(store, key) as file:
        names = columns_without_images(file.schema_arrow)
        for group in range(file.num_row_groups):
            yield with_added(file.read_row_group(group, columns=names), added)


def with_added(table: pa.Table, added: AddedColumns) -> pa.Table:
    """Return rows with the columns that were added to the dataset."""
    if added.tables:
        beside = added.rows(table["sample_id"])
        for name in beside.column_names:
            table = table.append_column(name, beside[name])
    return table.replace_schema_metadata(None)


def select_rows(
    store: Store, manifest: Manifest, condition: Condition, sides: dict[str, str], size: int, both_sides: bool
) -> Selection:
    """Return the rows of an export, in chunks of `size`; one pass over the columns, without the images.

    Args:
        store: the dataset.
        manifest: its manifest.
        condition: which rows are wanted.
        sides: the side of each subject.
        size: rows of a chunk.
        both_sides: a row with people of both sides counts on each of them (only its faces are exported), else on none.
    """
    added = read_added_columns(store)
    found = Selection([])
    open_chunks: dict[str, Chunk] = {}
    counts: dict[str, int] = {}
    for entry in manifest.all_shards:
        start = 0
        for table in read_rows(store, entry.key, added):
            chosen = condition.rows(table)
            made = table["status"].to_pylist().count("ok")
            found.failed += table.num_rows - made
            found.unlike += made - len(chosen)
            people = table["subject_ids"].take(pa.array(chosen)).to_pylist()
            for place, names in zip(chosen.tolist(), people, strict=True):
                on = sorted({sides.get(name, TRAIN) for name in names}, reverse=True)
                if len(on) > 1 and not both_sides:
                    found.mixed += 1
                    continue
                for side in on:
                    _take(found, open_chunks, counts, side, entry.key, start + place, size)
            start += table.num_rows
    found.chunks += [chunk for chunk in open_chunks.values() if chunk.rows]
    found.chunks.sort(key=lambda chunk: (chunk.split != TRAIN, chunk.number))
    return found


def _take(
    found: Selection, chunks: dict[str, Chunk], counts: dict[str, int], side: str, key: str, place: int, size: int
) -> None:
    chunk = chunks.get(side)
    if chunk is None or chunk.count == size:
        if chunk is not None:
            found.chunks.append(chunk)
        first = counts.get(side, 0)
        chunk = chunks[side] = Chunk(side, first // size, first)
    if not chunk.rows or chunk.rows[-1][0] != key:
        chunk.rows.append((key, []))
    chunk.rows[-1][1].append(place)
    counts[side] = counts.get(side, 0) + 1


def read_chunk(store: Store, rows: Sequence[tuple[str, list[int]]], added: AddedColumns) -> Iterator[dict[str, Any]]:
    """Yield the rows of a chunk, images included; memory holds one row group at a time.

    Args:
        store: the dataset.
        rows: a shard's key and the places in it, for each shard of the chunk.
        added: the columns that were added to the dataset.
    """
    for key, places in rows:
        wanted = np.asarray(places)
        with open_parquet(store, key) as file:
            start = 0
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                inside = wanted[(wanted >= start) & (wanted < end)] - start
                if len(inside):
                    table = with_added(file.read_row_group(group).take(pa.array(inside)), added)
                    yield from table.to_pylist()
                start = end


def schema_of(store: Store, manifest: Manifest) -> pa.Schema:
    """Return the columns that a condition may name, those that were added included."""
    with open_parquet(store, manifest.all_shards[0].key) as file:
        schema = file.schema_arrow.remove_metadata()
    names = columns_without_images(schema)
    return pa.schema([*(schema.field(name) for name in names), *read_added_columns(store).schema])
