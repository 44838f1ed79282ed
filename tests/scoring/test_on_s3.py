"""The whole of scoring with everything in a bucket: scorers, dataset, what is added, tables."""

import pytest
from scoring.small_world import beside, row, write_dataset

from facediffuser.dataset.added_columns import read_added_columns, write_added_columns
from facediffuser.evaluation.add_columns import column_stage
from facediffuser.evaluation.copies import find_copies
from facediffuser.evaluation.evaluate_settings import EvaluateSettings
from facediffuser.evaluation.evaluator import Evaluator
from facediffuser.evaluation.score_settings import CopySettings, ScoreSettings
from facediffuser.evaluation.training_faces import count_training, training_faces
from facediffuser.scoring.scorers import load_scorers
from facediffuser.storage import open_store
from facediffuser.tasks.local_driver import LocalDriver


def upload(folder, url: str) -> None:
    store = open_store(url)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        store.put(path.relative_to(folder).as_posix(), path.read_bytes())


@pytest.fixture
def bucket(s3_bucket, scorers_folder, people, tmp_path, monkeypatch):
    """`scorers/`, `dataset/` (ada, once as herself) and `photos/` (ada) in a bucket; downloads go to a fresh cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ada = beside(people["ada"])
    upload(scorers_folder, f"{s3_bucket.url}/scorers")
    rows = [row(0, ada, face_boxes=[[81, 69, 173, 187]]), row(1, None)]
    upload(write_dataset(tmp_path / "dataset", rows, {"ada": ada}), f"{s3_bucket.url}/dataset")
    (tmp_path / "photos").mkdir()
    ada.save(tmp_path / "photos" / "1.png")
    upload(tmp_path / "photos", f"{s3_bucket.url}/photos")
    return s3_bucket.url


def test_scorers_dataset_and_tables_may_all_lie_in_a_bucket(bucket):
    store = open_store(f"{bucket}/dataset")
    assert LocalDriver().run(column_stage(ScoreSettings(url=store.url))) == ["scores/sharpness.parquet"]
    identity = load_scorers(f"{bucket}/scorers").identity
    assert count_training(f"{bucket}/photos") == 1
    found = find_copies(store, identity, CopySettings(url=store.url), training_faces(f"{bucket}/photos", identity))
    write_added_columns(store, "copies", found, {})
    assert set(read_added_columns(store).schema.names) >= {
        "sharpness",
        "training_copy",
        "pasted_reference",
        "duplicate",
    }
    settings = EvaluateSettings(
        dataset=store.url, rescore=True, scorers=f"{bucket}/scorers", output=f"{bucket}/table", device="cpu"
    )
    evaluation = Evaluator(settings).run()
    assert evaluation.images["ip"].to_pylist()[0] > 0.99 and evaluation.images["training_copy"].to_pylist()[0]
    assert {info.key for info in open_store(f"{bucket}/table").list()} == {
        "table.parquet", "per_subject.parquet", "table.md", "plot.png", "scores.parquet"
    }  # fmt: skip
