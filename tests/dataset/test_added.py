"""Added columns: found by id in whatever order rows come, null where a row has none."""

import pyarrow as pa

from facediffuser.dataset.added_columns import AddedColumns, read_added_columns, write_added_columns
from facediffuser.storage import open_store

TABLE = pa.table({"sample_id": [f"s{number}" for number in range(10)], "value": [float(n) for n in range(10)]})


def values(added: AddedColumns, *names: str) -> list:
    return added.rows(pa.array(names)).column("value").to_pylist()


def test_rows_are_found_in_order_out_of_order_and_again():
    added = AddedColumns({"one": TABLE})
    assert values(added, "s0", "s1") == [0, 1]
    assert values(added, "s2") == [2]
    assert values(added, "s9", "s0", "s3") == [9, 0, 3]
    assert values(added, "s3", "s4") == [3, 4]
    assert added.rows(pa.chunked_array([["s5"], ["s6"]]))["value"].to_pylist() == [5, 6]


def test_a_row_that_was_not_added_is_null():
    added = AddedColumns(
        {"one": TABLE, "none": pa.table({"sample_id": pa.array([], pa.string()), "more": pa.array([], pa.int8())})}
    )
    found = added.rows(pa.array(["s1", "unknown", "s2"]))
    assert found.to_pydict() == {"value": [1, None, 2], "more": [None] * 3}


def test_what_was_written_is_read_with_its_digests(tmp_path):
    store = open_store(tmp_path)
    assert read_added_columns(store).schema.names == []
    assert write_added_columns(store, "mine", TABLE, {"mine": "f" * 64}) == "scores/mine.parquet"
    added = read_added_columns(store)
    assert added.schema.names == ["value"] and added.digests() == {"mine": "f" * 64}
