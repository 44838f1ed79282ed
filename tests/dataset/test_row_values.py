"""Values that no run writes, in the Parquet of a dataset: whoever reads them is told in one line."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset.finished import finish_dataset

from facediffuser.cards.dataset_card import write_card
from facediffuser.dataset.reading import read_columns, row_groups
from facediffuser.dataset.row_values import value_problems
from facediffuser.dataset.schema import DATASET_SCHEMA, face_type
from facediffuser.errors import InputError

pytestmark = pytest.mark.usefixtures("plain_plots")

FACE = {"box": [0.0] * 4, "probability": 0.9, "landmarks": [[0.0, 0.0]] * 5, "subject_id": None, "similarity": None,
        "other_subject_id": None, "other_similarity": None, "yaw": 0.0, "pitch": 0.0, "roll": 0.0, "size": 9.0,
        "sharpness": 1.0}  # fmt: skip
IMAGE = {"bytes": b"x", "path": "x.png"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"sample_id": None}, "column 'sample_id' holds nulls"),
        ({"seed": None}, "column 'seed' holds nulls"),
        ({"subject_ids": []}, "empty lists"),
        ({"subject_ids": ["ada", None]}, "lists with nulls"),
        ({"face_boxes": [[1.0, 2.0]]}, "boxes that are not four numbers"),
        ({"face_boxes": [None]}, "lists with nulls"),
        ({"ip_per_subject": [None]}, "lists with nulls"),
        ({"status": "fine"}, "column 'status' holds 'fine'"),
        ({"status": "ok", "image": None}, "null in a row whose status is ok"),
        ({"status": "ok", "image": {"bytes": b"", "path": "x"}}, "images without bytes"),
        ({"faces": [None]}, "lists with nulls"),
        ({"faces": [FACE | {"yaw": None}]}, "'yaw' without a value"),
        ({"faces": [FACE | {"landmarks": None}]}, "'landmarks' without a value"),
    ],
)
def test_values_that_no_run_writes_are_named(row, says):
    schema = pa.schema([field.with_nullable(True) for field in DATASET_SCHEMA if field.name in row])
    assert any(says in problem for problem in value_problems(pa.Table.from_pylist([row], schema), DATASET_SCHEMA))


def test_values_that_runs_write_are_none():
    rows = [
        {"sample_id": "a", "subject_ids": ["ada"], "status": "ok", "image": IMAGE, "faces": [FACE], "face_boxes": []},
        {"sample_id": "b", "subject_ids": ["ada"], "status": "failed", "image": None, "faces": None, "ip": None},
    ]
    columns = ("sample_id", "subject_ids", "status", "image", "faces", "face_boxes", "ip")
    table = pa.Table.from_pylist(rows, pa.schema([DATASET_SCHEMA.field(name) for name in columns]))
    assert list(value_problems(table, DATASET_SCHEMA)) == []
    with_embedding = pa.table({"faces": pa.array([[FACE | {"embedding": [0.5, 0.5]}]], pa.list_(face_type(2)))})
    assert list(value_problems(with_embedding, DATASET_SCHEMA)) == []


def without_values(folder, column: str) -> str:
    """Write nulls into a column of a dataset's first shard; return the shard's key."""
    path = sorted((folder / "data").iterdir())[0]
    table = pq.read_table(path)
    place = table.column_names.index(column)
    field = table.schema.field(place).with_nullable(True)
    pq.write_table(table.set_column(place, field, pa.nulls(table.num_rows, field.type)), path)
    return f"data/{path.name}"


def test_the_card_names_a_shard_whose_images_are_missing(tmp_path):
    store = finish_dataset(tmp_path / "dataset")
    key = without_values(tmp_path / "dataset", "image")
    with pytest.raises(InputError, match=f"{key}: column 'image' is null in a row whose status is ok"):
        write_card(store)


def test_every_reader_of_a_dataset_looks(tmp_path):
    store = finish_dataset(tmp_path / "dataset")
    key = without_values(tmp_path / "dataset", "subject_ids")
    with pytest.raises(InputError, match="column 'subject_ids' holds nulls"):
        read_columns(store, key, ["subject_ids"])
    with pytest.raises(InputError, match="column 'subject_ids' holds nulls"):
        list(row_groups(store, [key], ["subject_ids"]))
