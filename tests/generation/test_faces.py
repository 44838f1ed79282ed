"""The column `faces`: written by `generate`, agreeing with the columns of version 1, and added to a dataset of that version."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from facediffuser.cards.dataset_card import write_card
from facediffuser.dataset.added_columns import read_added_columns
from facediffuser.dataset.schema import RUN_KEY, dataset_schema
from facediffuser.errors import InputError
from facediffuser.evaluation.add_columns import column_stage
from facediffuser.evaluation.score_settings import ScoreSettings
from facediffuser.generation.job import prepare
from facediffuser.storage import open_store
from facediffuser.tasks.local_driver import LocalDriver


@pytest.fixture(scope="module")
def photographed(made, world, tmp_path_factory):
    """The rows of a dataset whose images are the subjects' own references, so that there are faces: (store, rows)."""
    from PIL import Image
    from skimage import data

    class Photographs:
        """Pipeline whose images show ada's photograph twice as large, whatever is asked for."""

        def __init__(self, real):
            self.real = real

        def __getattr__(self, name):
            return getattr(self.real, name)

        def __call__(self, **given):
            out = self.real(**given | {"height": 32, "width": 32})  # what it draws is thrown away
            photograph = Image.fromarray(data.astronaut()).crop((120, 0, 320, 200))
            out.images = [photograph for _ in out.images]
            return out

    from facediffuser.generation.shard_generator import ShardGenerator

    prepared = prepare(world.settings(tmp_path_factory.mktemp("faces") / "dataset", height=200, width=200, steps=1))
    prepared.write()
    generator = ShardGenerator(prepared.job, Photographs(made[1].pipeline), made[1].scorers)
    for shard in range(prepared.job.layout.shards):
        generator(shard)
    return prepared.job, pq.read_table(prepared.job.output + "/data")


def test_the_columns_of_version_1_say_the_same(photographed):
    job, table = photographed
    assert table.schema.equals(dataset_schema(embedding_size=16))
    for row in table.to_pylist():
        faces = {face["subject_id"]: face for face in row["faces"]}
        assert row["face_count"] == len(row["faces"]) > 0
        assert row["face_boxes"] == [face["box"] for face in row["faces"]]
        assert row["face_probs"] == [face["probability"] for face in row["faces"]]
        assert row["ip_per_subject"] == [max(faces[name]["similarity"], 0.0) for name in row["subject_ids"]]
        assert row["ip_margin"] == pytest.approx(
            min(f["similarity"] - f["other_similarity"] for f in row["faces"]), abs=1e-6
        )
        for face in row["faces"]:
            assert np.linalg.norm(np.array(face["embedding"], np.float32)) == pytest.approx(1, abs=1e-3)
            assert abs(face["roll"]) < 20 and face["size"] > 50 and face["sharpness"] > 0


def test_without_embeddings_nothing_else_changes(world, tmp_path):
    job = prepare(world.settings(tmp_path / "small", embeddings=False)).job
    assert job.shard_schema.remove_metadata().equals(dataset_schema())
    assert job.run["schema"] == {"version": "2", "embedding_size": 0}


def test_score_brings_a_dataset_of_version_1_up_to_date(photographed, tmp_path):
    job, today = photographed
    old = Path(shutil.copytree(job.output, tmp_path / "old"))
    run = {name: value for name, value in job.run.items() if name != "schema"}
    for path in sorted((old / "data").iterdir()):
        table = pq.read_table(path).drop_columns(["faces", "ip_margin"])
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, RUN_KEY: json.dumps(run)}), path)
    given = ScoreSettings(url=str(old), add=["faces"], scorers=job.scorers, device="cpu", batch_size=2)
    with pytest.raises(InputError, match="has no column faces; run `facediffuser score --add faces` before"):
        column_stage(ScoreSettings(url=str(old), add=["face-quality"]))
    assert LocalDriver().run(column_stage(given)) == ["scores/faces.parquet"]
    store = open_store(old)
    found = read_added_columns(store).rows(today["sample_id"])
    assert found["faces"].to_pylist() == today["faces"].to_pylist()
    assert found["ip_margin"].to_pylist() == today["ip_margin"].to_pylist()
    assert LocalDriver().run(column_stage(given.model_copy(update={"add": ["face-quality"]})))
    assert write_card(store)


def test_face_quality_reads_what_is_known_of_the_faces(photographed, tmp_path):
    job, today = photographed
    copy = Path(shutil.copytree(job.output, tmp_path / "copy"))
    LocalDriver().run(column_stage(ScoreSettings(url=str(copy), add=["face-quality"], device="cpu")))
    quality = read_added_columns(open_store(copy)).rows(today["sample_id"])["face_quality"].to_pylist()
    assert all(0.1 < value <= 1 for value in quality)


def test_a_dataset_that_has_faces_is_not_given_them_twice(photographed):
    job, _ = photographed
    with pytest.raises(InputError, match="has the column faces; leave it out of --add"):
        column_stage(ScoreSettings(url=job.output, add=["faces"]))


def test_faces_of_another_network_than_the_datasets_are_refused(photographed, tmp_path):
    job, _ = photographed
    old = Path(shutil.copytree(job.output, tmp_path / "old"))
    for path in sorted((old / "data").iterdir()):
        pq.write_table(pq.read_table(path).drop_columns(["faces", "ip_margin"]), path)
    with pytest.raises(InputError, match="scored with another identity .* give --scorers those of the dataset"):
        column_stage(ScoreSettings(url=str(old), add=["faces"], scorers="miniature"))
