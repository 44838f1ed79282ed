"""A dataset's Parquet in the readers that people use, with the faces' nested columns, and how many bytes they read."""

from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scoring.small_world import row, write_dataset

from facediffuser.dataset.plan import Layout
from facediffuser.dataset.schema import dataset_schema, with_marks
from facediffuser.dataset.shards import LOOKED_UP, encode_shard
from facediffuser.storage import open_store
from facediffuser.storage.arrow import arrow_filesystem

ROWS, SIZE = 240, 16
FOOTER = 1 << 16  # what pyarrow reads of a file's end before it knows how long the footer is


def face(number: int) -> dict:
    return {
        "box": [8.0, 8.0, 56.0, 60.0], "probability": 0.9, "landmarks": [[float(n), 2.0] for n in range(5)],
        "subject_id": "ada", "similarity": 0.5, "other_subject_id": None, "other_similarity": None, "yaw": 10.0,
        "pitch": -5.0, "roll": 1.0, "size": 48.0, "sharpness": 100.0,
        "embedding": np.full(SIZE, number, np.float16),
    }  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Rows with 0, 1 and 2 faces in turn, the last row failed; images of noise, so that they are nearly all the bytes."""
    noise = np.random.default_rng(0)
    pictures = [Image.fromarray(noise.integers(0, 255, (96, 96, 3), np.uint8)) for _ in range(8)]
    rows = [
        row(n, pictures[n % 8], ip=n / ROWS, ip_margin=0.1, faces=[face(n), face(n)][: n % 3]) for n in range(ROWS - 1)
    ]
    folder = tmp_path_factory.mktemp("readers") / "dataset"
    write_dataset(folder, rows, {"ada": pictures[0]}, shards=1)
    for path in (folder / "data").iterdir():
        path.unlink()
    run = {"schema": {"version": "2", "embedding_size": SIZE}}
    schema = with_marks(dataset_schema(embedding_size=SIZE), "0" * 64, run, synthetic=True)
    data = encode_shard([*rows, row(ROWS - 1, None)], schema)
    open_store(folder).put(Layout(ROWS, ROWS).shard_key(0), data)
    return folder


@pytest.fixture(scope="module")
def shard(dataset) -> str:
    return str(next((dataset / "data").iterdir()))


class Counting:
    """A store that notes which bytes of its objects are read."""

    def __init__(self, store):
        self.store, self.reads = store, []

    def exists(self, key):
        return self.store.exists(key)

    def reader(self, key):
        return _Noting(self.store.reader(key), self.reads)


class _Noting:
    def __init__(self, file, reads):
        self.file, self.reads = file, reads

    def __getattr__(self, name):
        return getattr(self.file, name)

    def read(self, size=-1):
        start = self.file.tell()
        data = self.file.read(size)
        self.reads.append((start, len(data)))
        return data


def test_a_filter_on_ip_and_a_projection_of_scores_read_no_image(dataset, shard):
    counted = Counting(open_store(dataset))
    rows = ds.dataset([f"data/{Path(shard).name}"], format="parquet", filesystem=arrow_filesystem(counted))
    found = rows.to_table(["sample_id", "ip", "pc", "ip_margin", "faces"], filter=ds.field("ip") > 0.9)
    assert found.num_rows == 22 and found["faces"].to_pylist()[0] is not None
    size, metadata = Path(shard).stat().st_size, pq.read_metadata(shard)
    chunks = [metadata.row_group(group).column(14) for group in range(metadata.num_row_groups)]
    assert {chunk.path_in_schema for chunk in chunks} == {"image.bytes"} and len(chunks) == 3
    images = [(chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size) for chunk in chunks]
    assert sum(end - start for start, end in images) > 0.9 * size
    of_images = sum(
        max(0, min(start + length, end, size - FOOTER) - max(start, first))
        for start, length in counted.reads
        for first, end in images
    )
    assert of_images == 0
    assert sum(length for _, length in counted.reads) < 0.05 * size


def test_statistics_and_page_index_of_all_but_images_and_embeddings(shard):
    group = pq.read_metadata(shard).row_group(0)
    columns = [group.column(place) for place in range(group.num_columns)]
    without = {one.path_in_schema for one in columns if not (one.is_stats_set and one.has_column_index)}
    assert without == {"image.bytes", "faces.list.element.embedding.list.element"}
    assert (group.column(0).statistics.min, group.column(0).statistics.max) == ("sample-00000", "sample-00099")


def test_bloom_filters_of_what_rows_are_looked_up_by(shard):
    import duckdb

    found = duckdb.sql(f"select distinct path_in_schema from parquet_metadata('{shard}') where bloom_filter_offset > 0")
    assert {path.replace(", ", ".") for (path,) in found.fetchall()} == set(LOOKED_UP)
    probe = duckdb.sql(f"select bloom_filter_excludes from parquet_bloom_probe('{shard}', 'sample_id', 'nobody')")
    assert sum(excluded for (excluded,) in probe.fetchall()) >= 2


def test_pandas(shard):
    import pandas

    frame = pandas.read_parquet(shard, columns=["faces", "ip"])
    assert frame["faces"][2][1]["subject_id"] == "ada" and frame["faces"][2][1]["embedding"].tolist() == [2.0] * SIZE
    assert frame["ip"].isna().sum() == 1


def test_polars(shard):
    import polars

    rows = polars.scan_parquet(shard).filter(polars.col("ip") > 0.5).explode("faces").unnest("faces").collect()
    assert rows["embedding"].dtype == polars.Array(polars.Float16, SIZE) and set(rows["subject_id"].drop_nulls()) == {
        "ada"
    }


def test_duckdb(shard):
    import duckdb

    faces = f"select sample_id, unnest(faces) as face from '{shard}' where ip > 0.5"
    found = duckdb.sql(f"select count(*), avg(face.yaw), max(face.embedding[1]), max(face.box[3]) from ({faces})")
    assert found.fetchall() == [(118, 10.0, 238.0, 56.0)]


def test_who_stands_where_by_the_query_of_the_document(tmp_path):
    import duckdb
    import pyarrow as pa

    def shown(name: str | None, left: float) -> dict:
        return face(0) | {"box": [left, 8.0, left + 40.0, 60.0], "subject_id": name}

    rows = [row(0, None, faces=[shown("ada", 50), shown("bob", 4), shown(None, 90)]), row(1, None, faces=[])]
    path = tmp_path / "shard.parquet"
    pq.write_table(pa.Table.from_pylist(rows, dataset_schema(embedding_size=SIZE)), path)
    text = (Path(__file__).resolve().parents[2] / "docs" / "scoring.md").read_text()
    query = text.partition("```sql\n")[2].partition("```")[0].replace("out/mine/data/*.parquet", str(path))
    assert duckdb.sql(query).fetchall() == [("sample-00000", ["bob", "ada"])]


def test_datasets_as_a_map_and_as_a_stream(shard, tmp_path):
    from datasets import Image as ImageFeature
    from datasets import load_dataset
    from torch.utils.data import DataLoader

    rows = load_dataset("parquet", data_files=shard, split="train", cache_dir=str(tmp_path))
    assert isinstance(rows.features["image"], ImageFeature) and rows[2]["image"].size == (96, 96)
    assert rows[2]["faces"][1]["landmarks"][4] == [4.0, 2.0] and rows[-1]["faces"] is None
    scored = rows.select_columns(["image", "ip", "ip_margin"]).select(range(8)).with_format("torch")
    assert next(iter(DataLoader(scored, batch_size=4)))["image"].shape == (4, 3, 96, 96)
    stream = load_dataset("parquet", data_files=shard, split="train", streaming=True)
    third = next(iter(stream.skip(2)))
    assert third["image"].size == (96, 96) and third["faces"][0]["embedding"] == [2.0] * SIZE


def test_torchs_data_loader_over_row_groups(shard):
    from torch.utils.data import DataLoader, IterableDataset

    class Faces(IterableDataset):
        def __iter__(self):
            for batch in pq.ParquetFile(shard).iter_batches(columns=["faces"]):
                for faces in batch["faces"].to_pylist():
                    yield from (np.array(one["embedding"], np.float32) for one in faces or [])

    vectors = list(DataLoader(Faces(), batch_size=64))
    assert sum(len(part) for part in vectors) == 238 and vectors[0].shape == (64, SIZE)


def test_ray_data(shard, ray_session):
    import ray.data

    rows = ray.data.read_parquet(shard, columns=["sample_id", "ip", "faces"], override_num_blocks=1).filter(
        expr="ip > 0.9"
    )
    found = rows.take_all()
    assert len(found) == 22 and {row["sample_id"] for row in found} == {f"sample-{n:05d}" for n in range(217, 239)}
    faces = next(row["faces"] for row in found if row["sample_id"] == "sample-00218")
    assert len(faces) == 2 and faces[1]["subject_id"] == "ada" and list(faces[1]["embedding"]) == [218.0] * SIZE
